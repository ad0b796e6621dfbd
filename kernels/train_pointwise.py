"""1x1 convolution in a training step: raw outputs in and out, batch norm applied and measured on the way.

The norm and ReLU6 of the layer before are applied to its raw output as that is read, and the moments of what
is written are found from the registers (`norm`). So a layer reads and writes what a convolution alone would.
Its gradients are in `train_pointwise_gradient`. Programs take shares of the pixels and loop, so that sums
over pixels leave one part a program: no atomics, the bits are the same every time.
"""

# Triton's language is not Python's: arguments carry no annotations.
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from .common import Tile, arithmetic, cdiv, device_of, next_power_of_2, tiles
from .norm import Applied, normalized, store_moments, three, with_tile
from .parts import number_of_parts
from .pointwise import DOT


@triton.jit
def read_applied(
    x, pixel, channel, pixels, values, C: tl.constexpr, NORM: tl.constexpr, RELU6: tl.constexpr, kind
):
    """[pixels, channels] of what a convolution multiplies, of type `kind`; zero outside."""
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    a = tl.load(x + pixel[:, None] * C + channel[None, :], mask=inside, other=0.0)
    if NORM:
        mean, scale, shift = three(values, channel, C)
        a = normalized(a.to(tl.float32), mean[None, :], scale[None, :], shift[None, :], RELU6)
        a = tl.where(inside, a, 0.0)
    return a.to(kind)


@triton.jit
def read_weight(weight, o, i, CIN: tl.constexpr, COUT: tl.constexpr, kind):
    """[output channels, input channels] of a weight, of type `kind`; zero outside."""
    known = (o < COUT)[:, None] & (i < CIN)[None, :]
    return tl.load(weight + o[:, None] * CIN + i[None, :], mask=known, other=0.0).to(kind)


@triton.jit(do_not_specialize=["pixels"])
def forward_kernel(
    x,  # [pixels, CIN]
    x_values,  # [3, CIN] float32, the norm of x; not read without NORM
    weight,  # [COUT, CIN], of any type
    out,  # [pixels, COUT]
    parts,  # [P, 3, COUT] float32; not written without MOMENTS
    pixels,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    NORM: tl.constexpr,
    RELU6: tl.constexpr,
    MOMENTS: tl.constexpr,
    TF32: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One program: N output channels of one part of the pixels, M at a time. All arrays contiguous."""
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    kind: tl.constexpr = x.dtype.element_ty
    channel = tl.program_id(0) * N + tl.arange(0, N)
    part, number = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    steps = (pixels.to(tl.int64) + M - 1) // M
    count = tl.zeros((N,), tl.float32)
    mean = tl.zeros((N,), tl.float32)
    spread = tl.zeros((N,), tl.float32)
    # A weight that is one step deep is read once, not for every M pixels.
    held = read_weight(weight, channel, tl.arange(0, K), CIN, COUT, kind)
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        pixel = step * M + tl.arange(0, M)
        sums = tl.zeros((M, N), tl.float32)
        for first in tl.range(0, CIN, K):
            k = first + tl.arange(0, K)
            a = read_applied(x, pixel, k, pixels, x_values, CIN, NORM, RELU6, kind)
            b = held if CIN <= K else read_weight(weight, channel, k, CIN, COUT, kind)
            sums = tl.dot(a, tl.trans(b), sums, input_precision=precision)
        stored = sums.to(kind)
        inside = (pixel < pixels)[:, None] & (channel < COUT)[None, :]
        tl.store(out + pixel[:, None] * COUT + channel[None, :], stored, mask=inside)
        if MOMENTS:
            # Of what the next layer will read, so after rounding.
            z = stored.to(tl.float32)
            count, mean, spread = with_tile(count, mean, spread, z, pixel < pixels)
    if MOMENTS:
        store_moments(parts, part, channel, count, mean, spread, COUT)


def forward(
    x: torch.Tensor,
    norm: Applied | None,
    weight: torch.Tensor,
    *,
    moments: bool,
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The raw output of a 1x1 convolution, and the moments of it.

    Args:
        x: [N, H, W, Cin], float32, float16 or bfloat16, contiguous.
        norm: applied to x first; None for none.
        weight: [Cout, Cin, 1, 1], contiguous, float32 or x's dtype; rounded to that.
        moments: are wanted.
        tf32: multiply float32 as TF32; in full precision otherwise.
        tile: a row of the tile table, instead of the one for this GPU.

    Returns:
        [N, H, W, Cout] of x's dtype, sums in float32, rounded once; [P, 3, Cout] as `norm.normalize` takes
        them.
    """
    cin, cout = x.shape[-1], weight.shape[0]
    pixels = x.numel() // cin
    z = torch.empty((*x.shape[:-1], cout), dtype=x.dtype, device=x.device)
    name, units = device_of(x.device)
    if tile is None:
        tile = choose_tile(name, arithmetic(x.dtype, tf32), cin, cout)
    tile = fit(tile, cout, cin)
    runs = cdiv(cout, tile["n"])
    number = number_of_shares(
        pixels,
        tile["m"],
        runs,
        units,
        weight.numel() * weight.element_size() / ((cin + cout) * x.element_size()),
    )
    parts = torch.empty((number, 3, cout), dtype=torch.float32, device=x.device) if moments else None
    with torch.cuda.device_of(x):
        forward_kernel[runs, number](
            x,
            x if norm is None else norm.values,
            weight,
            z,
            z if parts is None else parts,
            pixels,
            CIN=cin,
            COUT=cout,
            NORM=norm is not None,
            RELU6=norm is not None and norm.relu6,
            MOMENTS=moments,
            TF32=tf32,
            M=tile["m"],
            N=tile["n"],
            K=tile["k"],
            num_warps=tile["warps"],
            num_stages=tile["stages"],
        )
    return z, parts


def choose_tile(device_name: str, kind: str, cin: int, cout: int) -> Tile:
    """The table's tile for `forward`."""
    return row(tiles(device_name, "train_pointwise"), f"forward_{kind}", cin, cout, cout)


def number_of_shares(pixels: int, rows: int, programs: int, units: int, fixed: float) -> int:
    """Parts that the pixels are cut into, `rows` of them a step, for so many programs each.

    As `number_of_parts` has it, but fewer, down to one program a unit, where what each part moves, as much as
    `fixed` pixels, would be more than a sixteenth of the rest.
    """
    number = number_of_parts(cdiv(pixels, rows), programs, units)
    enough = max(int(pixels / (16 * fixed)), cdiv(units, programs))
    return min(number, enough)


def power(channels: int) -> int:
    """So many channels as a dimension of `tl.dot`."""
    return max(DOT, next_power_of_2(channels))


def fit(tile: Tile, n: int, k: int) -> Tile:
    """A tile of the table without what lies past n and k channels."""
    return {**tile, "n": min(tile["n"], power(n)), "k": min(tile["k"], power(k))}


def row(table: Mapping[str, Tile], name: str, cin: int, cout: int, n: int = 0) -> Tile:
    """A tile of the table; for n channels of a result, more than that has, the "wide" one.

    The one for just these channels, such as "weight_half_160x960", where there is one.
    """
    if n > table[name].get("n", n):
        name = name.replace("_", "_wide_")
    return table.get(f"{name}_{cin}x{cout}", table[name])
