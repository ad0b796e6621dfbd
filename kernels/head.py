"""The network's end: 1x1 convolution + bias + ReLU6, the mean over H and W, and the classifier.

A program makes the means of N features of IMAGES images: M pixels at a time are multiplied on tensor cores,
activated and added up in registers, so that the widest activation of the network is never written. The
classifier is a product over images, made by `pointwise`.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import pointwise
from .common import (
    POINTERS,
    Tile,
    arithmetic,
    batches,
    cdiv,
    channels_last,
    device_of,
    relu6,
    tiles,
)


@triton.jit(do_not_specialize=["images"])  # one binary for every batch
def pool_kernel(
    x,  # [N, pixels, CIN]
    weight,  # [COUT, CIN]
    bias,  # [COUT]
    out,  # [N, COUT]
    images,
    pixels,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    TF32: tl.constexpr,
    IMAGES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One program: the means of N features of IMAGES images. All arrays contiguous."""
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    first_image = tl.program_id(1).to(tl.int64) * IMAGES
    channel = tl.program_id(0) * N + tl.arange(0, N)
    shift = tl.load(bias + channel, mask=channel < COUT, other=0.0).to(tl.float32)
    blocks = (pixels + M - 1) // M
    total = tl.zeros((N,), tl.float32)
    for step in tl.range(0, IMAGES * blocks):
        image = first_image + step // blocks
        pixel = step % blocks * M + tl.arange(0, M)
        there = (pixel < pixels) & (image < images)
        line = (image * pixels + pixel)[:, None] * CIN
        sums = tl.zeros((M, N), tl.float32)
        for first in tl.range(0, CIN, K):
            k = first + tl.arange(0, K)
            a = tl.load(x + line + k[None, :], mask=there[:, None] & (k < CIN)[None, :], other=0.0)
            b = tl.load(
                weight + channel[None, :] * CIN + k[:, None],
                mask=(k < CIN)[:, None] & (channel < COUT)[None, :],
                other=0.0,
            )
            sums = tl.dot(a, b, sums, input_precision=precision)
        sums = relu6(sums + shift[None, :])
        total += tl.sum(tl.where(there[:, None], sums, 0.0), axis=0)
        if step % blocks == blocks - 1:
            mean = (total / pixels).to(out.dtype.element_ty)
            tl.store(out + image * COUT + channel, mean, mask=(channel < COUT) & (image < images))
            total = tl.zeros((N,), tl.float32)


def features(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    tf32: bool = False,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The mean over H and W of ReLU6(1x1 convolution of x + bias).

    Args:
        x: [N, Cin, H, W], float32, float16 or bfloat16, any strides; copied unless channels_last.
        weight: [Cout, Cin, 1, 1], batch norm folded, the dtype and device of x.
        bias: [Cout], likewise.
        tf32: multiply float32 as TF32; in full precision otherwise.
        out: contiguous [N, Cout], filled and returned where it is given.
        tile: a row of the tile table, instead of the one for this GPU.

    Returns:
        [N, Cout]. Sums are float32, rounded once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    pointwise._check(x, weight, bias, None)
    (n, cin, h, w), cout = x.shape, weight.shape[0]
    if min(h, w) < 1:
        raise ValueError(f"x must be at least 1x1, got {tuple(x.shape)}")
    if out is None:
        out = torch.empty((n, cout), dtype=x.dtype, device=x.device)
    if out.shape != (n, cout) or not out.is_contiguous() or (out.dtype, out.device) != (x.dtype, x.device):
        raise ValueError(f"out must be contiguous {(n, cout)} of {x.dtype} on {x.device}")
    tile = choose_tile(x.device, n, cout, arithmetic(x.dtype, tf32)) if tile is None else tile
    tile, image = pointwise.fit(tile, cin, cout), channels_last(x)
    with torch.cuda.device_of(x):
        for some in batches(n, tile["images"]):
            pool_kernel[cdiv(cout, tile["n"]), cdiv(len(out[some]), tile["images"])](
                image[some],
                weight.contiguous(),
                bias.contiguous(),
                out[some],
                len(out[some]),
                h * w,
                CIN=cin,
                COUT=cout,
                TF32=tf32,
                IMAGES=tile["images"],
                M=tile["m"],
                N=tile["n"],
                K=tile["k"],
                num_warps=tile["warps"],
                num_stages=tile["stages"],
            )
    return out


def head(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    tf32: bool = False,
) -> torch.Tensor:
    """The classifier of `features`: [N, Cin, H, W] -> [N, classes].

    Args:
        x, w1, b1, tf32: as `features` has them.
        w2: [classes, Cout], of x's dtype and device.
        b2: [classes], likewise.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    means = features(x, w1, b1, tf32=tf32)[:, :, None, None]
    return pointwise.pointwise(means, w2[:, :, None, None], b2, tf32=tf32)[:, :, 0, 0]


def choose_tile(device: torch.device, n: int, cout: int, kind: str) -> Tile:
    """The table's tile for n images and products of `kind`, see `common.arithmetic`; with one image a program
    where several would leave the GPU idle.
    """
    name, units = device_of(device)
    tile = tiles(name, "head")[kind]
    programs = cdiv(cout, tile["n"]) * cdiv(n, tile["images"])
    return tile if programs >= 4 * units else {**tile, "images": 1}


def traffic(n: int, pixels: int, w1: torch.Tensor, w2: torch.Tensor, kind: str) -> int:
    """Bytes that `head` reads and writes for n images of so many pixels, with weights w1 and w2.

    The unique addresses of each program, weights included, summed over programs. L2 serves a part.
    """
    (cout, cin), item = w1.shape[:2], w1.element_size()
    tile = pointwise.fit(choose_tile(w1.device, n, cout, kind), cin, cout)
    runs, groups = cdiv(cout, tile["n"]), cdiv(n, tile["images"])
    features = n * pixels * cin * runs + groups * (cout * cin + cout) + n * cout
    classes = len(w2)
    tile = pointwise.choose_tile(w1.device, n, cout, classes, kind)
    return features * item + pointwise.traffic(n, cout, classes, item, tile)


def compile_arguments(
    cin: int, cout: int, dtype: torch.dtype, tile: Tile, *, tf32: bool = False
) -> dict[str, str | int | bool]:
    """The arguments of the kernel of `features` as `aot.compile_for` takes them."""
    tile = pointwise.fit(tile, cin, cout)
    pointers = dict.fromkeys(("x", "weight", "bias", "out"), POINTERS[dtype])
    constants = {"CIN": cin, "COUT": cout, "TF32": tf32, "IMAGES": tile["images"]}
    constants |= {"M": tile["m"], "N": tile["n"], "K": tile["k"]}
    return {**pointers, "images": "i32", "pixels": "i32", **constants}


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The float64 twin of `features`: same tensors, [N, Cout] float64."""
    return pointwise.reference(x, weight, bias, relu6=True).mean((2, 3))


def tolerance(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, want: torch.Tensor, tf32: bool = False
) -> torch.Tensor:
    """How far `features` may be from `want`, its float64 twin's answer: [N, Cout] float64.

    The mean of what its pixels may be off in float32, nothing where inputs are infinite and ReLU6 gives 0 or
    6, and a float32 rounding a pixel of their sum; the result is rounded once more to its own type, by half a
    step, subnormal at least.
    """
    size = pointwise.reference(x.abs(), weight.abs(), bias.abs())
    size = size.masked_fill(~size.isfinite(), 0).mean((2, 3))
    eps, own = torch.finfo(torch.float32).eps, torch.finfo(x.dtype)
    relative = (x.shape[1] + 3) * eps + (2**-9 if tf32 else 0)
    adding = (x.shape[2] * x.shape[3] + 1) * eps * want.abs()
    bound = relative * size + adding + own.eps / 2 * want.abs() + own.tiny * own.eps
    return bound.masked_fill(~want.isfinite(), 0)
