"""Gradients of the depthwise 3x3 convolution on NHWC activations.

Of the input: at stride 1 it is the convolution of dy with the taps turned by half a turn, which `depthwise`
makes. At stride 2 every 2 x 2 pixels of the input are under 2 x 2 of dy, by one, two, two and four taps.

Of the weight: nine sums a channel over the pixels of all images. A lane, numbered as in `depthwise`, keeps
the nine for one channel of COLS neighbouring columns over a share of the rows, each loaded once for the up to
three rows of dy that it meets; `parts.add_parts` adds shares and columns. Nothing is atomic, so the bits are
the same every time.
"""

# Triton's language is not Python's: a tuple grows as a loop is unrolled, and arguments carry no annotations.
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: PLR0917

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch.nn.grad import conv2d_input, conv2d_weight

from . import depthwise
from . import parts as shares
from .common import (
    DTYPES,
    POINTERS,
    Tile,
    batches,
    cdiv,
    channels_last,
    device_of,
    output,
    tiles,
)
from .depthwise import _load_row, choose_tile, convolve_turned, limit, row_elements, span
from .parts import add_parts, number_of_parts


@triton.jit
def _pair_of_rows(taps, left, right, below_left, below_right):
    """What 2 x 2 of dy give to the 2 x 2 pixels of the input that they alone reach: by rows, four [BLOCK].

    Input row 2 r is under tap row 1 of output row r; row 2 r + 1 under tap row 2 of it and tap row 0 of the
    next. Columns likewise.
    """
    return (
        taps[4] * left,
        taps[5] * left + taps[3] * right,
        taps[7] * left + taps[1] * below_left,
        taps[8] * left + taps[6] * right + taps[2] * below_left + taps[0] * below_right,
    )


@triton.jit
def input_gradient_s2_kernel(
    dy,  # [N, HO, WO, C]
    taps,  # [9, C], row 3 * ky + kx
    dx,  # [N, H, W, C]
    h,
    w,
    ho,
    wo,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS pairs of rows of BLOCK lanes of one image; a lane is a channel of two columns."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.program_id(1) * ROWS
    image = tl.program_id(2).to(tl.int64)
    channel = lane % C
    pair = lane // C
    weights = ()
    for tap in tl.static_range(9):
        weights += (tl.load(taps + tap * C + channel).to(tl.float32),)
    upper = _load_row(dy, image * ho, top, pair, channel, ho, wo, C, 2)
    for r in tl.static_range(ROWS):
        lower = _load_row(dy, image * ho, top + r + 1, pair, channel, ho, wo, C, 2)
        values = _pair_of_rows(weights, upper[0], upper[1], lower[0], lower[1])
        for i in tl.static_range(2):
            row = 2 * (top + r) + i
            start = dx + (image * h + row) * (w * C) + (2 * pair * C + channel)
            for j in tl.static_range(2):
                inside = (row < h) & (2 * pair + j < w)
                tl.store(start + j * C, values[2 * i + j].to(dx.dtype.element_ty), mask=inside)
        upper = lower


@triton.jit
def _add_products(sums, columns, gradients, KY: tl.constexpr, STRIDE: tl.constexpr, COLS: tl.constexpr):
    """The nine sums plus what a row of x under tap row KY makes with the COLS gradients of a row of dy."""
    result = ()
    for tap in tl.static_range(9):
        total = sums[tap]
        if tap // 3 == KY:
            for i in tl.static_range(COLS):
                total += columns[i * STRIDE + tap % 3] * gradients[i]
        result += (total,)
    return result


@triton.jit(do_not_specialize=["n"])  # one binary for every batch
def weight_gradient_kernel(
    dy,  # [N, HO, WO, C]
    x,  # [N, H, W, C]
    parts,  # [P * patches, 9, C] float32
    n,
    h,
    w,
    ho,
    wo,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the nine sums of BLOCK lanes over one part of all groups of ROWS rows."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part, number = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    channel = lane % C
    patch = lane // C
    column = patch * COLS
    groups = (ho + ROWS - 1) // ROWS
    steps = n.to(tl.int64) * groups
    sums = ()
    for _ in tl.static_range(9):
        sums += (tl.zeros((BLOCK,), tl.float32),)
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        image = step // groups
        top = (step % groups).to(tl.int32) * ROWS
        gradients = ()
        for o in tl.static_range(ROWS):
            gradients += (_load_row(dy, image * ho, top + o, column, channel, ho, wo, C, COLS),)
        for r in tl.static_range(STRIDE * (ROWS - 1) + 3):
            columns = _load_row(
                x,
                image * h,
                top * STRIDE - 1 + r,
                column * STRIDE - 1,
                channel,
                h,
                w,
                C,
                STRIDE * (COLS - 1) + 3,
            )
            for o in tl.static_range(ROWS):
                if r >= o * STRIDE and r <= o * STRIDE + 2:
                    sums = _add_products(sums, columns, gradients[o], r - o * STRIDE, STRIDE, COLS)
    patches = (wo + COLS - 1) // COLS
    start = parts + (part * patches + patch) * (9 * C) + channel
    for tap in tl.static_range(9):
        tl.store(start + tap * C, sums[tap], mask=patch < patches)


def input_gradient(
    dy: torch.Tensor,
    weight: torch.Tensor,
    size: tuple[int, int],
    stride: int,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The gradient of the x of a `depthwise` convolution, from that of its result.

    Args:
        dy: [N, C, HO, WO], float32, float16 or bfloat16, any strides; copied unless channels_last.
        weight: [C, 1, 3, 3], dy's dtype and device; copied unless from `depthwise.pack_weight`.
        size: H and W of x.
        stride: 1 or 2.
        out: [N, C, H, W], channels_last, filled and returned where it is given.
        tile: a row of the tile table, instead of the one for this GPU and size.

    Returns:
        [N, C, H, W], channels_last. Sums are float32, rounded once.

    Raises:
        ValueError: shapes, dtypes, devices or stride do not fit together, or x is too large.
    """
    shape = torch.Size((*dy.shape[:2], *size))
    _check(dy, shape, stride, dy)
    if weight.shape != (shape[1], 1, 3, 3) or (weight.dtype, weight.device) != (dy.dtype, dy.device):
        raise ValueError(f"weight must be {(shape[1], 1, 3, 3)} of {dy.dtype} on {dy.device}")
    out, lines = output(out, shape, dy)
    if not out.numel():
        return out
    if stride == 1:
        convolve_turned(dy, weight, out, choose_tile(dy.device, dy.shape, 1) if tile is None else tile)
        return out
    tile = choose_input_tile(dy.device, shape) if tile is None else tile
    (n, h, w, c), image = lines.shape, channels_last(dy)
    taps = weight.permute(2, 3, 1, 0).contiguous()
    with torch.cuda.device_of(dy):
        for some in batches(n):
            grid = *_grid(shape, tile), len(lines[some])
            input_gradient_s2_kernel[grid](
                image[some],
                taps,
                lines[some],
                h,
                w,
                *dy.shape[2:],
                C=c,
                ROWS=tile["rows"],
                BLOCK=tile["block"],
                num_warps=tile["warps"],
            )
    return out


def weight_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    stride: int,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The gradient of the weight of a `depthwise` convolution of x, from that of its result.

    Args:
        dy: [N, C, HO, WO], float32, float16 or bfloat16, any strides; copied unless channels_last.
        x: [N, C, H, W], likewise, of dy's dtype and device.
        stride: 1 or 2.
        out: [C, 1, 3, 3] with the channels innermost (see `depthwise.pack_weight`), float32 or x's dtype,
            filled and returned where it is given.
        tile: a row of the tile table, instead of the one for this GPU.

    Returns:
        [C, 1, 3, 3] of x's dtype, channels innermost. Sums are float32, rounded once; the same bits at every
        call on one GPU.

    Raises:
        ValueError: shapes, dtypes, devices or stride do not fit together, or x is too large.
    """
    _check(dy, x.shape, stride, x)
    (n, c, h, w), (ho, wo) = x.shape, dy.shape[2:]
    if out is None:
        out = torch.empty((3, 3, 1, c), dtype=x.dtype, device=x.device).permute(3, 2, 0, 1)
    taps = out.permute(2, 3, 1, 0)
    if taps.shape != (3, 3, 1, c) or not taps.is_contiguous() or out.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"out must be {(c, 1, 3, 3)}, channels innermost, of float32 or {x.dtype}")
    if not x.numel():
        return out.zero_()
    name, units = device_of(x.device)
    tile = tiles(name, "depthwise_weight")[f"s{stride}"] if tile is None else tile
    programs, patches, number = _weight_grid(x.shape, stride, tile, units)
    parts = torch.empty((number * patches, 9, c), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        weight_gradient_kernel[programs, number](
            channels_last(dy),
            channels_last(x),
            parts,
            n,
            h,
            w,
            ho,
            wo,
            C=c,
            STRIDE=stride,
            ROWS=tile["rows"],
            COLS=tile["cols"],
            BLOCK=tile["block"],
            num_warps=tile["warps"],
        )
        add_parts(parts, taps)
    return out


def _grid(shape: Sequence[int], tile: Tile) -> tuple[int, int]:
    """Programs for one image of x [N, C, H, W]: runs of lanes, groups of pairs of rows."""
    _, c, h, w = shape
    return cdiv(cdiv(w, 2) * c, tile["block"]), cdiv(cdiv(h, 2), tile["rows"])


def _weight_grid(shape: Sequence[int], stride: int, tile: Tile, units: int) -> tuple[int, int, int]:
    """Of `weight_gradient` for x [N, C, H, W]: runs of lanes, patches of a row, and parts."""
    n, c, h, w = shape
    patches = cdiv((w - 1) // stride + 1, tile["cols"])
    programs = cdiv(patches * c, tile["block"])
    groups = cdiv((h - 1) // stride + 1, tile["rows"])
    return programs, patches, number_of_parts(n * groups, programs, units)


def choose_input_tile(device: torch.device, shape: Sequence[int]) -> Tile:
    """The table's tile for the gradient of x [N, C, H, W] at stride 2: "large", or "small" where large ones
    would leave the GPU idle.
    """
    name, units = device_of(device)
    table = tiles(name, "depthwise_input_s2")
    lanes, rows = _grid(shape, table["large"])
    return table["large" if lanes * rows * shape[0] >= 4 * units else "small"]


def input_traffic(shape: Sequence[int], stride: int, item: int, tile: Tile) -> int:
    """Bytes that `input_gradient` reads and writes for x [N, C, H, W], as `depthwise.traffic` counts them."""
    if stride == 1:
        return depthwise.traffic(shape, 1, item, tile, bias=False)
    n, c, h, w = shape
    ho, wo = (h + 1) // 2, (w + 1) // 2
    runs, groups = _grid(shape, tile)
    gradients = sum(span(group, group, tile["rows"], 0, tile["rows"] + 1, ho) for group in range(groups))
    gradients *= row_elements(runs, tile["block"], c, 1, 0, 2, wo)
    weights = runs * groups * min(tile["block"], c) * 9
    return n * (gradients + weights + c * h * w) * item


def weight_traffic(
    shape: Sequence[int], stride: int, item: int, tile: Tile, units: int = 1, out_item: int | None = None
) -> int:
    """Bytes that `weight_gradient` reads and writes for x [N, C, H, W] on a GPU of so many multiprocessors.

    As `depthwise.traffic` counts them, those of adding the parts included; `out_item`: of the result's
    numbers where they are not as x's.
    """
    n, c, h, w = shape
    ho, wo = (h - 1) // stride + 1, (w - 1) // stride + 1
    runs, patches, number = _weight_grid(shape, stride, tile, units)
    rows, cols, groups = tile["rows"], tile["cols"], cdiv(ho, tile["rows"])
    x_rows = dy_rows = 0
    for part in range(number):
        first, end = part * n * groups // number, (part + 1) * n * groups // number
        for image in range(first // groups, cdiv(end, groups)):
            # The part's groups of rows that are of this image.
            some = max(first - image * groups, 0), min(end - image * groups, groups) - 1
            x_rows += span(*some, stride * rows, -1, stride * (rows - 1) + 3, h)
            dy_rows += span(*some, rows, 0, rows, ho)
    read = x_rows * row_elements(runs, tile["block"], c, stride * cols, -1, stride * (cols - 1) + 3, w)
    read += dy_rows * row_elements(runs, tile["block"], c, cols, 0, cols, wo)
    sums = number * patches
    return read * item + sums * 9 * c * 4 + shares.traffic(sums, 9 * c, out_item or item)


def input_arguments(c: int, dtype: torch.dtype, tile: Tile) -> dict[str, str | int | bool]:
    """The arguments of the stride 2 kernel of `input_gradient` as `aot.compile_for` takes them."""
    pointers = dict.fromkeys(("dy", "taps", "dx"), POINTERS[dtype])
    sizes = dict.fromkeys(("h", "w", "ho", "wo"), "i32")
    return {**pointers, **sizes, "C": c, "ROWS": tile["rows"], "BLOCK": tile["block"]}


def weight_arguments(c: int, stride: int, dtype: torch.dtype, tile: Tile) -> dict[str, str | int | bool]:
    """The arguments of the kernel of `weight_gradient` as `aot.compile_for` takes them."""
    pointers = {"dy": POINTERS[dtype], "x": POINTERS[dtype], "parts": "*fp32"}
    sizes = dict.fromkeys(("n", "h", "w", "ho", "wo"), "i32")
    constants = {"C": c, "STRIDE": stride, "ROWS": tile["rows"], "COLS": tile["cols"], "BLOCK": tile["block"]}
    return {**pointers, **sizes, **constants}


def reference_input(
    dy: torch.Tensor, weight: torch.Tensor, size: tuple[int, int], stride: int
) -> torch.Tensor:
    """The float64 twin of `input_gradient`: same arguments, [N, C, H, W] float64."""
    shape = (*dy.shape[:2], *size)
    return conv2d_input(shape, weight.double(), dy.double(), stride, 1, groups=shape[1])


def reference_weight(dy: torch.Tensor, x: torch.Tensor, stride: int) -> torch.Tensor:
    """The float64 twin of `weight_gradient`: same arguments, [C, 1, 3, 3] float64."""
    c = x.shape[1]
    return conv2d_weight(x.double(), (c, 1, 3, 3), dy.double(), stride, 1, groups=c)


def tolerance(want: torch.Tensor, size: torch.Tensor, terms: int, dtype: torch.dtype) -> torch.Tensor:
    """How far a gradient of `dtype` may be from `want`, its float64 twin's answer; `size`: the twin's of
    |inputs|.

    The errors of `terms` products and sums grow as the root of their number where they are random: ten of
    their standard deviations, each an eps of float32. The result is rounded once more, by half a step,
    subnormal at least.
    """
    own = torch.finfo(dtype)
    relative = (10 * terms**0.5 + 3) * torch.finfo(torch.float32).eps
    bound = relative * size + own.eps / 2 * want.abs() + own.tiny * own.eps
    return bound.nan_to_num(0, 0)


def _check(dy: torch.Tensor, shape: torch.Size, stride: int, x: torch.Tensor) -> None:
    """Look whether dy and an x of `shape` belong together."""
    if dy.dim() != 4 or len(shape) != 4 or min(shape[2:]) < 1:
        raise ValueError(f"dy {tuple(dy.shape)} and x {tuple(shape)} must be [N, C, H, W], at least 1x1")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    n, c, h, w = shape
    want = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    if dy.shape != want:
        raise ValueError(f"at stride {stride} x {tuple(shape)} needs dy {want}, got {tuple(dy.shape)}")
    if (too_large := limit(shape)) is not None:
        raise ValueError(too_large)
    if dy.dtype not in DTYPES or (dy.dtype, dy.device) != (x.dtype, x.device):
        raise ValueError(f"dy is {dy.dtype} on {dy.device}, x {x.dtype} on {x.device}: use one of each")
