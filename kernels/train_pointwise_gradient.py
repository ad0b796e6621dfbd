"""The gradients of `train_pointwise`'s 1x1 convolution: of what it read, and of its weight.

The gradient of the raw output is made as it is read (`norm.read_gradient`), and what leaves is masked and
summed for the norm before. Where the weight's gradient fits in registers one kernel makes both, from one
reading of g, z and x; elsewhere each has its own. Of an expansion, whose x is a sixth of z, z is made again,
not read: counted for the network, 7.5 of 100 MB an image.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common import Tile, arithmetic, cdiv, device_of, tiles
from .norm import Applied, RawGradient, masked, read_gradient, store_sums, three
from .parts import add_parts
from .pointwise import DOT
from .train_pointwise import fit, number_of_shares, power, read_applied, read_weight, row

# Bytes of a sum.
FLOAT = 4


@triton.jit
def _pass_back(
    dx,
    x,
    residual,
    out,
    pixel,
    channel,
    pixels,
    values,
    total,
    product,
    C: tl.constexpr,
    NORM: tl.constexpr,
    RELU6: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Store the gradient dx of what a convolution multiplied: with the residual added, or, where there is a
    norm, masked by its ReLU6 and added to its two sums, which are returned.
    """
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    at = pixel[:, None] * C + channel[None, :]
    if NORM:
        mean, scale, shift = three(values, channel, C)
        raw = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if RELU6:
            dx = masked(dx, raw, mean[None, :], scale[None, :], shift[None, :])
        # The sums are of what the layer before will read, so after rounding.
        dx = tl.where(inside, dx.to(out.dtype.element_ty).to(tl.float32), 0.0)
        total += tl.sum(dx, 0)
        product += tl.sum(dx * (raw - mean[None, :]), 0)
    if RESIDUAL:
        dx += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, dx.to(out.dtype.element_ty), mask=inside)
    return total, product


@triton.jit(do_not_specialize=["pixels"])
def input_gradient_kernel(
    g,  # [pixels, COUT]
    z,  # [pixels, COUT]; not read without MASK or BATCH, nor where REMADE
    z_values,  # [3, COUT] float32
    coefficients,  # [3, COUT] float32
    weight,  # [COUT, CIN], of any type
    x,  # [pixels, CIN]; not read without NORM or REMADE
    x_values,  # [3, CIN] float32; not read without NORM
    residual,  # [pixels, CIN]; not read without RESIDUAL
    out,  # [pixels, CIN]
    parts,  # [P, 2, CIN] float32; not written without NORM
    pixels,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    MASK: tl.constexpr,
    BATCH: tl.constexpr,
    NORM: tl.constexpr,
    RELU6: tl.constexpr,
    RESIDUAL: tl.constexpr,
    REMADE: tl.constexpr,
    TF32: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One program: N input channels of one part of the pixels, M at a time. All arrays contiguous."""
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    kind: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0) * N + tl.arange(0, N)
    part, number = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    steps = (pixels.to(tl.int64) + M - 1) // M
    total = tl.zeros((N,), tl.float32)
    product = tl.zeros((N,), tl.float32)
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        pixel = step * M + tl.arange(0, M)
        dx = tl.zeros((M, N), tl.float32)
        a = dx.to(kind)
        if REMADE:
            a = read_applied(x, pixel, i, pixels, x_values, CIN, NORM, RELU6, kind)
        for first in tl.range(0, COUT, K):
            o = first + tl.arange(0, K)
            b = read_weight(weight, o, i, CIN, COUT, kind)
            raw = 0.0
            if REMADE:
                raw = tl.dot(a, tl.trans(b), input_precision=precision)
            dz = read_gradient(
                g, z, raw, pixel, o, pixels, z_values, coefficients, COUT, MASK, BATCH, REMADE
            ).to(kind)
            dx = tl.dot(dz, b, dx, input_precision=precision)
        total, product = _pass_back(
            dx, x, residual, out, pixel, i, pixels, x_values, total, product, CIN, NORM, RELU6, RESIDUAL
        )
    if NORM:
        store_sums(parts, part, i, total, product, CIN)


@triton.jit(do_not_specialize=["pixels"])
def weight_gradient_kernel(
    g,  # [pixels, COUT]
    z,  # [pixels, COUT]; not read without MASK or BATCH, nor where REMADE
    z_values,  # [3, COUT] float32
    coefficients,  # [3, COUT] float32
    weight,  # [COUT, CIN], of any type; not read without FOR_X or REMADE
    x,  # [pixels, CIN]
    x_values,  # [3, CIN] float32; not read without NORM
    residual,  # [pixels, CIN]; not read without RESIDUAL
    out,  # [pixels, CIN]; not written without FOR_X
    parts,  # [P, 2, CIN] float32; not written without FOR_X and NORM
    weight_parts,  # [P, COUT, CIN] float32
    pixels,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    MASK: tl.constexpr,
    BATCH: tl.constexpr,
    NORM: tl.constexpr,
    RELU6: tl.constexpr,
    RESIDUAL: tl.constexpr,
    REMADE: tl.constexpr,
    FOR_X: tl.constexpr,
    TF32: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One program: M output by N input channels over one part of the pixels, K at a time.

    With FOR_X the gradient of x as well, for which M is all output channels. All arrays contiguous.
    """
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    kind: tl.constexpr = x.dtype.element_ty
    rows: tl.constexpr = (COUT + M - 1) // M
    tl.static_assert(rows == 1 or not FOR_X)
    program, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o = program % rows * M + tl.arange(0, M)
    i = program // rows * N + tl.arange(0, N)
    number = tl.num_programs(1)
    steps = (pixels.to(tl.int64) + K - 1) // K
    sums = tl.zeros((M, N), tl.float32)
    held = sums.to(kind)
    if FOR_X or REMADE:
        held = read_weight(weight, o, i, CIN, COUT, kind)
    total = tl.zeros((N,), tl.float32)
    product = tl.zeros((N,), tl.float32)
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        pixel = step * K + tl.arange(0, K)
        a = read_applied(x, pixel, i, pixels, x_values, CIN, NORM, RELU6, kind)
        raw = 0.0
        if REMADE:
            raw = tl.dot(a, tl.trans(held), input_precision=precision)
        dz = read_gradient(g, z, raw, pixel, o, pixels, z_values, coefficients, COUT, MASK, BATCH, REMADE).to(
            kind
        )
        sums = tl.dot(tl.trans(dz), a, sums, input_precision=precision)
        if FOR_X:
            dx = tl.dot(dz, held, input_precision=precision)
            # It reads x again, which the cache has.
            total, product = _pass_back(
                dx, x, residual, out, pixel, i, pixels, x_values, total, product, CIN, NORM, RELU6, RESIDUAL
            )
    if FOR_X and NORM:
        store_sums(parts, part, i, total, product, CIN)
    at = part * (COUT * CIN) + o[:, None] * CIN + i[None, :]
    tl.store(weight_parts + at, sums, mask=(o < COUT)[:, None] & (i < CIN)[None, :])


def gradients(
    of: RawGradient,
    weight: torch.Tensor,
    x: torch.Tensor,
    norm: Applied | None,
    residual: torch.Tensor | None = None,
    *,
    for_x: bool = True,
    for_weight: bool = True,
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `train_pointwise.forward`, whose x, norm and weight these are.

    Args:
        of: the gradient of the raw output.
        weight, x, norm: as they were for `forward`.
        residual: [N, H, W, Cin], added to the gradient of x; where x has no norm, only.
        for_x: the gradient of x is wanted.
        for_weight: that of the weight is.
        tf32: as for `forward`.
        tile: a row of the tile table for the one gradient that is wanted, instead of the one for this GPU.

    Returns:
        The gradient of x, or of what follows its norm, masked; the norm's sums [P, 2, Cin], as
        `norm.norm_gradient` takes them, if it has one; the gradient of the weight, float32.
    """
    cin, cout = x.shape[-1], weight.shape[0]
    call = _Gradients(of, weight, x, norm, residual, tf32)
    if tile is None:
        kind = arithmetic(x.dtype, tf32)
        chosen = choose_tiles(device_of(x.device)[0], kind, cin, cout, of.may_remake)
    else:
        chosen = Tiles(fit(tile, cin, cout), fit_weight(tile, cin, cout), None)
    if for_x and for_weight and chosen.both is not None:
        return call.of_weight(chosen.both, for_x=True)
    dx = parts = dw = None
    if for_x:
        dx, parts = call.of_input(chosen.of_input)
    if for_weight:
        dw = call.of_weight(chosen.of_weight)[2]
    return dx, parts, dw


class Tiles(NamedTuple):
    """For the gradient of x, for that of the weight, and for both at once where they are made so."""

    of_input: Tile
    of_weight: Tile
    both: Tile | None


def choose_tiles(device_name: str, kind: str, cin: int, cout: int, may_remake: bool) -> Tiles:
    """The table's tiles for `gradients`, fitted.

    Both are made at once where that reads no more values of a pixel than one after the other. What more than
    one program reads counts each time.
    """
    table, at_once = tiles(device_name, "train_pointwise"), tiles(device_name, "train_pointwise_both")
    of_input = fit(row(table, f"input_{kind}", cin, cout, cin), cin, cout)
    of_weight = fit_weight(row(table, f"weight_{kind}", cin, cout), cin, cout)
    both = fit_both(row(at_once, kind, cin, cout), cin, cout)

    def raw_gradient(n: int) -> int:
        return cdiv(cin, n) * (1 if may_remake and _remakes(n, cin, cout) else 2) * cout

    apart = raw_gradient(of_input["n"]) + raw_gradient(of_weight["n"]) + cdiv(cout, of_weight["m"]) * cin
    return Tiles(of_input, of_weight, None if both is None or raw_gradient(both["n"]) > apart else both)


def _remakes(n: int, cin: int, cout: int) -> bool:
    """Whether a kernel that has n input channels at once makes the raw output again, not reads it.

    It does for an expansion, whose x is the smaller one: a product on tensor cores for half of the bytes.
    """
    return n >= cin and cout >= 2 * cin


class _Gradients(NamedTuple):
    """One call of `gradients`."""

    of: RawGradient
    weight: torch.Tensor
    x: torch.Tensor
    norm: Applied | None
    residual: torch.Tensor | None
    tf32: bool

    def number(self, rows: int, programs: int, sums: int = 0) -> int:
        """Parts that the pixels are cut into, `rows` of them a step; `sums`: values that each leaves."""
        cin, cout, units = self.x.shape[-1], self.weight.shape[0], device_of(self.x.device)[1]
        fixed = self.weight.numel() * self.weight.element_size() + 2 * sums * FLOAT
        fixed /= 2 * (cin + cout) * self.x.element_size()
        return number_of_shares(self.x.numel() // cin, rows, programs, units, fixed)

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def of_input(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient of x, and the sums of its norm."""
        cin = self.x.shape[-1]
        runs = cdiv(cin, tile["n"])
        number = self.number(tile["m"], runs)
        dx = torch.empty_like(self.x)
        parts = None if self.norm is None else self.empty(number, 2, cin)
        with torch.cuda.device_of(dx):
            input_gradient_kernel[runs, number](
                *self.arrays(dx, parts), dx.numel() // cin, **self.constants(tile)
            )
        return dx, parts

    def of_weight(
        self, tile: Tile, *, for_x: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """The gradient of the weight, last; before it, `for_x`, what `of_input` gives, in one pass."""
        cin, cout = self.x.shape[-1], self.weight.shape[0]
        programs = cdiv(cout, tile["m"]) * cdiv(cin, tile["n"])
        number = self.number(tile["k"], programs, cin * cout)
        dx = torch.empty_like(self.x) if for_x else None
        parts = self.empty(number, 2, cin) if for_x and self.norm is not None else None
        weight_parts, dw = self.empty(number, cout, cin), self.empty(cout, cin, 1, 1)
        with torch.cuda.device_of(dw):
            weight_gradient_kernel[programs, number](
                *self.arrays(dx, parts),
                weight_parts,
                self.x.numel() // cin,
                FOR_X=for_x,
                **self.constants(tile),
            )
            add_parts(weight_parts, dw)
        return dx, parts, dw

    def arrays(self, dx: torch.Tensor | None, parts: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """What both kernels read and write of x, in their order; what one does not is another tensor."""
        of, norm = self.of, self.norm
        out = self.x if dx is None else dx
        return (
            of.g,
            of.z,
            of.values,
            of.coefficients,
            self.weight,
            self.x,
            of.values if norm is None else norm.values,
            out if self.residual is None else self.residual,
            out,
            of.coefficients if parts is None else parts,
        )

    def constants(self, tile: Tile) -> dict[str, Any]:
        """What both kernels are compiled for."""
        of, cin, cout = self.of, self.x.shape[-1], self.weight.shape[0]
        return {
            "CIN": cin,
            "COUT": cout,
            "MASK": of.mask,
            "BATCH": of.batch,
            "NORM": self.norm is not None,
            "RELU6": self.norm is not None and self.norm.relu6,
            "RESIDUAL": self.residual is not None,
            "REMADE": of.may_remake and _remakes(tile["n"], cin, cout),
            "TF32": self.tf32,
            "M": tile["m"],
            "N": tile["n"],
            "K": tile["k"],
            "num_warps": tile["warps"],
            "num_stages": tile["stages"],
        }


def fit_weight(tile: Tile, cin: int, cout: int) -> Tile:
    """A tile of the weight's gradient without what lies past the channels."""
    return {**tile, "m": min(tile["m"], power(cout)), "n": min(tile["n"], power(cin))}


def fit_both(tile: Tile, cin: int, cout: int) -> Tile | None:
    """The tile for both gradients at once, all output channels; None where "most" sums are too few."""
    n = tile["most"] // power(cout)
    return None if n < DOT else {**tile, "m": power(cout), "n": min(n, power(cin))}
