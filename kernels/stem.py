"""The network's first convolution, 3x3 of stride 2 from 3 channels, + bias + ReLU6, from floats or bytes.

A program makes M neighbouring output pixels of one image, all channels: the 27 inputs of each are gathered
into a row of a matrix of 32 columns, which tensor cores multiply with the weight. In full float32 CUDA cores
do, one column after the other (on sm_100 Triton 3.6 and 3.7 make such a product in TF32, whatever is asked
for). Inputs are read where they lie, whatever their strides, so that neither NCHW nor bytes need a pass of
their own; the cache serves the nine windows that share a pixel.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .common import (
    DTYPES,
    POINTERS,
    Tile,
    arithmetic,
    batches,
    cdiv,
    device_of,
    next_power_of_2,
    output,
    relu6,
    tiles,
)
from .depthwise import limit, pixels_under
from .pointwise import DOT


@triton.jit
def stem_kernel(
    x,  # [N, 3, H, W] of any strides
    weight,  # [COUT, 3, 3, 3]
    bias,  # [COUT]
    norm,  # [2, 3] float32: what a byte is multiplied with, and what is added; not read without BYTES
    out,  # [N, HO, WO, COUT]
    image_step,
    channel_step,
    row_step,
    column_step,
    h,
    w,
    ho,
    wo,
    COUT: tl.constexpr,
    RELU6: tl.constexpr,
    BYTES: tl.constexpr,
    TF32: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program: M output pixels of one image. All but x contiguous, padding 1."""
    exact: tl.constexpr = weight.dtype.element_ty == tl.float32 and not TF32
    K: tl.constexpr = 1 if exact else 32
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * M + tl.arange(0, M)
    channel = tl.arange(0, N)
    sums = tl.zeros((M, N), tl.float32)
    for first in tl.static_range(0, 27, K):
        # Column k of the matrix: channel k // 9 under tap k % 9, in the order of the weight.
        k = first + tl.arange(0, K)
        source = k // 9
        row = 2 * (pixel // wo)[:, None] - 1 + (k % 9 // 3)[None, :]
        column = 2 * (pixel % wo)[:, None] - 1 + (k % 3)[None, :]
        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        inside = inside & (k < 27)[None, :] & (pixel < ho * wo)[:, None]
        # A view of a larger tensor may have any steps.
        at = image * image_step + (source.to(tl.int64) * channel_step)[None, :]
        at += row.to(tl.int64) * row_step + column.to(tl.int64) * column_step
        values = tl.load(x + at, mask=inside, other=0)
        if BYTES:
            scale = tl.load(norm + source, mask=k < 27, other=0.0)[None, :]
            shift = tl.load(norm + 3 + source, mask=k < 27, other=0.0)[None, :]
            # The padding is of zeros after, not before, a byte becomes a number.
            values = tl.where(inside, values.to(tl.float32) * scale + shift, 0.0)
        known = (k < 27)[:, None] & (channel < COUT)[None, :]
        taps = tl.load(weight + channel[None, :] * 27 + k[:, None], mask=known, other=0.0)
        if exact:
            sums += values * taps
        else:
            sums = tl.dot(values.to(weight.dtype.element_ty), taps, sums, input_precision="tf32")
    sums += tl.load(bias + channel, mask=channel < COUT, other=0.0).to(tl.float32)[None, :]
    if RELU6:
        sums = relu6(sums)
    to = (image * ho * wo + pixel)[:, None] * COUT + channel[None, :]
    tl.store(
        out + to, sums.to(out.dtype.element_ty), mask=(pixel < ho * wo)[:, None] & (channel < COUT)[None, :]
    )


def stem(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    relu6: bool,
    *,
    norm: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tf32: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """act(3x3 convolution of x of stride 2, padding 1, + bias).

    Args:
        x: [N, 3, H, W], float32, float16 or bfloat16, any strides; or uint8, with `norm`.
        weight: [Cout, 3, 3, 3], batch norm folded, of x's device and, but for bytes, its dtype.
        bias: [Cout], of the weight's dtype and device.
        relu6: whether act is min(max(y, 0), 6), NaN kept; the identity otherwise.
        norm: [2, 3], float32, contiguous: a byte b of channel c is b * norm[0, c] + norm[1, c].
        out: [N, Cout, HO, WO], channels_last, filled and returned where it is given.
        tf32: multiply float32 as TF32; in full precision otherwise.
        tile: a row of the tile table, instead of the one for this GPU.

    Returns:
        [N, Cout, (H - 1) // 2 + 1, (W - 1) // 2 + 1] of the weight's dtype, channels_last. Sums are float32,
        rounded once; a byte's number is rounded to the weight's dtype first.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or x is too large (see `depthwise.limit`).
    """
    _check(x, weight, bias, norm)
    (n, _, h, w), cout = x.shape, weight.shape[0]
    ho, wo = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    out, lines = output(out, (n, cout, ho, wo), weight)
    if not out.numel():
        return out
    tile = tiles(device_of(x.device)[0], "stem")[arithmetic(weight.dtype, tf32)] if tile is None else tile
    with torch.cuda.device_of(x):
        for some in batches(n):
            stem_kernel[cdiv(ho * wo, tile["m"]), len(lines[some])](
                x[some],
                weight.contiguous(),
                bias.contiguous(),
                bias if norm is None else norm,
                lines[some],
                *x.stride(),
                h,
                w,
                ho,
                wo,
                COUT=cout,
                RELU6=relu6,
                BYTES=norm is not None,
                TF32=tf32,
                M=tile["m"],
                N=columns(cout),
                num_warps=tile["warps"],
            )
    return out


def columns(cout: int) -> int:
    """Channels of the kernel's tile: a power of two that holds them all."""
    return max(DOT, next_power_of_2(cout))


def traffic(shape: Sequence[int], cout: int, item: int, tile: Tile, *, from_bytes: bool = False) -> int:
    """Bytes that `stem` reads and writes for x [N, 3, H, W] of any strides, `item` a number of the weight.

    The unique addresses of each program, weights included, summed over programs. L2 serves a part.
    """
    n, _, h, w = shape
    ho, wo = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    starts = range(0, ho * wo, tile["m"])
    pixels = sum(pixels_under(at, min(at + tile["m"], ho * wo), ho, wo, h, w, 2) for at in starts)
    weights = len(starts) * (28 * cout * item + (24 if from_bytes else 0))
    return n * (3 * pixels * (1 if from_bytes else item) + weights + ho * wo * cout * item)


def compile_arguments(
    cout: int,
    dtype: torch.dtype,
    tile: Tile,
    *,
    relu6: bool = True,
    from_bytes: bool = False,
    tf32: bool = False,
) -> dict[str, str | int | bool]:
    """The kernel's arguments as `aot.compile_for` takes them."""
    pointers = dict.fromkeys(("x", "weight", "bias", "norm", "out"), POINTERS[dtype]) | {"norm": "*fp32"}
    pointers |= {"x": "*u8"} if from_bytes else {}
    steps = dict.fromkeys(("image_step", "channel_step", "row_step", "column_step"), "i32")
    sizes = dict.fromkeys(("h", "w", "ho", "wo"), "i32")
    constants = {"COUT": cout, "RELU6": relu6, "BYTES": from_bytes, "TF32": tf32}
    return {**pointers, **steps, **sizes, **constants, "M": tile["m"], "N": columns(cout)}


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, relu6: bool, norm: torch.Tensor | None = None
) -> torch.Tensor:
    """The float64 twin of `stem`: same arguments, [N, Cout, HO, WO] float64."""
    wide = x.double()
    if norm is not None:
        scale, shift = norm.double()[:, None, :, None, None]
        wide = wide * scale + shift
    y = F.conv2d(wide, weight.double(), bias.double(), 2, 1)
    return y.clamp(0, 6) if relu6 else y


def tolerance(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    want: torch.Tensor,
    norm: torch.Tensor | None = None,
    tf32: bool = False,
) -> torch.Tensor:
    """How far `stem` may be from `want`, its float64 twin's answer: [N, Cout, HO, WO] float64.

    As `pointwise.tolerance` of 27 inputs; a byte's number is two roundings of float32 and one of the weight's
    dtype.
    """
    own, single = torch.finfo(weight.dtype), torch.finfo(torch.float32)
    sizes = None if norm is None else norm.abs()
    size = reference(x.abs() if norm is None else x, weight.abs(), bias.abs(), False, sizes)
    relative = 30 * single.eps + (2**-9 if tf32 else 0) + (0 if norm is None else own.eps / 2 + single.eps)
    bound = relative * size + own.eps / 2 * want.abs() + own.tiny * own.eps
    return bound.masked_fill(~size.isfinite(), 0)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norm: torch.Tensor | None) -> None:
    if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 1:
        raise ValueError(f"x must be [N, 3, H, W], at least 1x1, got {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1:] != (3, 3, 3) or bias.shape != weight.shape[:1]:
        raise ValueError(
            "weight must be [Cout, 3, 3, 3] and bias [Cout], "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if (too_large := limit(x.shape)) is not None:
        raise ValueError(too_large)
    wanted = weight.dtype if norm is None else torch.uint8
    if weight.dtype not in DTYPES or (x.dtype, bias.dtype) != (wanted, weight.dtype):
        raise ValueError(
            f"x must be {wanted} and bias as weight, one of {[str(d) for d in DTYPES]}, "
            f"got {x.dtype}, {bias.dtype} and {weight.dtype}"
        )
    if not x.device == weight.device == bias.device:
        raise ValueError(f"x, weight and bias are on {x.device}, {weight.device}, {bias.device}: use one")
    if norm is not None and (norm.shape != (2, 3) or norm.dtype != torch.float32 or norm.device != x.device):
        raise ValueError(f"norm must be float32 (2, 3) on {x.device}, got {norm.dtype} {tuple(norm.shape)}")
