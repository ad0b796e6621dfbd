"""1x1 convolution + bias + ReLU6 + residual on NHWC activations, and the gradient of its input.

In NHWC a 1x1 convolution is the product of [pixels, Cin] and [Cin, Cout], the pixels of all images in a row.
One program makes M pixels of N output channels on tensor cores, K input channels at a time, with sums in
float32; bias, ReLU6 and residual are applied to the sums in registers, which are rounded once. Programs that
share pixels are neighbours: memory is read for the first one, L2 for the others.
"""

# Triton's language is not Python's: arguments carry no annotations.
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .common import (
    DTYPES,
    POINTERS,
    Tile,
    arithmetic,
    cdiv,
    channels_last,
    device_of,
    next_power_of_2,
    output,
    relu6,
    tiles,
)

# What tl.dot takes at least in each of its dimensions.
DOT = 16


@triton.jit(do_not_specialize=["pixels"])  # one binary for every batch
def pointwise_kernel(
    x,  # [pixels, CIN]
    weight,  # [COUT, CIN]; [CIN, COUT] where TURNED
    bias,  # [COUT]; not read without BIAS
    residual,  # [pixels, COUT]; not read without RESIDUAL
    out,  # [pixels, COUT]
    pixels,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    BIAS: tl.constexpr,
    RELU6: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TURNED: tl.constexpr,
    TF32: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One program: M pixels of N output channels. All arrays contiguous."""
    runs: tl.constexpr = (COUT + N - 1) // N
    program = tl.program_id(0)
    # Pixels are counted with 64 bits: a batch may have more than 2**31 elements.
    pixel = (program // runs).to(tl.int64) * M + tl.arange(0, M)
    channel = program % runs * N + tl.arange(0, N)
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    sums = tl.zeros((M, N), tl.float32)
    for first in tl.range(0, CIN, K):
        k = first + tl.arange(0, K)
        a = tl.load(
            x + pixel[:, None] * CIN + k[None, :],
            mask=(pixel < pixels)[:, None] & (k < CIN)[None, :],
            other=0.0,
        )
        of = k[:, None] * COUT + channel[None, :] if TURNED else channel[None, :] * CIN + k[:, None]
        b = tl.load(weight + of, mask=(k < CIN)[:, None] & (channel < COUT)[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=precision)
    if BIAS:
        sums += tl.load(bias + channel, mask=channel < COUT, other=0.0).to(tl.float32)[None, :]
    if RELU6:
        sums = relu6(sums)
    at = pixel[:, None] * COUT + channel[None, :]
    inside = (pixel < pixels)[:, None] & (channel < COUT)[None, :]
    if RESIDUAL:
        sums += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


def pointwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    relu6: bool = False,
    *,
    out: torch.Tensor | None = None,
    tf32: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """act(1x1 convolution of x + bias) + residual.

    Args:
        x: [N, Cin, H, W], float32, float16 or bfloat16, any strides; copied unless channels_last.
        weight: [Cout, Cin, 1, 1], batch norm folded, the dtype and device of x.
        bias: [Cout], likewise; None for none.
        residual: [N, Cout, H, W], likewise, any strides; None for none; copied unless channels_last.
        relu6: whether act is min(max(y, 0), 6), NaN kept; the identity otherwise.
        out: [N, Cout, H, W], channels_last, filled and returned where it is given.
        tf32: multiply float32 as TF32, with 10 bits of mantissa; in full precision otherwise.
        tile: a row of the tile table, instead of the one for this GPU and size.

    Returns:
        [N, Cout, H, W], channels_last. Sums are float32, rounded once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check(x, weight, bias, residual)
    n, _, h, w = x.shape
    out, lines = output(out, (n, weight.shape[0], h, w), x)
    if out.numel():
        _launch(
            channels_last(x), weight, bias, residual, lines, relu6=relu6, turned=False, tf32=tf32, tile=tile
        )
    return out


def input_gradient(
    dy: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    tf32: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The gradient of the x of `pointwise(x, weight)`, from that of its result.

    Args:
        dy: [N, Cout, H, W], as x of `pointwise`.
        weight: [Cout, Cin, 1, 1], likewise.
        residual: [N, Cin, H, W], added; None for none.
        out, tf32, tile: as `pointwise` has them.

    Returns:
        [N, Cin, H, W], channels_last. Sums are float32, rounded once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check(dy, weight.transpose(0, 1), None, residual)
    n, _, h, w = dy.shape
    out, lines = output(out, (n, weight.shape[1], h, w), dy)
    if out.numel():
        _launch(
            channels_last(dy), weight, None, residual, lines, relu6=False, turned=True, tf32=tf32, tile=tile
        )
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    relu6: bool,
    turned: bool,
    tf32: bool,
    tile: Tile | None,
) -> None:
    """Fill out [N, H, W, Cout] from x [N, H, W, Cin]; the weight is [Cin, Cout, 1, 1] where it is turned."""
    cin, cout = x.shape[-1], out.shape[-1]
    pixels = out.numel() // cout
    if tile is None:
        tile = choose_tile(x.device, pixels, cin, cout, arithmetic(x.dtype, tf32))
    tile = fit(tile, cin, cout)
    with torch.cuda.device_of(x):
        pointwise_kernel[programs(pixels, cout, tile),](
            x,
            weight.contiguous(),
            x if bias is None else bias.contiguous(),
            x if residual is None else channels_last(residual),
            out,
            pixels,
            CIN=cin,
            COUT=cout,
            BIAS=bias is not None,
            RELU6=relu6,
            RESIDUAL=residual is not None,
            TURNED=turned,
            TF32=tf32,
            M=tile["m"],
            N=tile["n"],
            K=tile["k"],
            num_warps=tile["warps"],
            num_stages=tile["stages"],
        )


def programs(pixels: int, cout: int, tile: Tile) -> int:
    """Programs that make `cout` channels of so many pixels."""
    return cdiv(pixels, tile["m"]) * cdiv(cout, tile["n"])


def fit(tile: Tile, cin: int, cout: int) -> Tile:
    """A tile of the table without what lies past the channels."""
    n, k = (max(DOT, next_power_of_2(channels)) for channels in (cout, cin))
    return {**tile, "n": min(tile["n"], n), "k": min(tile["k"], k)}


def traffic(
    pixels: int, cin: int, cout: int, item: int, tile: Tile, *, bias: bool = True, residual: bool = False
) -> int:
    """Bytes that `pointwise` reads and writes, `item` a number, with a tile that `fit` has made.

    The unique addresses of each program, weights included, summed over programs. L2 serves a part.
    """
    runs, rows = cdiv(cout, tile["n"]), cdiv(pixels, tile["m"])
    weights = rows * (cin * cout + (cout if bias else 0))
    return (pixels * cin * runs + weights + pixels * cout * (2 if residual else 1)) * item


def choose_tile(device: torch.device, pixels: int, cin: int, cout: int, kind: str) -> Tile:
    """The table's tile for products of `kind`, see `common.arithmetic`: "large", or "small" where large ones
    would leave the GPU idle.
    """
    name, units = device_of(device)
    large = row(name, f"large_{kind}", cin, cout)
    return large if programs(pixels, cout, large) >= 4 * units else row(name, f"small_{kind}", cin, cout)


def row(device_name: str, size: str, cin: int, cout: int) -> Tile:
    """A tile of the table: the one for these channels, such as "large_half_192x32", where it has one."""
    table = tiles(device_name, "pointwise")
    return fit(table.get(f"{size}_{cin}x{cout}", table[size]), cin, cout)


def compile_arguments(
    cin: int,
    cout: int,
    dtype: torch.dtype,
    tile: Tile,
    *,
    relu6: bool = False,
    residual: bool = False,
    gradient: bool = False,
    tf32: bool = False,
    pixels: str = "i32",
) -> dict[str, str | int | bool]:
    """The kernel's arguments as `aot.compile_for` takes them; `gradient`: as `input_gradient` launches it."""
    tile = fit(tile, cin, cout)
    pointers = dict.fromkeys(("x", "weight", "bias", "residual", "out"), POINTERS[dtype])
    constants = {"CIN": cin, "COUT": cout, "BIAS": not gradient, "RELU6": relu6, "RESIDUAL": residual}
    constants |= {"TURNED": gradient, "TF32": tf32}
    return {**pointers, "pixels": pixels, **constants, "M": tile["m"], "N": tile["n"], "K": tile["k"]}


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    relu6: bool = False,
) -> torch.Tensor:
    """The float64 twin of `pointwise`: same arguments, [N, Cout, H, W] float64."""
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double())
    y = y.clamp(0, 6) if relu6 else y
    return y if residual is None else y + residual.double()


def reference_gradient(
    dy: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The float64 twin of `input_gradient`: same arguments, [N, Cin, H, W] float64."""
    return reference(dy, weight.transpose(0, 1), None, residual)


def tolerance(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    want: torch.Tensor,
    tf32: bool = False,
) -> torch.Tensor:
    """How far `pointwise` may be from `want`, its float64 twin's answer: [N, Cout, H, W] float64.

    Each of Cin products and of as many sums is wrong by an eps of float32 at most, of values none larger than
    |x| |w| + |b| + |r|: tensor cores truncate where float32 arithmetic rounds. TF32 takes an eps of 2**-10
    from each factor. The result is rounded once more to its own type, by half a step, subnormal at least.
    """
    shift, added = (None if t is None else t.abs() for t in (bias, residual))
    size = reference(x.abs(), weight.abs(), shift, added)
    relative = (x.shape[1] + 3) * torch.finfo(torch.float32).eps + (2**-9 if tf32 else 0)
    own = torch.finfo(x.dtype)
    bound = relative * size + own.eps / 2 * want.abs() + own.tiny * own.eps
    return bound.masked_fill(~size.isfinite(), 0)


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"x and weight must be 4-dimensional, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    (n, cin, h, w), cout = x.shape, weight.shape[0]
    if weight.shape != (cout, cin, 1, 1) or (bias is not None and bias.shape != (cout,)):
        got = "" if bias is None else f", bias {tuple(bias.shape)}"
        raise ValueError(f"x has {cin} channels, weight is {tuple(weight.shape)}{got}: they do not fit")
    if residual is not None and residual.shape != (n, cout, h, w):
        raise ValueError(f"residual must be {(n, cout, h, w)}, got {tuple(residual.shape)}")
    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    if x.dtype not in DTYPES or any(t.dtype != x.dtype or t.device != x.device for t in tensors):
        got = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise ValueError(f"all tensors must share a device and one of {[str(d) for d in DTYPES]}, got {got}")
