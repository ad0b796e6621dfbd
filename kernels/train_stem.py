"""The network's first convolution in a training step, see `train_pointwise`: 3x3 of stride 2 from 3 channels.

As in `stem`, the 27 inputs of an output pixel are gathered into a row of 32 from images of any strides; their
product with the weight is the raw output, that of the gradient and them the weight's gradient.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import Tile, arithmetic, cdiv, device_of, tiles
from .norm import RawGradient, read_gradient, store_moments, with_tile
from .parts import add_parts, number_of_parts
from .train_pointwise import power

INPUTS = 27


@triton.jit
def _windows(x, steps, pixel, pixels, size, kind):
    """[M, 32] of type `kind`: the inputs of M output pixels of all images, in the order of the weight."""
    h, w, ho, wo = size
    k = tl.arange(0, 32)
    image, within = pixel // (ho * wo), pixel % (ho * wo)
    row = (2 * (within // wo) - 1)[:, None] + (k % 9 // 3)[None, :]
    column = (2 * (within % wo) - 1)[:, None] + (k % 3)[None, :]
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    inside = inside & (k < 27)[None, :] & (pixel < pixels)[:, None]
    # A view of a larger tensor may have any steps.
    at = (image * steps[0])[:, None] + ((k // 9).to(tl.int64) * steps[1])[None, :]
    at += row * steps[2] + column * steps[3]
    return tl.load(x + at, mask=inside, other=0).to(kind)


@triton.jit(do_not_specialize=["pixels"])
def forward_kernel(
    x,  # [N, 3, H, W] of any strides and type
    weight,  # [COUT, 3, 3, 3], of any type
    out,  # [N, HO, WO, COUT]
    parts,  # [P, 3, COUT] float32; not written without MOMENTS
    image_step,
    channel_step,
    row_step,
    column_step,
    pixels,
    h,
    w,
    ho,
    wo,
    COUT: tl.constexpr,
    MOMENTS: tl.constexpr,
    TF32: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program: all channels of one part of the output pixels, M at a time. All but x contiguous."""
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    kind: tl.constexpr = out.dtype.element_ty
    channel, k = tl.arange(0, N), tl.arange(0, 32)
    part, number = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    steps = (pixels.to(tl.int64) + M - 1) // M
    known = (k < 27)[:, None] & (channel < COUT)[None, :]
    taps = tl.load(weight + channel[None, :] * 27 + k[:, None], mask=known, other=0.0).to(kind)
    count = tl.zeros((N,), tl.float32)
    mean = tl.zeros((N,), tl.float32)
    spread = tl.zeros((N,), tl.float32)
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        pixel = step * M + tl.arange(0, M)
        strides = (image_step, channel_step, row_step, column_step)
        a = _windows(x, strides, pixel, pixels, (h, w, ho, wo), kind)
        stored = tl.dot(a, taps, input_precision=precision).to(kind)
        inside = (pixel < pixels)[:, None] & (channel < COUT)[None, :]
        tl.store(out + pixel[:, None] * COUT + channel[None, :], stored, mask=inside)
        if MOMENTS:
            count, mean, spread = with_tile(count, mean, spread, stored.to(tl.float32), pixel < pixels)
    if MOMENTS:
        store_moments(parts, part, channel, count, mean, spread, COUT)


@triton.jit(do_not_specialize=["pixels"])
def weight_gradient_kernel(
    g,  # [pixels, COUT]
    z,  # [pixels, COUT]; not read without MASK or BATCH
    z_values,  # [3, COUT] float32
    coefficients,  # [3, COUT] float32
    x,  # [N, 3, H, W] of any strides and type
    parts,  # [P, COUT, 27] float32
    image_step,
    channel_step,
    row_step,
    column_step,
    pixels,
    h,
    w,
    ho,
    wo,
    COUT: tl.constexpr,
    MASK: tl.constexpr,
    BATCH: tl.constexpr,
    TF32: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program: the gradient of the whole weight over one part of the output pixels, M at a time."""
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    kind: tl.constexpr = z.dtype.element_ty
    channel, k = tl.arange(0, N), tl.arange(0, 32)
    part, number = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    steps = (pixels.to(tl.int64) + M - 1) // M
    sums = tl.zeros((N, 32), tl.float32)
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        pixel = step * M + tl.arange(0, M)
        dz = read_gradient(
            g, z, 0.0, pixel, channel, pixels, z_values, coefficients, COUT, MASK, BATCH, False
        ).to(kind)
        strides = (image_step, channel_step, row_step, column_step)
        a = _windows(x, strides, pixel, pixels, (h, w, ho, wo), kind)
        sums = tl.dot(tl.trans(dz), a, sums, input_precision=precision)
    at = part * (COUT * 27) + channel[:, None] * 27 + k[None, :]
    tl.store(parts + at, sums, mask=(channel < COUT)[:, None] & (k < 27)[None, :])


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    *,
    moments: bool,
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The raw output of a 3x3 convolution of stride 2 with padding 1, and the moments of it.

    Args:
        x: [N, 3, H, W], float32, float16 or bfloat16, any strides; rounded to `dtype`, as the weight is.
        weight: [Cout, 3, 3, 3], contiguous, of any type.
        dtype: of the result.
        moments: are wanted.
        tf32: multiply float32 as TF32; in full precision otherwise.
        tile: a row of the tile table, instead of the one for this GPU.

    Returns:
        [N, HO, WO, Cout], sums in float32, rounded once; [P, 3, Cout] as `norm.normalize` takes them.
    """
    (n, _, h, w), cout = x.shape, weight.shape[0]
    ho, wo = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    z = torch.empty((n, ho, wo, cout), dtype=dtype, device=x.device)
    tile = _choose_tile(x.device, dtype, tf32) if tile is None else tile
    number = _number(x.device, n * ho * wo, tile)
    parts = torch.empty((number, 3, cout), dtype=torch.float32, device=x.device) if moments else None
    with torch.cuda.device_of(x):
        forward_kernel[number,](
            x,
            weight,
            z,
            z if parts is None else parts,
            *x.stride(),
            n * ho * wo,
            h,
            w,
            ho,
            wo,
            COUT=cout,
            MOMENTS=moments,
            TF32=tf32,
            M=tile["m"],
            N=power(cout),
            num_warps=tile["warps"],
        )
    return z, parts


def weight_gradient(
    of: RawGradient, x: torch.Tensor, *, tf32: bool = False, tile: Tile | None = None
) -> torch.Tensor:
    """The gradient of the weight of `forward`, [Cout, 3, 3, 3] float32, from that of the raw output."""
    (_, _, h, w), (n, ho, wo, cout) = x.shape, of.z.shape
    tile = _choose_tile(x.device, of.z.dtype, tf32) if tile is None else tile
    number = _number(x.device, n * ho * wo, tile)
    parts = torch.empty((number, cout, INPUTS), dtype=torch.float32, device=x.device)
    dw = torch.empty((cout, 3, 3, 3), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        weight_gradient_kernel[number,](
            of.g,
            of.z,
            of.values,
            of.coefficients,
            x,
            parts,
            *x.stride(),
            n * ho * wo,
            h,
            w,
            ho,
            wo,
            COUT=cout,
            MASK=of.mask,
            BATCH=of.batch,
            TF32=tf32,
            M=tile["m"],
            N=power(cout),
            num_warps=tile["warps"],
        )
        add_parts(parts, dw)
    return dw


def _choose_tile(device: torch.device, dtype: torch.dtype, tf32: bool) -> Tile:
    return tiles(device_of(device)[0], "train_stem")[arithmetic(dtype, tf32)]


def _number(device: torch.device, pixels: int, tile: Tile) -> int:
    return number_of_parts(cdiv(pixels, tile["m"]), 1, device_of(device)[1])
