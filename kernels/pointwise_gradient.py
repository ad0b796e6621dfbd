"""The gradient of the 1x1 convolution's weight: a product over the pixels of all images.

One program sums M x N of its elements over a share of the pixels, K at a time, on tensor cores in float32;
`parts.add_parts` adds the shares. Nothing is atomic, so the bits are the same every time.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import parts as shares
from .common import (
    DTYPES,
    POINTERS,
    Tile,
    arithmetic,
    cdiv,
    channels_last,
    device_of,
    next_power_of_2,
    tiles,
)
from .parts import add_parts, number_of_parts
from .pointwise import DOT


@triton.jit(do_not_specialize=["pixels"])  # one binary for every batch
def weight_gradient_kernel(
    dy,  # [pixels, COUT]
    x,  # [pixels, CIN]
    parts,  # [P, COUT, CIN] float32
    pixels,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    TF32: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One program: M output by N input channels of one part. All arrays contiguous."""
    rows: tl.constexpr = (COUT + M - 1) // M
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    program, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o = program % rows * M + tl.arange(0, M)
    i = program // rows * N + tl.arange(0, N)
    steps = (pixels.to(tl.int64) + K - 1) // K
    sums = tl.zeros((M, N), tl.float32)
    for step in tl.range(part * steps // tl.num_programs(1), (part + 1) * steps // tl.num_programs(1)):
        pixel = step * K + tl.arange(0, K)
        a = tl.load(
            dy + pixel[None, :] * COUT + o[:, None],
            mask=(pixel < pixels)[None, :] & (o < COUT)[:, None],
            other=0.0,
        )
        b = tl.load(
            x + pixel[:, None] * CIN + i[None, :],
            mask=(pixel < pixels)[:, None] & (i < CIN)[None, :],
            other=0.0,
        )
        sums = tl.dot(a, b, sums, input_precision=precision)
    at = part * (COUT * CIN) + o[:, None] * CIN + i[None, :]
    tl.store(parts + at, sums, mask=(o < COUT)[:, None] & (i < CIN)[None, :])


def weight_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    tf32: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The gradient of the weight of `pointwise(x, weight)`, from that of its result.

    Args:
        dy: [N, Cout, H, W], float32, float16 or bfloat16, any strides; copied unless channels_last.
        x: [N, Cin, H, W], likewise, of dy's dtype and device.
        out: contiguous [Cout, Cin, 1, 1], float32 or x's dtype, filled and returned where it is given.
        tf32: multiply float32 as TF32; in full precision otherwise.
        tile: a row of the tile table, instead of the one for this GPU.

    Returns:
        [Cout, Cin, 1, 1] of x's dtype. Sums are float32, rounded once; the same bits at every call on one
        GPU.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if dy.dim() != 4 or x.dim() != 4 or dy.shape[0] != x.shape[0] or dy.shape[2:] != x.shape[2:]:
        raise ValueError(f"dy {tuple(dy.shape)} and x {tuple(x.shape)} must share N, H and W")
    if dy.dtype != x.dtype or dy.device != x.device or x.dtype not in DTYPES:
        raise ValueError(f"dy is {dy.dtype} on {dy.device}, x {x.dtype} on {x.device}: use one of each")
    (n, cin, h, w), cout = x.shape, dy.shape[1]
    if out is None:
        out = torch.empty((cout, cin, 1, 1), dtype=x.dtype, device=x.device)
    if out.shape != (cout, cin, 1, 1) or not out.is_contiguous() or out.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"out must be contiguous {(cout, cin, 1, 1)} of float32 or {x.dtype}")
    pixels = n * h * w
    if not pixels:
        return out.zero_()
    name, units = device_of(x.device)
    tile = fit(
        tiles(name, "pointwise_gradient")[arithmetic(x.dtype, tf32)] if tile is None else tile, cin, cout
    )
    programs, number = _grid(pixels, cin, cout, tile, units)
    parts = torch.empty((number, cout, cin), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        weight_gradient_kernel[programs, number](
            channels_last(dy),
            channels_last(x),
            parts,
            pixels,
            CIN=cin,
            COUT=cout,
            TF32=tf32,
            M=tile["m"],
            N=tile["n"],
            K=tile["k"],
            num_warps=tile["warps"],
            num_stages=tile["stages"],
        )
        add_parts(parts, out)
    return out


def fit(tile: Tile, cin: int, cout: int) -> Tile:
    """A tile of the table without what lies past the channels."""
    m, n = (max(DOT, next_power_of_2(channels)) for channels in (cout, cin))
    return {**tile, "m": min(tile["m"], m), "n": min(tile["n"], n)}


def _grid(pixels: int, cin: int, cout: int, tile: Tile, units: int) -> tuple[int, int]:
    """Programs of one part, and parts."""
    programs = cdiv(cout, tile["m"]) * cdiv(cin, tile["n"])
    return programs, number_of_parts(cdiv(pixels, tile["k"]), programs, units)


def traffic(
    pixels: int, cin: int, cout: int, item: int, tile: Tile, units: int = 1, out_item: int | None = None
) -> int:
    """Bytes that `weight_gradient` reads and writes on a GPU of so many multiprocessors, with a tile that
    `fit` has made.

    The unique addresses of each program, summed over programs, those of adding the parts included. L2 serves
    a part. `out_item`: bytes of the result's numbers where they are not as x's.
    """
    _, number = _grid(pixels, cin, cout, tile, units)
    read = pixels * (cout * cdiv(cin, tile["n"]) + cin * cdiv(cout, tile["m"])) * item
    return read + number * cout * cin * 4 + shares.traffic(number, cout * cin, out_item or item)


def compile_arguments(
    cin: int, cout: int, dtype: torch.dtype, tile: Tile, *, tf32: bool = False, pixels: str = "i32"
) -> dict[str, str | int | bool]:
    """The kernel's arguments as `aot.compile_for` takes them."""
    tile = fit(tile, cin, cout)
    pointers = {"dy": POINTERS[dtype], "x": POINTERS[dtype], "parts": "*fp32", "pixels": pixels}
    return {
        **pointers,
        "CIN": cin,
        "COUT": cout,
        "TF32": tf32,
        "M": tile["m"],
        "N": tile["n"],
        "K": tile["k"],
    }


def reference(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The float64 twin of `weight_gradient`: same tensors, [Cout, Cin, 1, 1] float64."""
    return torch.einsum("nohw,nihw->oi", dy.double(), x.double())[:, :, None, None]


def tolerance(dy: torch.Tensor, x: torch.Tensor, want: torch.Tensor, tf32: bool = False) -> torch.Tensor:
    """How far `weight_gradient` may be from its float64 twin's answer: [Cout, Cin, 1, 1] float64.

    Errors of sums of as many terms as there are pixels grow as the root of their number where they are
        random: ten of their standard deviations, each an eps of float32; TF32 takes an eps of 2**-10 from
        each factor. The result is rounded once more, by half a step, subnormal at least.
    """
    terms = x.shape[0] * x.shape[2] * x.shape[3]
    relative = (10 * terms**0.5 + 3) * torch.finfo(torch.float32).eps + (2**-9 if tf32 else 0)
    own = torch.finfo(x.dtype)
    bound = relative * reference(dy.abs(), x.abs()) + own.eps / 2 * want.abs() + own.tiny * own.eps
    return bound.nan_to_num(0, 0)
