"""Batch norm around raw convolution outputs: its moments, how it is applied, and its gradients.

A training step keeps raw outputs z only. What follows one is read as act((z - mean) * scale + shift), where
it is read. The moments come from the convolution that wrote z: each program finds count, mean and the sum of
squared distances from the mean of what it wrote, and `normalize` puts these together in float64 (Chan, Golub,
LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979). No sum of squares
is ever taken about zero, so that a mean far from it costs no digits. Nothing is atomic: the bits are the same
every time.

The gradient of z is linear in what is known pixel by pixel: dz = of_g * g + of_z * (z - mean) + constant,
where g is the gradient of what follows the norm, masked by its ReLU6.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import Tile, cdiv, device_of, next_power_of_2, relu6, tiles
from .parts import number_of_parts

# Channels of a program that puts parts together (a sector of memory), and parts that it reads at once.
CHANNELS, ROWS = 8, 128
WARPS = 8


class Applied(NamedTuple):
    """How a raw output is read: `values` from `normalize`, [3, C] float32, and whether ReLU6 follows."""

    values: torch.Tensor
    relu6: bool


class RawGradient(NamedTuple):
    """The gradient of a raw output, unmade.

    `g`: of what follows its norm, [N, H, W, C] as `z`. `values`: the norm. `coefficients`: [3, C] float32,
    from `norm_gradient`. `mask`: ReLU6 is yet to be applied to g. `batch`: the norm took the batch's moments.
    """

    g: torch.Tensor
    z: torch.Tensor
    values: torch.Tensor
    coefficients: torch.Tensor
    mask: bool
    batch: bool

    @property
    def may_remake(self) -> bool:
        """Whether z, as a convolution makes it again, serves as well: rounding decides no mask."""
        return self.batch and not self.mask


@triton.jit
def merged(count, mean, spread, more, distance, spread_of_more):
    """Count, mean and sum of squared distances from it of two sets of values together.

    `distance`: the second one's mean less the first one's.
    """
    total = count + more
    share = more / tl.where(total > 0, total, 1.0)
    return total, mean + distance * share, spread + spread_of_more + distance * distance * count * share


@triton.jit
def with_tile(count, mean, spread, z, valid):
    """Moments [N] together with those of a tile z [M, N], whose rows that are not `valid` [M] are zero."""
    some = tl.sum(valid.to(tl.float32), 0)
    middle = tl.sum(z, 0) / some
    distance = tl.where(valid[:, None], z - middle[None, :], 0.0)
    return merged(count, mean, spread, some, middle - mean, tl.sum(distance * distance, 0))


@triton.jit
def lanes_together(count, mean, spread):
    """Moments [N] of what the lanes of a program have, [lanes, N]."""
    total = tl.sum(count, 0)
    middle = tl.sum(count * mean, 0) / tl.where(total > 0, total, 1.0)
    distance = mean - middle[None, :]
    return total, middle, tl.sum(spread + count * distance * distance, 0)


@triton.jit
def store_moments(parts, part, channel, count, mean, spread, C: tl.constexpr):
    """Store moments [N] of some channels as one part of [P, 3, C]."""
    at = parts + part * (3 * C) + channel
    tl.store(at, count, mask=channel < C)
    tl.store(at + C, mean, mask=channel < C)
    tl.store(at + 2 * C, spread, mask=channel < C)


@triton.jit
def store_sums(parts, part, channel, total, product, C: tl.constexpr):
    """Store the two sums [N] that `norm_gradient_kernel` takes of some channels as one part of [P, 2, C]."""
    at = parts + part * (2 * C) + channel
    tl.store(at, total, mask=channel < C)
    tl.store(at + C, product, mask=channel < C)


@triton.jit
def normalized(z, mean, scale, shift, RELU6: tl.constexpr):
    """What follows a raw output in float32."""
    y = (z - mean) * scale + shift
    if RELU6:
        y = relu6(y)
    return y


@triton.jit
def masked(g, z, mean, scale, shift):
    """The gradient g of what follows a norm with ReLU6, 0 where ReLU6 is flat; NaN passes as in torch."""
    y = (z - mean) * scale + shift
    return tl.where((y <= 0) | (y >= 6), 0.0, g)


@triton.jit
def raw_gradient(g, z, norm, coefficients, MASK: tl.constexpr, BATCH: tl.constexpr):
    """The gradient of z in float32.

    `norm`: mean, scale and shift. `coefficients`: of g, of z less its mean, and the constant. `BATCH`: the
    norm took the batch's moments, without which z matters to the mask alone.
    """
    mean, scale, shift = norm
    of_g, of_z, constant = coefficients
    if MASK:
        g = masked(g, z, mean, scale, shift)
    dz = of_g * g
    if BATCH:
        dz += of_z * (z - mean) + constant
    return dz


@triton.jit
def three(rows, channel, C: tl.constexpr):
    """The three rows of a [3, C] array at some channels, zero past C."""
    known = channel < C
    return (
        tl.load(rows + channel, mask=known, other=0.0),
        tl.load(rows + C + channel, mask=known, other=0.0),
        tl.load(rows + 2 * C + channel, mask=known, other=0.0),
    )


@triton.jit
def gradient_rows(values, coefficients, channel, C: tl.constexpr, MASK: tl.constexpr, BATCH: tl.constexpr):
    """Norm and coefficients of some channels as `raw_gradient` takes them, [1, channels], those it reads."""
    known = channel < C
    none = tl.zeros_like(channel).to(tl.float32)
    mean, scale, shift, of_z, constant = none, none, none, none, none
    of_g = tl.load(coefficients + channel, mask=known, other=0.0)
    if MASK:
        mean, scale, shift = three(values, channel, C)
    elif BATCH:
        mean = tl.load(values + channel, mask=known, other=0.0)
    if BATCH:
        of_z = tl.load(coefficients + C + channel, mask=known, other=0.0)
        constant = tl.load(coefficients + 2 * C + channel, mask=known, other=0.0)
    norm = (mean[None, :], scale[None, :], shift[None, :])
    return norm, (of_g[None, :], of_z[None, :], constant[None, :])


@triton.jit
def read_gradient(
    g,
    z,
    remade,
    pixel,
    channel,
    pixels,
    values,
    coefficients,
    C: tl.constexpr,
    MASK: tl.constexpr,
    BATCH: tl.constexpr,
    REMADE: tl.constexpr,
):
    """[pixels, channels] of the gradient of a raw output, float32; zero outside. z is `remade`, or read."""
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    at = pixel[:, None] * C + channel[None, :]
    gradient = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    raw = gradient
    if REMADE:
        raw = remade
    elif MASK or BATCH:
        raw = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    norm, rows = gradient_rows(values, coefficients, channel, C, MASK, BATCH)
    return tl.where(inside, raw_gradient(gradient, raw, norm, rows, MASK, BATCH), 0.0)


@triton.jit(do_not_specialize=["number"])
def normalize_kernel(
    parts,  # [number, 3, C] float32, count, mean and spread; not read where GIVEN
    number,
    mean,  # [C] float32, read where GIVEN, moved by `share` else where MOVE
    var,  # likewise
    share,  # float32
    gamma,  # [C] float32; not read without AFFINE
    beta,  # likewise
    moments,  # [2, C] float64: mean and biased variance
    values,  # [3, C] float32: mean, scale and shift
    C: tl.constexpr,
    EPS: tl.constexpr,
    GIVEN: tl.constexpr,
    MOVE: tl.constexpr,
    AFFINE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: the norm of CHANNELS channels. All arrays contiguous."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < C
    if GIVEN:
        middle = tl.load(mean + channel, mask=known, other=0.0).to(tl.float64)
        biased = tl.load(var + channel, mask=known, other=1.0).to(tl.float64)
    else:
        count = tl.zeros((ROWS, CHANNELS), tl.float64)
        means, spreads = count, count
        for first in tl.range(0, number, ROWS):
            part = first + tl.arange(0, ROWS)
            at = parts + part[:, None] * (3 * C) + channel[None, :]
            inside = (part < number)[:, None] & known[None, :]
            more = tl.load(at, mask=inside, other=0.0).to(tl.float64)
            mean_of_more = tl.load(at + C, mask=inside, other=0.0).to(tl.float64)
            spread_of_more = tl.load(at + 2 * C, mask=inside, other=0.0).to(tl.float64)
            count, means, spreads = merged(count, means, spreads, more, mean_of_more - means, spread_of_more)
        pixels, middle, spread = lanes_together(count, means, spreads)
        biased = spread / tl.where(known, pixels, 1.0)
        if MOVE:
            held = tl.load(mean + channel, mask=known, other=0.0)
            tl.store(mean + channel, (held + share * (middle - held)).to(tl.float32), mask=known)
            held = tl.load(var + channel, mask=known, other=0.0)
            unbiased = spread / tl.where(known, pixels - 1, 1.0)
            tl.store(var + channel, (held + share * (unbiased - held)).to(tl.float32), mask=known)
    scale = 1 / tl.sqrt(biased + EPS)
    shift = tl.zeros((CHANNELS,), tl.float32)
    if AFFINE:
        scale *= tl.load(gamma + channel, mask=known, other=0.0)
        shift = tl.load(beta + channel, mask=known, other=0.0)
    tl.store(moments + channel, middle, mask=known)
    tl.store(moments + C + channel, biased, mask=known)
    tl.store(values + channel, middle.to(tl.float32), mask=known)
    tl.store(values + C + channel, scale.to(tl.float32), mask=known)
    tl.store(values + 2 * C + channel, shift, mask=known)


@triton.jit(do_not_specialize=["number"])
def norm_gradient_kernel(
    parts,  # [number, 2, C] float32: sums of g and of g * (z - mean)
    number,
    pixels,  # float32; not read without BATCH
    moments,  # [2, C] float64
    gamma,  # [C] float32; not read without AFFINE
    coefficients,  # [3, C] float32
    affine,  # [2, C] float32: gradients of gamma and beta
    C: tl.constexpr,
    EPS: tl.constexpr,
    BATCH: tl.constexpr,
    AFFINE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: CHANNELS channels. All arrays contiguous."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < C
    totals = tl.zeros((ROWS, CHANNELS), tl.float64)
    products = totals
    for first in tl.range(0, number, ROWS):
        part = first + tl.arange(0, ROWS)
        at = parts + part[:, None] * (2 * C) + channel[None, :]
        inside = (part < number)[:, None] & known[None, :]
        totals += tl.load(at, mask=inside, other=0.0).to(tl.float64)
        products += tl.load(at + C, mask=inside, other=0.0).to(tl.float64)
    total, product = tl.sum(totals, 0), tl.sum(products, 0)
    inverse = 1 / tl.sqrt(tl.load(moments + C + channel, mask=known, other=1.0) + EPS)
    of_g = inverse
    if AFFINE:
        of_g *= tl.load(gamma + channel, mask=known, other=0.0)
    of_z = tl.zeros((CHANNELS,), tl.float64)
    constant = tl.zeros((CHANNELS,), tl.float64)
    if BATCH:
        share = of_g / pixels
        of_z = -share * inverse * inverse * product
        constant = -share * total
    tl.store(coefficients + channel, of_g.to(tl.float32), mask=known)
    tl.store(coefficients + C + channel, of_z.to(tl.float32), mask=known)
    tl.store(coefficients + 2 * C + channel, constant.to(tl.float32), mask=known)
    tl.store(affine + channel, (product * inverse).to(tl.float32), mask=known)
    tl.store(affine + C + channel, total.to(tl.float32), mask=known)


@triton.jit(do_not_specialize=["pixels"])
def sums_kernel(
    g,  # [pixels, C]
    z,  # [pixels, C]
    values,  # [3, C] float32
    parts,  # [P, 2, C] float32
    pixels,
    C: tl.constexpr,
    RELU6: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program: the sums of `norm_gradient_kernel` of N channels over one part of the pixels."""
    channel = tl.program_id(0) * N + tl.arange(0, N)
    part, number = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    mean, scale, shift = three(values, channel, C)
    total = tl.zeros((N,), tl.float32)
    product = tl.zeros((N,), tl.float32)
    steps = (pixels.to(tl.int64) + M - 1) // M
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        pixel = step * M + tl.arange(0, M)
        at = pixel[:, None] * C + channel[None, :]
        inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
        gradient = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        raw = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        if RELU6:
            gradient = masked(gradient, raw, mean[None, :], scale[None, :], shift[None, :])
        total += tl.sum(gradient, 0)
        product += tl.sum(gradient * (raw - mean[None, :]), 0)
    store_sums(parts, part, channel, total, product, C)


@triton.jit(do_not_specialize=["pixels"])
def activate_kernel(
    z,  # [pixels, C]
    values,  # [3, C] float32
    residual,  # [pixels, C]; not read without RESIDUAL
    out,  # [pixels, C]
    pixels,
    C: tl.constexpr,
    RELU6: tl.constexpr,
    RESIDUAL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program: M pixels of N channels of act(norm(z)) + residual."""
    channel = tl.program_id(1) * N + tl.arange(0, N)
    pixel = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    mean, scale, shift = three(values, channel, C)
    at = pixel[:, None] * C + channel[None, :]
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    raw = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    y = normalized(raw, mean[None, :], scale[None, :], shift[None, :], RELU6)
    if RESIDUAL:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def normalize(
    parts: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    *,
    running: tuple[torch.Tensor, torch.Tensor] | None = None,
    share: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of a raw output from its moments.

    Args:
        parts: [P, 3, C] float32, count, mean and sum of squared distances from it, of P sets of pixels.
        gamma, beta: [C] float32, contiguous; None for ones and zeros.
        eps: added to the variance.
        running: mean and variance [C] float32, contiguous, moved in place by `share` towards the batch's,
            whose variance is the unbiased one there.

    Returns:
        [2, C] float64, mean and biased variance, and [3, C] float32, mean, scale and shift.
    """
    number, _, c = parts.shape
    return _normalize(parts, number, running, share, gamma, beta, eps, c)


def normalize_running(
    mean: torch.Tensor, var: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `normalize`, of moments that are known: mean and variance, [C] float32, contiguous."""
    return _normalize(None, 0, (mean, var), None, gamma, beta, eps, len(mean))


def _normalize(
    parts: torch.Tensor | None,
    number: int,
    running: tuple[torch.Tensor, torch.Tensor] | None,
    share: float | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    c: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    held = parts if running is None else running[0]
    assert held is not None
    moments = torch.empty((2, c), dtype=torch.float64, device=held.device)
    values = torch.empty((3, c), dtype=torch.float32, device=held.device)
    mean, var = (values, values) if running is None else running
    with torch.cuda.device_of(held):
        normalize_kernel[cdiv(c, CHANNELS),](
            values if parts is None else parts,
            number,
            mean,
            var,
            share or 0.0,
            values if gamma is None else gamma,
            values if beta is None else beta,
            moments,
            values,
            C=c,
            EPS=eps,
            GIVEN=parts is None,
            MOVE=share is not None,
            AFFINE=gamma is not None,
            CHANNELS=CHANNELS,
            ROWS=ROWS,
            num_warps=WARPS,
        )
    return moments, values


def norm_gradient(
    parts: torch.Tensor, moments: torch.Tensor, gamma: torch.Tensor | None, pixels: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What turns the gradient of what follows a norm into that of the raw output.

    Args:
        parts: [P, 2, C] float32, sums of g and of g * (z - mean) over P sets of pixels.
        moments: from `normalize`.
        gamma: as it was there.
        pixels: the moments are those of; 0 where they are not the batch's.
        eps: as it was there.

    Returns:
        Coefficients [3, C] and gradients of gamma and beta [2, C], float32.
    """
    number, _, c = parts.shape
    coefficients = torch.empty((3, c), dtype=torch.float32, device=parts.device)
    affine = torch.empty((2, c), dtype=torch.float32, device=parts.device)
    with torch.cuda.device_of(parts):
        norm_gradient_kernel[cdiv(c, CHANNELS),](
            parts,
            number,
            float(pixels),
            moments,
            coefficients if gamma is None else gamma,
            coefficients,
            affine,
            C=c,
            EPS=eps,
            BATCH=pixels > 0,
            AFFINE=gamma is not None,
            CHANNELS=CHANNELS,
            ROWS=ROWS,
            num_warps=WARPS,
        )
    return coefficients, affine


def sums(g: torch.Tensor, z: torch.Tensor, values: torch.Tensor, relu6: bool) -> torch.Tensor:
    """Sums over pixels of g, masked by the ReLU6 of the norm, and of g * (z - mean), as `norm_gradient` takes
    them.

    Args:
        g: [N, H, W, C], the gradient of what follows the norm.
        z: the raw output, likewise.
        values: [3, C] float32, the norm.
        relu6: follows.

    Returns:
        [P, 2, C] float32.
    """
    c = z.shape[-1]
    pixels = z.numel() // c
    name, units = device_of(z.device)
    tile = fit(tiles(name, "norm")["sums"], c)
    runs = cdiv(c, tile["n"])
    number = number_of_parts(cdiv(pixels, tile["m"]), runs, units)
    parts = torch.empty((number, 2, c), dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        sums_kernel[runs, number](
            g, z, values, parts, pixels, C=c, RELU6=relu6, M=tile["m"], N=tile["n"], num_warps=tile["warps"]
        )
    return parts


def activate(
    z: torch.Tensor, values: torch.Tensor, relu6: bool, residual: torch.Tensor | None
) -> torch.Tensor:
    """act(norm(z)) + residual, [N, H, W, C] of z's dtype; arguments as `sums` has them."""
    c = z.shape[-1]
    pixels = z.numel() // c
    out = torch.empty_like(z)
    tile = fit(tiles(device_of(z.device)[0], "norm")["activate"], c)
    with torch.cuda.device_of(z):
        activate_kernel[cdiv(pixels, tile["m"]), cdiv(c, tile["n"])](
            z,
            values,
            z if residual is None else residual,
            out,
            pixels,
            C=c,
            RELU6=relu6,
            RESIDUAL=residual is not None,
            M=tile["m"],
            N=tile["n"],
            num_warps=tile["warps"],
        )
    return out


def fit(tile: Tile, c: int) -> Tile:
    """A tile of the table without what lies past the channels."""
    return {**tile, "n": min(tile["n"], next_power_of_2(c))}
