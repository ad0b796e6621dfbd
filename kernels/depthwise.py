"""Depthwise 3x3 convolution + bias + ReLU6 on NHWC activations.

One program makes ROWS output rows of BLOCK lanes of one image. A lane is one channel of a patch, COLS
neighbouring output columns. A row of NHWC memory is one flat line and lanes are numbered along it, channel
fastest: no channel count leaves lanes idle, and neighbouring lanes read and write neighbouring memory. A lane
keeps its nine weights and its unfinished sums in registers. Each input row is read once per program and feeds
the up to three output rows that need it, each input column once per patch and feeds all outputs of the patch:
with ROWS = 7 and COLS = 2, stride 1 takes 2.6 loads an output in place of nine. No shared memory, no barrier.
"""

# Triton's language is not Python's: a tuple grows as a loop is unrolled, and arguments carry no annotations.
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .common import (
    DTYPES,
    GRID_LIMIT,
    POINTERS,
    Tile,
    batches,
    cdiv,
    channels_last,
    device_of,
    output,
    relu6,
    tiles,
)

# Rows are counted with 64 bits. Within a row of an image (W x C elements) 32 bits are enough up to:
ROW_LIMIT = 2**27
# A kernel that does not go by rows numbers an image's pixels, and a program's past its end, with 32 bits.
PIXEL_LIMIT = 2**31 - 2**10


@triton.jit
def _load_row(x, first, row, column, channel, h, w, C: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH neighbouring columns of one row of an image as a tuple of float32 [BLOCK]; zero outside it.

    `first` counts the rows of the images before (64 bits), `row` is the row within the image.
    """
    # One address for the row; the columns beside it are constants away.
    start = x + (first + row) * (w * C) + (column * C + channel)
    values = ()
    for i in tl.static_range(WIDTH):
        inside = (column + i >= 0) & (column + i < w) & (row >= 0) & (row < h)
        values += (tl.load(start + i * C, mask=inside, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _add_taps(sums, columns, taps, KY: tl.constexpr, STRIDE: tl.constexpr, COLS: tl.constexpr):
    """The COLS sums of one output row plus what kernel row KY takes from the columns of one input row."""
    result = ()
    for i in tl.static_range(COLS):
        total = sums[i]
        for kx in tl.static_range(3):
            total += taps[3 * KY + kx] * columns[i * STRIDE + kx]
        result += (total,)
    return result


@triton.jit
def _store_row(
    out, first, row, column, channel, sums, ho, wo, C: tl.constexpr, RELU6: tl.constexpr, COLS: tl.constexpr
):
    """Store the COLS sums of one output row, activated and rounded to the output's type."""
    start = out + (first + row) * (wo * C) + (column * C + channel)
    for i in tl.static_range(COLS):
        value = sums[i]
        if RELU6:
            value = relu6(value)
        inside = (column + i < wo) & (row < ho)
        tl.store(start + i * C, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def depthwise_kernel(
    x,  # [N, H, W, C]
    taps,  # [9, C], row 3 * ky + kx
    bias,  # [C]; not read without BIAS
    out,  # [N, HO, WO, C]
    h,
    w,
    ho,
    wo,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    BIAS: tl.constexpr,
    RELU6: tl.constexpr,
    TURNED: tl.constexpr,  # the taps by half a turn
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS output rows of BLOCK lanes of one image. All arrays contiguous, padding 1."""
    # Neighbouring programs share a row, then the halo between two groups of rows: both are found in L2.
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.program_id(1) * ROWS
    image = tl.program_id(2).to(tl.int64)
    # A lane past the last patch starts at a column >= wo: the column masks below are all it needs.
    channel = lane % C
    column = lane // C * COLS

    weights = ()
    for tap in tl.static_range(9):
        weights += (tl.load(taps + (8 - tap if TURNED else tap) * C + channel).to(tl.float32),)
    start = ()
    for _ in tl.static_range(COLS):
        if BIAS:
            start += (tl.load(bias + channel).to(tl.float32),)
        else:
            start += (tl.zeros((BLOCK,), tl.float32),)

    # sums[o]: the COLS sums of output row top + o. Unrolled, only rows begun and not stored hold registers.
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (start,)
    for r in tl.static_range(STRIDE * (ROWS - 1) + 3):
        columns = _load_row(
            x, image * h, top * STRIDE - 1 + r, column * STRIDE - 1, channel, h, w, C, STRIDE * (COLS - 1) + 3
        )
        updated = ()
        for o in tl.static_range(ROWS):
            if r >= o * STRIDE and r <= o * STRIDE + 2:
                total = _add_taps(sums[o], columns, weights, r - o * STRIDE, STRIDE, COLS)
                if r == o * STRIDE + 2:
                    _store_row(out, image * ho, top + o, column, channel, total, ho, wo, C, RELU6, COLS)
                updated += (total,)
            else:
                updated += (sums[o],)
        sums = updated


def depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stride: int,
    relu6: bool,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """act(depthwise 3x3 convolution of x, padding 1, + bias).

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, any strides; copied unless channels_last.
        weight: [C, 1, 3, 3], batch norm folded, the dtype and device of x; copied unless from `pack_weight`.
        bias: [C], likewise.
        stride: 1 or 2.
        relu6: whether act is min(max(y, 0), 6), NaN kept; the identity otherwise.
        out: [N, C, HO, WO], channels_last, filled and returned where it is given.
        tile: a row of the tile table, instead of the one for this GPU and size.

    Returns:
        [N, C, (H - 1) // stride + 1, (W - 1) // stride + 1], channels_last. Sums are float32, rounded once.

    Raises:
        ValueError: shapes, dtypes, devices or stride do not fit together, or x is too large (see `limit`).
    """
    _check(x, weight, bias, stride)
    n, c, h, w = x.shape
    ho, wo = (h - 1) // stride + 1, (w - 1) // stride + 1
    out, lines = output(out, (n, c, ho, wo), x)
    if out.numel():
        tile = choose_tile(x.device, x.shape, stride) if tile is None else tile
        _launch(channels_last(x), weight, bias, lines, stride, relu6=relu6, turned=False, tile=tile)
    return out


def convolve_turned(dy: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, tile: Tile) -> None:
    """Fill out [N, C, H, W], channels_last, with the convolution of dy by the weight, half turned."""
    lines = channels_last(out)
    _launch(channels_last(dy), weight, None, lines, 1, relu6=False, turned=True, tile=tile)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    stride: int,
    *,
    relu6: bool,
    turned: bool,
    tile: Tile,
) -> None:
    """Fill out [N, HO, WO, C] from x [N, H, W, C]."""
    (n, h, w, c), (_, ho, wo, _) = x.shape, out.shape
    taps = weight.permute(2, 3, 1, 0).contiguous()
    with torch.cuda.device_of(x):
        for some in batches(n):
            depthwise_kernel[grid(len(out[some]), c, ho, wo, tile)](
                x[some],
                taps,
                taps if bias is None else bias.contiguous(),
                out[some],
                h,
                w,
                ho,
                wo,
                C=c,
                STRIDE=stride,
                BIAS=bias is not None,
                RELU6=relu6,
                TURNED=turned,
                ROWS=tile["rows"],
                COLS=tile["cols"],
                BLOCK=tile["block"],
                num_warps=tile["warps"],
            )


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """The same [C, 1, 3, 3] weight with the channels innermost in memory, as the kernel reads it."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def grid(n: int, c: int, ho: int, wo: int, tile: Tile) -> tuple[int, int, int]:
    """Programs for an [n, c, ho, wo] output: runs of lanes, groups of rows, images."""
    return cdiv(cdiv(wo, tile["cols"]) * c, tile["block"]), cdiv(ho, tile["rows"]), n


def choose_tile(device: torch.device, shape: Sequence[int], stride: int) -> Tile:
    """The table's tile for x [N, C, H, W]: "large", or "small" where large ones would leave the GPU idle."""
    n, c, h, w = shape
    name, units = device_of(device)
    table = tiles(name, "depthwise")
    large = table[f"large_s{stride}"]
    programs = math.prod(grid(n, c, (h - 1) // stride + 1, (w - 1) // stride + 1, large))
    return large if programs >= 4 * units else table[f"small_s{stride}"]


def traffic(shape: Sequence[int], stride: int, item: int, tile: Tile, *, bias: bool = True) -> int:
    """Bytes that `depthwise` reads and writes for x [N, C, H, W], `item` a number.

    The unique addresses of each program, weights included, summed over programs. L2 serves a part.
    """
    n, c, h, w = shape
    ho, wo = (h - 1) // stride + 1, (w - 1) // stride + 1
    runs, groups, _ = grid(n, c, ho, wo, tile)
    rows, cols = ((stride * tile[key], -1, stride * (tile[key] - 1) + 3) for key in ("rows", "cols"))
    image = sum(span(group, group, *rows, h) for group in range(groups))
    image *= row_elements(runs, tile["block"], c, *cols, w)
    weights = runs * groups * min(tile["block"], c) * (10 if bias else 9)
    return n * (image + weights + c * ho * wo) * item


def span(first: int, last: int, step: int, begin: int, width: int, size: int) -> int:
    """How many of 0 to `size` - 1 windows `first` to `last` cover: each is `width` long, the one numbered 0
    begins at `begin`, the next one `step` further, which leaves no gap.
    """
    return max(0, min(last * step + begin + width, size) - max(first * step + begin, 0))


def row_elements(runs: int, block: int, c: int, step: int, begin: int, width: int, w: int) -> int:
    """Elements of one row [w, c] that the programs along it read, each its own once: `runs` of `block` lanes.

    A lane's patch is a window of columns, as `span` has it.
    """
    total = 0
    for lanes in (range(run * block, (run + 1) * block) for run in range(runs)):
        for channel in range(c):
            first, last = -((channel - lanes.start) // c), (lanes.stop - 1 - channel) // c
            if first <= last:
                total += span(first, last, step, begin, width, w)
    return total


@functools.cache
def pixels_under(first: int, last: int, ho: int, wo: int, h: int, w: int, stride: int) -> int:
    """How many pixels of h x w images lie under the 3 x 3 windows of output pixels `first` to `last` - 1,
    counted along rows and images.
    """
    under = set()
    for pixel in range(first, last):
        image, row, column = pixel // (ho * wo), pixel // wo % ho * stride - 1, pixel % wo * stride - 1
        for y, x in itertools.product(range(row, row + 3), range(column, column + 3)):
            if 0 <= y < h and 0 <= x < w:
                under.add((image, y, x))
    return len(under)


def compile_arguments(
    c: int, stride: int, relu6: bool, dtype: torch.dtype, tile: Tile, turned: bool = False
) -> dict[str, str | int | bool]:
    """The kernel's arguments as `aot.compile_for` takes them, for `c` channels; `turned`: as a gradient's."""
    pointers = dict.fromkeys(("x", "taps", "bias", "out"), POINTERS[dtype])
    sizes = dict.fromkeys(("h", "w", "ho", "wo"), "i32")
    constants = {"C": c, "STRIDE": stride, "BIAS": not turned, "RELU6": relu6, "TURNED": turned}
    constants |= {"ROWS": tile["rows"], "COLS": tile["cols"], "BLOCK": tile["block"]}
    return {**pointers, **sizes, **constants}


def limit(shape: torch.Size) -> str | None:
    """Why x of [N, C, H, W] is too large for the kernel, or None. The batch has no limit."""
    _, c, h, w = shape
    if w * c > ROW_LIMIT or h > GRID_LIMIT:
        return f"{tuple(shape)} has over {GRID_LIMIT} rows or {ROW_LIMIT} elements a row: split it"
    if h * w > PIXEL_LIMIT:
        return f"{tuple(shape)} has over {PIXEL_LIMIT} pixels an image: split it"
    return None


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, relu6: bool
) -> torch.Tensor:
    """The float64 twin of `depthwise`: same arguments, [N, C, HO, WO] float64."""
    y = F.conv2d(x.double(), weight.double(), bias.double(), stride, 1, groups=x.shape[1])
    return y.clamp(0, 6) if relu6 else y


def tolerance(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, want: torch.Tensor
) -> torch.Tensor:
    """How far `depthwise` may be from `want`, its float64 twin's answer: [N, C, HO, WO] float64.

    Nine products and nine sums are 18 float32 roundings by half an eps each, of values none larger than
    |x| conv |w| + |b|. The result is rounded once more to its own type, by half a step, subnormal at least.
    Where the inputs are infinite ReLU6 gives 0 or 6, and nothing may be missed.
    """
    size = reference(x.abs(), weight.abs(), bias.abs(), stride, False)
    own = torch.finfo(x.dtype)
    bound = 9 * torch.finfo(torch.float32).eps * size + own.eps / 2 * want.abs() + own.tiny * own.eps
    return bound.masked_fill(~size.isfinite(), 0)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {tuple(x.shape)}")
    c = x.shape[1]
    if weight.shape != (c, 1, 3, 3) or bias.shape != (c,):
        raise ValueError(
            f"x has {c} channels: weight must be {(c, 1, 3, 3)} and bias {(c,)}, "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if min(x.shape[2:]) < 1:
        raise ValueError(f"x must be at least 1x1, got {tuple(x.shape)}")
    if (too_large := limit(x.shape)) is not None:
        raise ValueError(too_large)
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    if x.dtype not in DTYPES or not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(
            f"x, weight and bias must share one of {[str(d) for d in DTYPES]}, "
            f"got {x.dtype}, {weight.dtype}, {bias.dtype}"
        )
    if not x.device == weight.device == bias.device:
        raise ValueError(f"x, weight and bias are on {x.device}, {weight.device}, {bias.device}: use one")
