"""Depthwise 3x3 + bias + ReLU6 + 1x1 convolution + bias + residual in one launch, for any GPU.

The depthwise result, as wide as the hidden channels, is never written: a program makes M pixels of it, K
channels at a time, and multiplies them on tensor cores with the 1x1 weight into the sums of N output
channels. Pixels are those of all images in a row. The nine taps are a real loop: unrolled, what is loaded
ahead for them takes up to 255 registers, and spills. "used" in the tile table says where it is faster than
two launches.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import depthwise, pointwise
from .common import (
    POINTERS,
    Tile,
    arithmetic,
    cdiv,
    channels_last,
    device_of,
    output,
    relu6,
    tiles,
)
from .depthwise import pixels_under


@triton.jit(do_not_specialize=["pixels"])  # one binary for every batch
def depthwise_project_kernel(
    x,  # [N, H, W, C]
    taps,  # [9, C], row 3 * ky + kx
    shift,  # [C]
    weight,  # [COUT, C]
    bias,  # [COUT]
    residual,  # [pixels, COUT]; not read without RESIDUAL
    out,  # [pixels, COUT], of N x HO x WO pixels
    pixels,
    h,
    w,
    ho,
    wo,
    C: tl.constexpr,
    COUT: tl.constexpr,
    STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TF32: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One program: M pixels of N output channels. All arrays contiguous, padding 1."""
    runs: tl.constexpr = (COUT + N - 1) // N
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    program = tl.program_id(0)
    channel = program % runs * N + tl.arange(0, N)
    # Pixels are counted with 64 bits, from the image of the program's first one on with 32.
    start = (program // runs).to(tl.int64) * M
    pixel = start + tl.arange(0, M)
    first_image = start // (ho * wo)
    local = (start - first_image * ho * wo).to(tl.int32) + tl.arange(0, M)
    row = local // wo % ho * STRIDE - 1
    column = local % wo * STRIDE - 1
    image = first_image + local // (ho * wo)
    window = ((image * h + row) * w + column) * C
    there = pixel < pixels
    sums = tl.zeros((M, N), tl.float32)
    for first in tl.range(0, C, K):
        k = first + tl.arange(0, K)
        known = k < C
        hidden = tl.zeros((M, K), tl.float32)
        for tap in tl.range(0, 9):
            y, z = tap // 3, tap % 3
            inside = there & (row + y >= 0) & (row + y < h) & (column + z >= 0) & (column + z < w)
            values = tl.load(
                x + (window + (y * w + z) * C)[:, None] + k[None, :],
                mask=inside[:, None] & known[None, :],
                other=0.0,
            )
            factors = tl.load(taps + tap * C + k, mask=known, other=0.0)
            hidden += values.to(tl.float32) * factors.to(tl.float32)[None, :]
        hidden = relu6(hidden + tl.load(shift + k, mask=known, other=0.0).to(tl.float32)[None, :])
        b = tl.load(
            weight + channel[None, :] * C + k[:, None],
            mask=known[:, None] & (channel < COUT)[None, :],
            other=0.0,
        )
        sums = tl.dot(hidden.to(x.dtype.element_ty), b, sums, input_precision=precision)
    sums += tl.load(bias + channel, mask=channel < COUT, other=0.0).to(tl.float32)[None, :]
    at = pixel[:, None] * COUT + channel[None, :]
    inside = there[:, None] & (channel < COUT)[None, :]
    if RESIDUAL:
        sums += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


Layer = tuple[torch.Tensor, torch.Tensor]


def depthwise_project(
    x: torch.Tensor,
    spread: Layer,
    project: Layer,
    stride: int,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    tf32: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """1x1 convolution of ReLU6(depthwise 3x3 convolution of x, padding 1, + bias) + bias + residual.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, any strides; copied unless channels_last.
        spread: weight [C, 1, 3, 3] and bias [C] of the depthwise convolution, batch norm folded, of x's dtype
            and device; the weight is copied unless from `depthwise.pack_weight`.
        project: weight [Cout, C, 1, 1] and bias [Cout], likewise.
        stride: 1 or 2, of the depthwise convolution.
        residual: [N, Cout, HO, WO], likewise, any strides; None for none; copied unless channels_last.
        out: [N, Cout, HO, WO], channels_last, filled and returned where it is given.
        tf32: multiply float32 as TF32, with 10 bits of mantissa, in the 1x1 convolution; else in full.
        tile: a row of the tile table, instead of the one for this GPU and size.

    Returns:
        [N, Cout, (H - 1) // stride + 1, (W - 1) // stride + 1], channels_last. Sums are float32; the
        depthwise result is rounded to x's dtype, as between two launches, and the result once more.

    Raises:
        ValueError: shapes, dtypes, devices or stride do not fit together, or x is too large (see
            `depthwise.limit`).
    """
    (factors, shift), (weight, bias) = spread, project
    depthwise._check(x, factors, shift, stride)
    pointwise._check(x[:, :, ::stride, ::stride], weight, bias, residual)
    (n, c, h, w), cout = x.shape, len(weight)
    ho, wo = (h - 1) // stride + 1, (w - 1) // stride + 1
    out, lines = output(out, (n, cout, ho, wo), x)
    if not out.numel():
        return out
    pixels = n * ho * wo
    if tile is None:
        tile = choose_tile(x.device, pixels, c, cout, arithmetic(x.dtype, tf32))
    tile = pointwise.fit(tile, c, cout)
    with torch.cuda.device_of(x):
        depthwise_project_kernel[pointwise.programs(pixels, cout, tile),](
            channels_last(x),
            factors.permute(2, 3, 1, 0).contiguous(),
            shift.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            x if residual is None else channels_last(residual),
            lines,
            pixels,
            h,
            w,
            ho,
            wo,
            C=c,
            COUT=cout,
            STRIDE=stride,
            RESIDUAL=residual is not None,
            TF32=tf32,
            M=tile["m"],
            N=tile["n"],
            K=tile["k"],
            num_warps=tile["warps"],
            num_stages=tile["stages"],
        )
    return out


def choose_tile(device: torch.device, pixels: int, c: int, cout: int, kind: str) -> Tile:
    """The table's tile for products of `kind`, see `common.arithmetic`: "large", or "small" where large ones
    would leave the GPU idle.
    """
    name, units = device_of(device)
    large = row(name, f"large_{kind}", c, cout)
    if pointwise.programs(pixels, cout, large) >= 4 * units:
        return large
    return row(name, f"small_{kind}", c, cout)


def row(device_name: str, size: str, c: int, cout: int) -> Tile:
    """A tile of the table: the one for these channels, such as "large_half_192x32", where it has one."""
    table = tiles(device_name, "depthwise_project")
    return pointwise.fit(table.get(f"{size}_{c}x{cout}", table[size]), c, cout)


def used(device: torch.device, pixels: int, c: int, cout: int, kind: str) -> bool:
    """Whether the table has one launch for so many pixels of the result; arguments as `choose_tile`."""
    return bool(choose_tile(device, pixels, c, cout, kind)["used"])


def traffic(
    shape: Sequence[int], cout: int, stride: int, item: int, tile: Tile, *, residual: bool = False
) -> int:
    """Bytes that `depthwise_project` reads and writes for x [N, C, H, W], `item` a number, with a tile that
    `pointwise.fit` has made.

    The unique addresses of each program, weights included, summed over programs. L2 serves a part.
    """
    n, c, h, w = shape
    ho, wo = (h - 1) // stride + 1, (w - 1) // stride + 1
    pixels, runs = n * ho * wo, cdiv(cout, tile["n"])
    read = 0
    for start in range(0, pixels, tile["m"]):
        first = start % (ho * wo)
        read += pixels_under(first, first + min(tile["m"], pixels - start), ho, wo, h, w, stride)
    weights = cdiv(pixels, tile["m"]) * (10 * c * runs + (c + 1) * cout)
    return (read * c * runs + weights + pixels * cout * (2 if residual else 1)) * item


def compile_arguments(
    c: int,
    cout: int,
    stride: int,
    dtype: torch.dtype,
    tile: Tile,
    *,
    residual: bool = False,
    tf32: bool = False,
) -> dict[str, str | int | bool]:
    """The kernel's arguments as `aot.compile_for` takes them."""
    tile = pointwise.fit(tile, c, cout)
    names = ("x", "taps", "shift", "weight", "bias", "residual", "out")
    sizes = dict.fromkeys(("pixels", "h", "w", "ho", "wo"), "i32")
    constants = {"C": c, "COUT": cout, "STRIDE": stride, "RESIDUAL": residual, "TF32": tf32}
    constants |= {"M": tile["m"], "N": tile["n"], "K": tile["k"]}
    return {**dict.fromkeys(names, POINTERS[dtype]), **sizes, **constants}


def reference(
    x: torch.Tensor, spread: Layer, project: Layer, stride: int, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The float64 twin of `depthwise_project`: same arguments, [N, Cout, HO, WO] float64."""
    return pointwise.reference(depthwise.reference(x, *spread, stride, True), *project, residual)


def tolerance(
    x: torch.Tensor,
    spread: Layer,
    project: Layer,
    stride: int,
    residual: torch.Tensor | None,
    want: torch.Tensor,
    tf32: bool = False,
) -> torch.Tensor:
    """How far `depthwise_project` may be from `want`, its float64 twin's answer: [N, Cout, HO, WO] float64.

    What the depthwise result may be off (`depthwise.tolerance`) weighs as much as the 1x1 weights; that
    product's own errors are those of `pointwise.tolerance`.
    """
    hidden = depthwise.reference(x, *spread, stride, True)
    off = depthwise.tolerance(x, *spread, stride, hidden)
    (weight, bias), own = project, torch.finfo(x.dtype)
    added = None if residual is None else residual.abs()
    size = pointwise.reference(hidden + off, weight.abs(), bias.abs(), added)
    relative = (x.shape[1] + 3) * torch.finfo(torch.float32).eps + (2**-9 if tf32 else 0)
    bound = relative * size + own.eps / 2 * want.abs() + own.tiny * own.eps
    return (bound + pointwise.reference(off, weight.abs())).masked_fill(~size.isfinite(), 0)
