"""Depthwise 3x3 convolution in a training step: raw outputs in and out, see `train_pointwise`.

A lane is one channel of a patch of neighbouring columns, as in `depthwise`, but a program has whole rows of
an image for a few channels, and goes down the rows of one image after another. So it reads each input once
but for the rows that two of its steps share, which are in the cache, keeps weights, norm and sums in
registers, and adds its lanes of a channel up itself. Backward, one reading of g, z and x makes both
gradients.
"""

# Triton's language is not Python's: a tuple grows as a loop is unrolled, and arguments carry no annotations.
# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
# ruff: noqa: PLR0917

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import Tile, cdiv, device_of, next_power_of_2, tiles
from .depthwise import _add_taps
from .norm import (
    Applied,
    RawGradient,
    gradient_rows,
    lanes_together,
    masked,
    merged,
    normalized,
    raw_gradient,
    store_moments,
    store_sums,
    three,
)
from .parts import add_parts, number_of_parts

# Bytes that memory moves at once. Rows of 112 columns would leave a program 4 channels, 8 bytes of them.
SECTOR = 32


@triton.jit
def _read_row(
    x,
    norm,
    place,
    channel,
    size,
    C: tl.constexpr,
    NORM: tl.constexpr,
    RELU6: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """WIDTH neighbouring columns of one row of an image, with its norm applied, as a tuple of float32
    [patches, channels]; zero outside it.

    `place`: the rows of the images before (64 bits), the row within the image, the first column. `size`:
    height and width.
    """
    first, row, column = place
    h, w = size
    start = x + (first + row) * (w * C) + (column * C + channel)
    values = ()
    for i in tl.static_range(WIDTH):
        inside = (channel < C) & (column + i >= 0) & (column + i < w) & (row >= 0) & (row < h)
        value = tl.load(start + i * C, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            # The padding is of zeros after the norm, not before.
            value = tl.where(inside, normalized(value, norm[0], norm[1], norm[2], RELU6), 0.0)
        values += (value,)
    return values


@triton.jit
def _read_gradient_row(
    g,
    z,
    of_z,
    place,
    channel,
    size,
    C: tl.constexpr,
    MASK: tl.constexpr,
    BATCH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """As `_read_row`, of the gradient of the raw output z. `of_z`: what `gradient_rows` gives."""
    first, row, column = place
    h, w = size
    start = (first + row) * (w * C) + (column * C + channel)
    values = ()
    for i in tl.static_range(WIDTH):
        inside = (channel < C) & (column + i >= 0) & (column + i < w) & (row >= 0) & (row < h)
        gradient = tl.load(g + start + i * C, mask=inside, other=0.0).to(tl.float32)
        raw = gradient
        if MASK or BATCH:
            raw = tl.load(z + start + i * C, mask=inside, other=0.0).to(tl.float32)
        dz = raw_gradient(gradient, raw, of_z[0], of_z[1], MASK, BATCH)
        values += (tl.where(inside, dz, 0.0),)
    return values


@triton.jit
def _taps_of_pixel(weights, taps, window, a, ROW: tl.constexpr, COLUMN: tl.constexpr, STRIDE: tl.constexpr):
    """The gradient of a pixel of x, and the weight's sums with what its value `a` adds to them.

    The pixel is in one of the STRIDE rows and STRIDE * COLS columns of a step.
    """
    dx = tl.zeros_like(a)
    updated = ()
    for tap in tl.static_range(9):
        total = weights[tap]
        if STRIDE == 1:
            dz = window[2 - tap // 3][COLUMN + 2 - tap % 3]
            dx += taps[tap] * dz
            total += a * dz
        elif (tap // 3 == 1) == (ROW == 0) and (tap % 3 == 1) == (COLUMN % 2 == 0):
            dz = window[1 if tap // 3 == 0 else 0][COLUMN // 2 + (1 if tap % 3 == 0 else 0)]
            dx += taps[tap] * dz
            total += a * dz
        updated += (total,)
    return dx, updated


@triton.jit
def _pass_back(dx, raw, norm, at, inside, total, product, NORM: tl.constexpr, RELU6: tl.constexpr):
    """Store the gradient of a pixel of x; with a norm, masked by its ReLU6 and added to its sums."""
    if NORM and RELU6:
        dx = masked(dx, raw, norm[0], norm[1], norm[2])
    stored = dx.to(at.dtype.element_ty)
    tl.store(at, stored, mask=inside)
    if NORM:
        # Of what the layer before will read, so after rounding.
        dx = tl.where(inside, stored.to(tl.float32), 0.0)
        total += dx
        product += dx * (raw - norm[0])
    return total, product


@triton.jit
def _store_nine(parts, place, channel, sums, C: tl.constexpr):
    """Store the nine sums of a program's lanes, [patches, channels] each, as one part of [P, C, 9]."""
    for tap in tl.static_range(9):
        at = parts + (place * C + channel) * 9 + tap
        tl.store(at, tl.sum(sums[tap], 0), mask=channel < C)


@triton.jit
def _without_first(window, STRIDE: tl.constexpr):
    """The rows but the first: of three at stride 1, of two at stride 2."""
    return (window[1], window[2]) if STRIDE == 1 else (window[1],)


@triton.jit
def _across(rows, channel, C: tl.constexpr):
    """The three rows of a [3, C] array as [1, channels]."""
    first, second, third = three(rows, channel, C)
    return first[None, :], second[None, :], third[None, :]


@triton.jit
def _nine(weight, channel, C: tl.constexpr):
    """The nine taps of a weight [C, 1, 3, 3], each float32 [1, channels]."""
    taps = ()
    for tap in tl.static_range(9):
        value = tl.load(weight + channel * 9 + tap, mask=channel < C, other=0.0)
        taps += (value.to(tl.float32)[None, :],)
    return taps


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    x,  # [N, H, W, C]
    x_values,  # [3, C] float32, the norm of x; not read without NORM
    weight,  # [C, 1, 3, 3], of any type
    out,  # [N, HO, WO, C]
    parts,  # [P * column runs, 3, C] float32; not written without MOMENTS
    n,
    h,
    w,
    ho,
    wo,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    NORM: tl.constexpr,
    RELU6: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PATCHES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program: CHANNELS channels of PATCHES patches over one part of all groups of ROWS output rows."""
    each = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel = each[None, :]
    run, part, number = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    column = ((run * PATCHES + tl.arange(0, PATCHES)) * COLS)[:, None]
    norm = _across(x_values, each, C) if NORM else (0.0, 0.0, 0.0)
    taps = _nine(weight, each, C)
    zero = tl.zeros((PATCHES, CHANNELS), tl.float32)
    count, mean, spread = zero, zero, zero
    groups = (ho + ROWS - 1) // ROWS
    steps = n.to(tl.int64) * groups
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        image = step // groups
        top = (step % groups).to(tl.int32) * ROWS
        some, total, square, origin = zero, zero, zero, mean
        sums = ()
        for _ in tl.static_range(ROWS):
            row = ()
            for _ in tl.static_range(COLS):
                row += (zero,)
            sums += (row,)
        for r in tl.static_range(STRIDE * (ROWS - 1) + 3):
            place = (image * h, top * STRIDE - 1 + r, column * STRIDE - 1)
            columns = _read_row(x, norm, place, channel, (h, w), C, NORM, RELU6, STRIDE * (COLS - 1) + 3)
            updated = ()
            for o in tl.static_range(ROWS):
                row = sums[o]
                if r >= o * STRIDE and r <= o * STRIDE + 2:
                    row = _add_taps(row, columns, taps, r - o * STRIDE, STRIDE, COLS)
                if r == o * STRIDE + 2:
                    start = out + (image * ho + top + o) * (wo * C) + (column * C + channel)
                    for i in tl.static_range(COLS):
                        inside = (channel < C) & (column + i < wo) & (top + o < ho)
                        stored = row[i].to(out.dtype.element_ty)
                        tl.store(start + i * C, stored, mask=inside)
                        if MOMENTS:
                            # About the mean so far, at first about the first value: no digits are lost.
                            value = stored.to(tl.float32)
                            if o == 0 and i == 0:
                                origin = tl.where(count > 0, mean, value)
                            distance = tl.where(inside, value - origin, 0.0)
                            some += inside.to(tl.float32)
                            total += distance
                            square += distance * distance
                updated += (row,)
            sums = updated
        if MOMENTS:
            middle = total / tl.where(some > 0, some, 1.0)
            within = square - total * middle
            within = tl.where(within < 0, 0.0, within)  # by rounding; a maximum would drop NaN
            count, mean, spread = merged(count, origin, spread, some, middle, within)
    if MOMENTS:
        place = part * tl.num_programs(1) + run
        total, middle, within = lanes_together(count, mean, spread)
        store_moments(parts, place, each, total, middle, within, C)


@triton.jit(do_not_specialize=["n"])
def gradients_kernel(
    g,  # [N, HO, WO, C]
    z,  # [N, HO, WO, C]; not read without MASK or BATCH
    z_values,  # [3, C] float32
    coefficients,  # [3, C] float32
    weight,  # [C, 1, 3, 3], of any type
    x,  # [N, H, W, C]
    x_values,  # [3, C] float32, the norm of x; not read without NORM
    out,  # [N, H, W, C]; not written without FOR_X
    parts,  # [P * column runs, 2, C] float32; not written without FOR_X and NORM
    weight_parts,  # [P * column runs, C, 9] float32; not written without FOR_WEIGHT
    n,
    h,
    w,
    ho,
    wo,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    MASK: tl.constexpr,
    BATCH: tl.constexpr,
    NORM: tl.constexpr,
    RELU6: tl.constexpr,
    FOR_X: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PATCHES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program: CHANNELS channels of PATCHES patches over one part of all groups of ROWS output rows.

    A patch has COLS columns of g and the STRIDE * COLS columns of x above them. Row y of g is with the STRIDE
    rows of x from STRIDE * y on. These, at stride 1, are under tap row 0 of row y + 1 of g, 1 of y and 2 of
    y - 1; at stride 2 the first is under tap row 1 of y, the second under 2 of y and 0 of y + 1. Columns
    likewise.
    """
    each = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel = each[None, :]
    run, part, number = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    column = ((run * PATCHES + tl.arange(0, PATCHES)) * COLS)[:, None]
    of_z = gradient_rows(z_values, coefficients, each, C, MASK, BATCH)
    norm = _across(x_values, each, C) if NORM else (0.0, 0.0, 0.0)
    taps = _nine(weight, each, C)
    zero = tl.zeros((PATCHES, CHANNELS), tl.float32)
    total, product = zero, zero
    weights = ()
    for _ in tl.static_range(9):
        weights += (zero,)
    # The rows and columns of g that a pixel of x is under begin so far before its own.
    BEFORE: tl.constexpr = 2 - STRIDE
    WIDTH: tl.constexpr = COLS + 1 + BEFORE
    groups = (ho + ROWS - 1) // ROWS
    steps = n.to(tl.int64) * groups
    for step in tl.range(part * steps // number, (part + 1) * steps // number):
        image = step // groups
        top = (step % groups).to(tl.int32) * ROWS
        window = ()
        for r in tl.static_range(-BEFORE, 1):
            place = (image * ho, top + r, column - BEFORE)
            window += (_read_gradient_row(g, z, of_z, place, channel, (ho, wo), C, MASK, BATCH, WIDTH),)
        for r in tl.static_range(ROWS):
            place = (image * ho, top + r + 1, column - BEFORE)
            window += (_read_gradient_row(g, z, of_z, place, channel, (ho, wo), C, MASK, BATCH, WIDTH),)
            for i in tl.static_range(STRIDE):
                row = (top + r) * STRIDE + i
                start = (image * h + row) * (w * C) + (column * STRIDE * C + channel)
                for j in tl.static_range(STRIDE * COLS):
                    inside = (channel < C) & (column * STRIDE + j < w) & (row < h)
                    raw = zero
                    if NORM or FOR_WEIGHT:
                        raw = tl.load(x + start + j * C, mask=inside, other=0.0).to(tl.float32)
                    a = raw
                    if NORM:
                        a = tl.where(inside, normalized(raw, norm[0], norm[1], norm[2], RELU6), 0.0)
                    dx, updated = _taps_of_pixel(weights, taps, window, a, i, j, STRIDE)
                    if FOR_WEIGHT:
                        weights = updated
                    if FOR_X:
                        at = out + start + j * C
                        total, product = _pass_back(dx, raw, norm, at, inside, total, product, NORM, RELU6)
            window = _without_first(window, STRIDE)
    place = part * tl.num_programs(1) + run
    if FOR_X and NORM:
        store_sums(parts, place, each, tl.sum(total, 0), tl.sum(product, 0), C)
    if FOR_WEIGHT:
        _store_nine(weight_parts, place, each, weights, C)


def forward(
    x: torch.Tensor,
    norm: Applied | None,
    weight: torch.Tensor,
    stride: int,
    *,
    moments: bool,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The raw output of a depthwise 3x3 convolution with padding 1, and the moments of it.

    Args:
        x: [N, H, W, C], float32, float16 or bfloat16, contiguous, within `depthwise.limit`.
        norm: applied to x first; None for none.
        weight: [C, 1, 3, 3], contiguous, of any type.
        stride: 1 or 2.
        moments: are wanted.
        tile: a row of the tile table, instead of the one for this GPU.

    Returns:
        [N, HO, WO, C] of x's dtype, sums in float32, rounded once; [P, 3, C] as `norm.normalize` takes them.
    """
    n, h, w, c = x.shape
    ho, wo = (h - 1) // stride + 1, (w - 1) // stride + 1
    z = torch.empty((n, ho, wo, c), dtype=x.dtype, device=x.device)
    tile = choose_tile(x, "forward", stride, wo) if tile is None else tile
    grid = _grid(x.device, n, c, ho, wo, tile)
    parts = None
    if moments:
        parts = torch.empty((grid[1] * grid[2], 3, c), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        forward_kernel[grid](
            x,
            x if norm is None else norm.values,
            weight,
            z,
            z if parts is None else parts,
            n,
            h,
            w,
            ho,
            wo,
            C=c,
            STRIDE=stride,
            NORM=norm is not None,
            RELU6=norm is not None and norm.relu6,
            MOMENTS=moments,
            **constants(tile),
            num_warps=tile["warps"],
        )
    return z, parts


def gradients(
    of: RawGradient,
    weight: torch.Tensor,
    x: torch.Tensor,
    norm: Applied | None,
    stride: int,
    *,
    for_x: bool = True,
    for_weight: bool = True,
    tile: Tile | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `forward`, whose x, norm, weight and stride these are; the rest and what it returns as
    `train_pointwise.gradients` has it.
    """
    n, h, w, c = x.shape
    ho, wo = of.z.shape[1:3]
    tile = choose_tile(x, "gradients", stride, wo) if tile is None else tile
    grid = _grid(x.device, n, c, ho, wo, tile)
    number = grid[1] * grid[2]
    dx = torch.empty_like(x) if for_x else None
    parts = weight_parts = dw = None
    if for_x and norm is not None:
        parts = torch.empty((number, 2, c), dtype=torch.float32, device=x.device)
    if for_weight:
        weight_parts = torch.empty((number, c, 9), dtype=torch.float32, device=x.device)
        dw = torch.empty((c, 1, 3, 3), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        gradients_kernel[grid](
            of.g,
            of.z,
            of.values,
            of.coefficients,
            weight,
            x,
            of.values if norm is None else norm.values,
            x if dx is None else dx,
            of.coefficients if parts is None else parts,
            of.coefficients if weight_parts is None else weight_parts,
            n,
            h,
            w,
            ho,
            wo,
            C=c,
            STRIDE=stride,
            MASK=of.mask,
            BATCH=of.batch,
            NORM=norm is not None,
            RELU6=norm is not None and norm.relu6,
            FOR_X=for_x,
            FOR_WEIGHT=for_weight,
            **constants(tile),
            num_warps=tile["warps"],
        )
        if weight_parts is not None and dw is not None:
            add_parts(weight_parts, dw)
    return dx, parts, dw


def choose_tile(x: torch.Tensor, what: str, stride: int, wo: int) -> dict[str, int]:
    """The table's tile for x and an output of wo columns: the patches that these take, but channels for a
    sector at least.
    """
    tile = tiles(device_of(x.device)[0], "train_depthwise")[f"{what}_s{stride}"]
    most = max(1, tile["lanes"] * x.element_size() // SECTOR)
    patches = min(tile["patches"], most, next_power_of_2(cdiv(wo, tile["cols"])))
    return {**tile, "patches": patches, "channels": tile["lanes"] // patches}


def constants(tile: Tile) -> dict[str, int]:
    """A tile as the kernels' constants."""
    return {name.upper(): tile[name] for name in ("rows", "cols", "patches", "channels")}


def _grid(device: torch.device, n: int, c: int, ho: int, wo: int, tile: Tile) -> tuple[int, int, int]:
    """Programs: runs of channels, runs of columns, parts."""
    channels, columns = cdiv(c, tile["channels"]), cdiv(wo, tile["cols"] * tile["patches"])
    return (
        channels,
        columns,
        number_of_parts(n * cdiv(ho, tile["rows"]), channels * columns, device_of(device)[1]),
    )
