"""1x1 convolution in a training step: raw outputs in and out, batch norm applied and measured on the way.

Forward, the norm and ReLU6 of the layer before are applied to its raw output as that is read, and the moments
of what is written are found from the registers (`norm`). Backward, the gradient of the raw output is made
as it is read from the two things it is linear in, and what leaves is masked and summed for the norm before.
So a layer reads and writes what a convolution alone would.

Where the weight's gradient fits in registers one kernel makes both gradients, from one reading of g, z and x;
elsewhere each has its own. Of an expansion, whose x is a sixth of z, z is made again, not read: counted for
the network, 7.5 of 100 MB an image. Programs take shares of the pixels and loop, so that sums over pixels
leave one part a program: no atomics, the bits are the same every time.
"""

# Triton's language is not Python's: arguments carry no annotations.
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import Tile, arithmetic, device_of, tiles
from .norm import (
    Applied,
    RawGradient,
    masked,
    normalized,
    read_gradient,
    store_moments,
    store_sums,
    three,
    with_tile,
)
from .parts import add_parts, number_of_parts
from .pointwise import DOT

# Bytes of a sum.
FLOAT = 4


@triton.jit
def _read(x, pixel, channel, pixels, values, C: tl.constexpr, NORM: tl.constexpr, RELU6: tl.constexpr, kind):
    """[pixels, channels] of what a convolution multiplies, of type `kind`; zero outside."""
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    a = tl.load(x + pixel[:, None] * C + channel[None, :], mask=inside, other=0.0)
    if NORM:
        mean, scale, shift = three(values, channel, C)
        a = normalized(a.to(tl.float32), mean[None, :], scale[None, :], shift[None, :], RELU6)
        a = tl.where(inside, a, 0.0)
    return a.to(kind)


@triton.jit
def _read_weight(weight, o, i, CIN: tl.constexpr, COUT: tl.constexpr, kind):
    """[input channels, output channels] of a weight, of type `kind`; zero outside."""
    known = (i < CIN)[:, None] & (o < COUT)[None, :]
    return tl.load(weight + o[None, :] * CIN + i[:, None], mask=known, other=0.0).to(kind)


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
    held = _read_weight(weight, channel, tl.arange(0, K), CIN, COUT, kind)
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        pixel = step * M + tl.arange(0, M)
        sums = tl.zeros((M, N), tl.float32)
        for first in tl.range(0, CIN, K):
            k = first + tl.arange(0, K)
            a = _read(x, pixel, k, pixels, x_values, CIN, NORM, RELU6, kind)
            b = held if CIN <= K else _read_weight(weight, channel, k, CIN, COUT, kind)
            sums = tl.dot(a, b, sums, input_precision=precision)
        stored = sums.to(kind)
        inside = (pixel < pixels)[:, None] & (channel < COUT)[None, :]
        tl.store(out + pixel[:, None] * COUT + channel[None, :], stored, mask=inside)
        if MOMENTS:
            # Of what the next layer will read, so after rounding.
            z = stored.to(tl.float32)
            count, mean, spread = with_tile(count, mean, spread, z, pixel < pixels)
    if MOMENTS:
        store_moments(parts, part, channel, count, mean, spread, COUT)


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
    channel = tl.program_id(0) * N + tl.arange(0, N)
    part, number = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    steps = (pixels.to(tl.int64) + M - 1) // M
    total = tl.zeros((N,), tl.float32)
    product = tl.zeros((N,), tl.float32)
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        pixel = step * M + tl.arange(0, M)
        dx = tl.zeros((M, N), tl.float32)
        a = dx.to(kind)
        if REMADE:
            a = _read(x, pixel, channel, pixels, x_values, CIN, NORM, RELU6, kind)
        for first in tl.range(0, COUT, K):
            k = first + tl.arange(0, K)
            known = (k < COUT)[:, None] & (channel < CIN)[None, :]
            b = tl.load(weight + k[:, None] * CIN + channel[None, :], mask=known, other=0.0).to(kind)
            raw = 0.0
            if REMADE:
                raw = tl.dot(a, tl.trans(b), input_precision=precision)
            dz = read_gradient(
                g, z, raw, pixel, k, pixels, z_values, coefficients, COUT, MASK, BATCH, REMADE
            ).to(kind)
            dx = tl.dot(dz, b, dx, input_precision=precision)
        total, product = _pass_back(
            dx, x, residual, out, pixel, channel, pixels, x_values, total, product, CIN, NORM, RELU6, RESIDUAL
        )
    if NORM:
        store_sums(parts, part, channel, total, product, CIN)


@triton.jit(do_not_specialize=["pixels"])
def weight_gradient_kernel(
    g,  # [pixels, COUT]
    z,  # [pixels, COUT]; not read without MASK or BATCH, nor where REMADE
    z_values,  # [3, COUT] float32
    coefficients,  # [3, COUT] float32
    weight,  # [COUT, CIN], of any type; not read without REMADE
    x,  # [pixels, CIN]
    x_values,  # [3, CIN] float32; not read without NORM
    parts,  # [P, COUT, CIN] float32
    pixels,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    MASK: tl.constexpr,
    BATCH: tl.constexpr,
    NORM: tl.constexpr,
    RELU6: tl.constexpr,
    REMADE: tl.constexpr,
    TF32: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One program: M output by N input channels over one part of the pixels, K at a time."""
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    kind: tl.constexpr = x.dtype.element_ty
    rows: tl.constexpr = (COUT + M - 1) // M
    program, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o = program % rows * M + tl.arange(0, M)
    i = program // rows * N + tl.arange(0, N)
    number = tl.num_programs(1)
    steps = (pixels.to(tl.int64) + K - 1) // K
    known = (o < COUT)[:, None] & (i < CIN)[None, :]
    sums = tl.zeros((M, N), tl.float32)
    held = sums.to(kind)
    if REMADE:
        held = tl.load(weight + o[:, None] * CIN + i[None, :], mask=known, other=0.0).to(kind)
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        pixel = step * K + tl.arange(0, K)
        a = _read(x, pixel, i, pixels, x_values, CIN, NORM, RELU6, kind)
        raw = 0.0
        if REMADE:
            raw = tl.dot(a, tl.trans(held), input_precision=precision)
        dz = read_gradient(g, z, raw, pixel, o, pixels, z_values, coefficients, COUT, MASK, BATCH, REMADE).to(
            kind
        )
        sums = tl.dot(tl.trans(dz), a, sums, input_precision=precision)
    at = part * (COUT * CIN) + o[:, None] * CIN + i[None, :]
    tl.store(parts + at, sums, mask=known)


@triton.jit(do_not_specialize=["pixels"])
def both_gradients_kernel(
    g,  # [pixels, COUT]
    z,  # [pixels, COUT]; not read without MASK or BATCH, nor where REMADE
    z_values,  # [3, COUT] float32
    coefficients,  # [3, COUT] float32
    weight,  # [COUT, CIN], of any type
    x,  # [pixels, CIN]
    x_values,  # [3, CIN] float32; not read without NORM
    residual,  # [pixels, CIN]; not read without RESIDUAL
    out,  # [pixels, CIN]
    parts,  # [P, 2, CIN] float32; not written without NORM
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
    TF32: tl.constexpr,
    M: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 (input channels)
    O: tl.constexpr,  # noqa: E741 (all output channels and more, a power of two)
):
    """One program: both gradients of I input channels over one part of the pixels, M at a time.

    All arrays contiguous.
    """
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    kind: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0) * I + tl.arange(0, I)
    o = tl.arange(0, O)
    part, number = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    steps = (pixels.to(tl.int64) + M - 1) // M
    known = (o < COUT)[:, None] & (i < CIN)[None, :]
    held = tl.load(weight + o[:, None] * CIN + i[None, :], mask=known, other=0.0).to(kind)
    sums = tl.zeros((O, I), tl.float32)
    total = tl.zeros((I,), tl.float32)
    product = tl.zeros((I,), tl.float32)
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        pixel = step * M + tl.arange(0, M)
        a = _read(x, pixel, i, pixels, x_values, CIN, NORM, RELU6, kind)
        raw = 0.0
        if REMADE:
            raw = tl.dot(a, tl.trans(held), input_precision=precision)
        dz = read_gradient(g, z, raw, pixel, o, pixels, z_values, coefficients, COUT, MASK, BATCH, REMADE).to(
            kind
        )
        sums = tl.dot(tl.trans(dz), a, sums, input_precision=precision)
        dx = tl.dot(dz, held, input_precision=precision)
        # It reads x again, which the cache has.
        total, product = _pass_back(
            dx, x, residual, out, pixel, i, pixels, x_values, total, product, CIN, NORM, RELU6, RESIDUAL
        )
    if NORM:
        store_sums(parts, part, i, total, product, CIN)
    at = part * (COUT * CIN) + o[:, None] * CIN + i[None, :]
    tl.store(weight_parts + at, sums, mask=known)


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
    kind = arithmetic(x.dtype, tf32)
    table = tiles(name, "train_pointwise")
    tile = fit(_row(table, f"forward_{kind}", cin, cout, cout) if tile is None else tile, cout, cin)
    runs = triton.cdiv(cout, tile["n"])
    number = _number(
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
    """Gradients of `forward`, whose x, norm and weight these are.

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
    kind = arithmetic(x.dtype, tf32)
    name = device_of(x.device)[0]
    table = tiles(name, "train_pointwise")
    call = _Gradients(of, weight, x, norm, residual, tf32)
    of_input = fit(_row(table, f"input_{kind}", cin, cout, cin) if tile is None else tile, cin, cout)
    of_weight = fit_weight(_row(table, f"weight_{kind}", cin, cout) if tile is None else tile, cin, cout)
    if for_x and for_weight:
        both = fit_both(_row(tiles(name, "train_pointwise_both"), kind, cin, cout), cin, cout)
        if both is not None and call.reads_less(both, of_input, of_weight):
            return call.both(both)
    dx = parts = dw = None
    if for_x:
        dx, parts = call.of_input(of_input)
    if for_weight:
        dw = call.of_weight(of_weight)
    return dx, parts, dw


class _Gradients(NamedTuple):
    """One call of `gradients`."""

    of: RawGradient
    weight: torch.Tensor
    x: torch.Tensor
    norm: Applied | None
    residual: torch.Tensor | None
    tf32: bool

    @property
    def constants(self) -> dict[str, bool | int]:
        return {
            "CIN": self.x.shape[-1],
            "COUT": self.weight.shape[0],
            "MASK": self.of.mask,
            "BATCH": self.of.batch,
            "NORM": self.norm is not None,
            "RELU6": self.norm is not None and self.norm.relu6,
            "TF32": self.tf32,
        }

    def remakes(self, n: int) -> bool:
        """Whether a kernel that has n input channels at once makes the raw output again, not reads it.

        It does for an expansion, whose x is the smaller one: a product on tensor cores for half of the bytes.
        """
        cin, cout = self.x.shape[-1], self.weight.shape[0]
        return self.of.batch and not self.of.mask and n >= cin and cout >= 2 * cin

    def reads_less(self, both: Tile, of_input: Tile, of_weight: Tile) -> bool:
        """Whether both gradients at once read no more values of a pixel than one after the other.

        What more than one program reads counts each time.
        """
        cin, cout = self.x.shape[-1], self.weight.shape[0]

        def raw_gradient(n: int) -> int:
            return triton.cdiv(cin, n) * (1 if self.remakes(n) else 2) * cout

        apart = raw_gradient(of_input["n"]) + raw_gradient(of_weight["n"])
        again = triton.cdiv(cout, of_weight["m"]) * cin
        return raw_gradient(both["i"]) <= apart + again

    def number(self, rows: int, programs: int, sums: int = 0) -> int:
        """Parts that the pixels are cut into, `rows` of them a step; `sums`: values that each leaves."""
        cin, cout, units = self.x.shape[-1], self.weight.shape[0], device_of(self.x.device)[1]
        fixed = self.weight.numel() * self.weight.element_size() + 2 * sums * FLOAT
        fixed /= 2 * (cin + cout) * self.x.element_size()
        return _number(self.x.numel() // cin, rows, programs, units, fixed)

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def of_input(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient of x, and the sums of its norm."""
        cin = self.x.shape[-1]
        runs = triton.cdiv(cin, tile["n"])
        number = self.number(tile["m"], runs)
        dx = torch.empty_like(self.x)
        parts = None if self.norm is None else self.empty(number, 2, cin)
        with torch.cuda.device_of(dx):
            input_gradient_kernel[runs, number](
                *self.arguments(dx, parts),
                dx.numel() // cin,
                **self.constants,
                RESIDUAL=self.residual is not None,
                REMADE=self.remakes(tile["n"]),
                M=tile["m"],
                N=tile["n"],
                K=tile["k"],
                num_warps=tile["warps"],
                num_stages=tile["stages"],
            )
        return dx, parts

    def of_weight(self, tile: Tile) -> torch.Tensor:
        """The gradient of the weight."""
        of, cin, cout = self.of, self.x.shape[-1], self.weight.shape[0]
        programs = triton.cdiv(cout, tile["m"]) * triton.cdiv(cin, tile["n"])
        number = self.number(tile["k"], programs, cin * cout)
        parts, dw = self.empty(number, cout, cin), self.empty(cout, cin, 1, 1)
        with torch.cuda.device_of(dw):
            weight_gradient_kernel[programs, number](
                of.g,
                of.z,
                of.values,
                of.coefficients,
                self.weight,
                self.x,
                of.values if self.norm is None else self.norm.values,
                parts,
                self.x.numel() // cin,
                **self.constants,
                REMADE=self.remakes(tile["n"]),
                M=tile["m"],
                N=tile["n"],
                K=tile["k"],
                num_warps=tile["warps"],
                num_stages=tile["stages"],
            )
            add_parts(parts, dw)
        return dw

    def both(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What `of_input` and `of_weight` give, in one pass."""
        cin, cout = self.x.shape[-1], self.weight.shape[0]
        runs = triton.cdiv(cin, tile["i"])
        number = self.number(tile["m"], runs, cin * cout)
        dx = torch.empty_like(self.x)
        parts = None if self.norm is None else self.empty(number, 2, cin)
        weight_parts, dw = self.empty(number, cout, cin), self.empty(cout, cin, 1, 1)
        with torch.cuda.device_of(dx):
            both_gradients_kernel[runs, number](
                *self.arguments(dx, parts),
                weight_parts,
                dx.numel() // cin,
                **self.constants,
                RESIDUAL=self.residual is not None,
                REMADE=self.remakes(tile["i"]),
                M=tile["m"],
                I=tile["i"],
                O=tile["o"],
                num_warps=tile["warps"],
                num_stages=tile["stages"],
            )
            add_parts(weight_parts, dw)
        return dx, parts, dw

    def arguments(self, dx: torch.Tensor, parts: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The arrays of a kernel that makes the gradient of x, in its order; one not read is another one."""
        of, norm = self.of, self.norm
        return (
            of.g,
            of.z,
            of.values,
            of.coefficients,
            self.weight,
            self.x,
            of.values if norm is None else norm.values,
            dx if self.residual is None else self.residual,
            dx,
            of.coefficients if parts is None else parts,
        )


def _number(pixels: int, rows: int, programs: int, units: int, fixed: float) -> int:
    """Parts that the pixels are cut into, `rows` of them a step, for so many programs each.

    As `number_of_parts` has it, but fewer, down to one program a unit, where what each part moves, as much as
    `fixed` pixels, would be more than a sixteenth of the rest.
    """
    number = number_of_parts(triton.cdiv(pixels, rows), programs, units)
    enough = max(int(pixels / (16 * fixed)), triton.cdiv(units, programs))
    return min(number, enough)


def power(channels: int) -> int:
    """So many channels as a dimension of `tl.dot`."""
    return max(DOT, triton.next_power_of_2(channels))


def fit(tile: Tile, n: int, k: int) -> Tile:
    """A tile of the table without what lies past n and k channels."""
    return {**tile, "n": min(tile["n"], power(n)), "k": min(tile["k"], power(k))}


def fit_weight(tile: Tile, cin: int, cout: int) -> Tile:
    """A tile of the weight's gradient without what lies past the channels."""
    return {**tile, "m": min(tile["m"], power(cout)), "n": min(tile["n"], power(cin))}


def fit_both(tile: Tile, cin: int, cout: int) -> Tile | None:
    """The tile for both gradients at once, all output channels; None where "most" sums are too few."""
    i = tile["most"] // power(cout)
    return None if i < DOT else {**tile, "i": min(i, power(cin)), "o": power(cout)}


def _row(table: Mapping[str, Tile], name: str, cin: int, cout: int, n: int = 0) -> Tile:
    """A tile of the table; for n channels of a result, more than that has, the "wide" one.

    The one for just these channels, such as "weight_half_160x960", where there is one.
    """
    if n > table[name].get("n", n):
        name = name.replace("_", "_wide_")
    return table.get(f"{name}_{cin}x{cout}", table[name])
