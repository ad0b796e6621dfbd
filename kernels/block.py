"""A whole inverted residual in one launch, for sm_90, in Gluon: hidden activations never leave the chip.

A program makes a tile of the output. Its input, with the halo, lies in shared memory. Then, SLAB hidden
channels at a time: tensor cores expand them for all pixels of the tile (wgmma, float32 sums), ReLU6 of them
goes to a second shared buffer, the depthwise convolution reads each row of that buffer three times, shifted
by a pixel, and keeps the unfinished rows in registers, and tensor cores add what the slab gives to the
projection.

- A tile is ROWS x SLOTS pixels, a slot for each column. IMAGES images lie side by side, PITCH slots each;
  slots past an image's last column are zero, the padding of both neighbours. The tile begins ABOVE rows and
  LEFT columns before what it makes.
- The expansion's bias is in two spare rows of its weight (the number, and what rounding took of it). x has
  two spare columns, one inside of the image and zero outside: neither bias nor padding costs a thing.
- Shared memory is viewed at any pixel: SLAB channels of a pixel and PAD more, against bank conflicts, are a
  row of the view, and views of one allocation may begin at each row.
- The weights of the next slab arrive (cp.async) while this one is worked on.
- N is split at powers of two, 160 = 128 + 32: padded to 256 it would multiply 1.6 times as much.

No interpreter runs Gluon: tests execute this source by numpy, and compile it. It has not run on a GPU.
"""

# Gluon's language is not Python's: arguments carry no annotations.
# mypy: disable-error-code="no-untyped-def,assignment,no-untyped-call,valid-type"
# ruff: noqa: PLR0917

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import PropagateNan

PAD = gl.constexpr(8)  # 16-bit numbers after each pixel of the hidden tile
KEEP_NAN = gl.constexpr(PropagateNan.ALL)
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6


@gluon.jit
def _relu6(v, D: gl.constexpr, layout: gl.constexpr):
    """ReLU6 of v in type D. float16 is rounded before, for two are clamped by one instruction."""
    if gl.float16 == D:
        v = v.to(D)
    zero, six = gl.full(v.shape, 0.0, v.dtype, layout), gl.full(v.shape, 6.0, v.dtype, layout)
    return gl.minimum(gl.maximum(v, zero, propagate_nan=KEEP_NAN), six, propagate_nan=KEEP_NAN).to(D)


@gluon.jit
def _first(
    HO: gl.constexpr, WO: gl.constexpr, IMAGES: gl.constexpr, OUT_ROWS: gl.constexpr, OUT_COLS: gl.constexpr
):  # fmt: skip
    """The first image, row and column of the output that this program makes."""
    tall: gl.constexpr = (HO + OUT_ROWS - 1) // OUT_ROWS
    broad: gl.constexpr = (WO + OUT_COLS - 1) // OUT_COLS
    program = gl.program_id(0)
    return program // (tall * broad) * IMAGES, program // broad % tall * OUT_ROWS, program % broad * OUT_COLS


@gluon.jit
def _matrices(D: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Shared memory for matrices as tensor cores read them."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128 if COLUMNS >= 64 else 2 * COLUMNS, 16, 2)
    return gl.allocate_shared_memory(D, [COUNT, ROWS, COLUMNS], layout)


@gluon.jit
def _weight_buffers(
    D: gl.constexpr, SLAB: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr,
    N1: gl.constexpr, N2: gl.constexpr,
):  # fmt: skip
    """Room for the weights of two slabs: of the expansion, and of the projection's two products."""
    w1 = _matrices(D, 2 * STEPS, K, SLAB)
    w2 = _matrices(D, 2, SLAB, N1)
    w3 = _matrices(D, 2, SLAB, N2) if N2 > 0 else w2
    return w1, w2, w3


@gluon.jit
def _tile_buffers(
    D: gl.constexpr, PIXELS: gl.constexpr, CHUNK: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr,
    SLAB: gl.constexpr, STRIDE: gl.constexpr, LINES: gl.constexpr, OUT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Room for the tile's input, and for a slab of its hidden activations before and after the depthwise
    convolution, which makes LINES rows of OUT pixels.
    """
    groups: gl.constexpr = (SLAB + PAD) // 8
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tile = _matrices(D, PIXELS // CHUNK * STEPS, CHUNK, K)
    hidden = gl.allocate_shared_memory(D, [(PIXELS + 2 * STRIDE + 8) * groups, 1, 8], plain)
    made = _matrices(D, LINES, OUT, SLAB)
    small: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [WARPS, 1], [1, 0])
    # The left neighbour of the first slot. Right of the last one lies what no pixel of the output looks at.
    hidden.index(0)._reinterpret(D, [16, 8], plain).store(gl.full([16, 8], 0.0, D, small))
    return tile, hidden, made


@gluon.jit
def _copy(target, source, pitch, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Begin to copy a [ROWS, COLUMNS] matrix whose rows are `pitch` apart into shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(target, source + row[:, None] * pitch + column[None, :])


@gluon.jit
def _copy_slab(
    expand, project, w1, w2, w3, slab,
    HIDDEN: gl.constexpr, SLAB: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr,
    N1: gl.constexpr, N2: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Begin to copy the weights of a slab into that half of the buffers that is its."""
    half = slab % 2
    for step in gl.static_range(STEPS):
        _copy(w1.index(half * STEPS + step), expand + step * K * HIDDEN + slab * SLAB, HIDDEN, K, SLAB, WARPS)
    rows = project + slab * SLAB * (N1 + N2)
    _copy(w2.index(half), rows, N1 + N2, SLAB, N1, WARPS)
    if N2 > 0:
        _copy(w3.index(half), rows + N1, N1 + N2, SLAB, N2, WARPS)
    async_copy.commit_group()


@gluon.jit
def _place(
    pixel, image, images, top, left,
    H: gl.constexpr, W: gl.constexpr, SLOTS: gl.constexpr, PITCH: gl.constexpr,
    USED_ROWS: gl.constexpr, USED: gl.constexpr,
):  # fmt: skip
    """Row, column and image (from the program's first on) of a tile's pixels, and whether they are in it."""
    slot = pixel % SLOTS
    row = pixel // SLOTS + top
    column = slot % PITCH + left
    other = slot // PITCH
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    inside = inside & (row < top + USED_ROWS) & (slot % PITCH < USED) & (image + other < images)
    return row, column, other, inside


@gluon.jit
def _load_x(
    x, tile, image, images, top, left,
    H: gl.constexpr, W: gl.constexpr, CIN: gl.constexpr, SLOTS: gl.constexpr, PITCH: gl.constexpr,
    USED_ROWS: gl.constexpr, USED: gl.constexpr, PIXELS: gl.constexpr, CHUNK: gl.constexpr,
    K: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The tile's input, PIXELS / CHUNK * STEPS matrices [CHUNK, K], with the columns of the bias."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [WARPS, 1], [1, 0])
    pixel = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    channel = gl.arange(0, K, gl.SliceLayout(0, layout))
    for chunk in gl.static_range(PIXELS // CHUNK):
        row, column, other, inside = _place(
            pixel + chunk * CHUNK, image, images, top, left, H, W, SLOTS, PITCH, USED_ROWS, USED
        )
        line = ((other * H + row) * W + column) * CIN
        for step in gl.static_range(STEPS):
            c = step * K + channel
            v = gl.load(x + line[:, None] + c[None, :], mask=inside[:, None] & (c < CIN)[None, :], other=0.0)
            if (step + 1) * K > CIN:
                one = gl.full([CHUNK, K], 1.0, v.dtype, layout)
                v = gl.where(inside[:, None] & ((c >= CIN) & (c < CIN + 2))[None, :], one, v)
            tile.index(chunk * STEPS + step).store(v)


@gluon.jit
def _gather_x(
    x, tile, norm, image, images, top, left, image_step, channel_step, row_step, column_step,
    H: gl.constexpr, W: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, BYTES: gl.constexpr,
    SLOTS: gl.constexpr, PITCH: gl.constexpr, USED_ROWS: gl.constexpr, USED: gl.constexpr,
    PIXELS: gl.constexpr, CHUNK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """As `_load_x`, for the stem: a pixel's inputs are the 27 numbers of a photo under its window."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    D: gl.constexpr = tile.dtype
    pixel = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    k = gl.arange(0, 32, gl.SliceLayout(0, layout))
    # Column k: channel k // 9 under tap k % 9, in the order of the weight.
    source = (k // 9).to(gl.int64) * channel_step
    for chunk in gl.static_range(PIXELS // CHUNK):
        row, column, other, inside = _place(
            pixel + chunk * CHUNK, image, images, top, left, H, W, SLOTS, PITCH, USED_ROWS, USED
        )
        line = (2 * row)[:, None] - 1 + (k % 9 // 3)[None, :]
        at = (2 * column)[:, None] - 1 + (k % 3)[None, :]
        seen = inside[:, None] & (k < 27)[None, :]
        seen = seen & (line >= 0) & (line < HEIGHT) & (at >= 0) & (at < WIDTH)
        offset = (image + other).to(gl.int64)[:, None] * image_step + source[None, :]
        offset = offset + line.to(gl.int64) * row_step + at.to(gl.int64) * column_step
        v = gl.load(x + offset, mask=seen, other=0)
        if BYTES:
            scale = gl.load(norm + k // 9, mask=k < 27, other=0.0)[None, :]
            shift = gl.load(norm + 3 + k // 9, mask=k < 27, other=0.0)[None, :]
            v = gl.where(seen, v.to(gl.float32) * scale + shift, gl.zeros([CHUNK, 32], gl.float32, layout))
        one = gl.full([CHUNK, 32], 1.0, D, layout)
        bias = inside[:, None] & ((k >= 27) & (k < 29))[None, :]
        tile.index(chunk).store(gl.where(bias, one, v.to(D)))


@gluon.jit
def _expand(
    tile, w1, hidden, half,
    PIXELS: gl.constexpr, CHUNK: gl.constexpr, SLAB: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """ReLU6 of the expansion of a slab, for every pixel of the tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SLAB, 16])
    view: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[SLAB, PAD]], [CHUNK, SLAB], [1, 0])
    groups: gl.constexpr = (SLAB + PAD) // 8  # of eight numbers in a pixel
    for chunk in gl.static_range(PIXELS // CHUNK):
        sums = gl.zeros([CHUNK, SLAB], gl.float32, layout)
        for step in gl.static_range(STEPS):
            sums = warpgroup_mma(
                tile.index(chunk * STEPS + step), w1.index(half * STEPS + step), sums, is_async=True
            )
        sums = warpgroup_mma_wait(0, [sums])
        value = _relu6(sums, hidden.dtype, layout)
        # The first pixel is the left neighbour of the first slot: zero, as `block_kernel` leaves it.
        hidden.index((1 + chunk * CHUNK) * groups)._reinterpret(hidden.dtype, [CHUNK, SLAB], view).store(
            value
        )


@gluon.jit
def _row(
    hidden, pixel, SLAB: gl.constexpr, OUT: gl.constexpr, STRIDE: gl.constexpr, SUMS: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Each STRIDE-th of OUT * STRIDE pixels of the hidden tile, from `pixel` on: [OUT, SLAB]."""
    groups: gl.constexpr = (SLAB + PAD) // 8
    view: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[SLAB, PAD]], [OUT, STRIDE * SLAB], [1, 0])
    rows = hidden.index((1 + pixel) * groups)._reinterpret(hidden.dtype, [OUT, STRIDE * SLAB], view)
    if STRIDE == 2:
        rows = rows.slice(0, SLAB, 1)
    return rows.load(layout).to(SUMS)


@gluon.jit
def _taps(depthwise, ky: gl.constexpr, e, HIDDEN: gl.constexpr, SUMS: gl.constexpr):
    """The three weights of a row of the window, [1, SLAB] each."""
    at = depthwise + 3 * ky * HIDDEN + e
    return (
        gl.load(at).to(SUMS)[None, :],
        gl.load(at + HIDDEN).to(SUMS)[None, :],
        gl.load(at + 2 * HIDDEN).to(SUMS)[None, :],
    )


@gluon.jit
def _add(sums, row, taps):
    """The sums plus what a row gives them, in three steps: as one expression it compiles to one more."""
    sums += row[0] * taps[0]
    sums += row[1] * taps[1]
    sums += row[2] * taps[2]
    return sums


@gluon.jit
def _depthwise(
    hidden, made, depthwise, shift, slab,
    HIDDEN: gl.constexpr, SLAB: gl.constexpr, STRIDE: gl.constexpr, SLOTS: gl.constexpr,
    OUT_ROWS: gl.constexpr, ABOVE: gl.constexpr, LEFT: gl.constexpr, SUMS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """ReLU6 of the depthwise convolution of a slab: OUT_ROWS rows [SLOTS / STRIDE, SLAB] of `made`."""
    OUT: gl.constexpr = SLOTS // STRIDE
    each: gl.constexpr = OUT * SLAB // (32 * WARPS)  # numbers a thread
    layout: gl.constexpr = gl.BlockedLayout([1, each], [32 * each // SLAB, SLAB // each], [WARPS, 1], [1, 0])
    e = slab * SLAB + gl.arange(0, SLAB, gl.SliceLayout(0, layout))
    upper = _taps(depthwise, 0, e, HIDDEN, SUMS)
    middle = _taps(depthwise, 1, e, HIDDEN, SUMS)
    lower = _taps(depthwise, 2, e, HIDDEN, SUMS)
    start = gl.zeros([OUT, SLAB], SUMS, layout) + gl.load(shift + e).to(SUMS)[None, :]
    # At stride 1 a row of the tile ends one output row, `ending`, goes on with `now`, and begins the next.
    ending, now = start, start
    for r in gl.static_range(STRIDE * (OUT_ROWS - 1) + 2 + ABOVE):
        first = r * SLOTS + LEFT - 1
        row = (
            _row(hidden, first, SLAB, OUT, STRIDE, SUMS, layout),
            _row(hidden, first + 1, SLAB, OUT, STRIDE, SUMS, layout),
            _row(hidden, first + 2, SLAB, OUT, STRIDE, SUMS, layout),
        )
        if STRIDE == 1:
            if r > ABOVE:
                made.index(r - ABOVE - 1).store(_relu6(_add(ending, row, lower), hidden.dtype, layout))
            ending = _add(now, row, middle)
            now = _add(start, row, upper)
        elif (r - ABOVE) % 2 == 0:
            # Output row o is over rows 2 o + ABOVE - 1 to 2 o + ABOVE + 1; the last is the next one's first.
            now = _add(now, row, middle)
        else:
            if r - ABOVE > 0:
                made.index((r - ABOVE) // 2).store(_relu6(_add(now, row, lower), hidden.dtype, layout))
            now = _add(start, row, upper)


@gluon.jit
def _no_sums(M: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr):
    """Zeros where tensor cores add [M, N]."""
    return gl.zeros([M, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16]))


@gluon.jit
def _project(
    made, w2, w3, half, sums, more, M: gl.constexpr, SLAB: gl.constexpr, N2: gl.constexpr
):  # fmt: skip
    """The projection's sums with what a slab gives them."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128 if SLAB >= 64 else 2 * SLAB, 16, 2)
    ready = made._reinterpret(made.dtype, [M, SLAB], layout)
    sums = warpgroup_mma(ready, w2.index(half), sums, is_async=True)
    if N2 > 0:
        more = warpgroup_mma(ready, w3.index(half), more, is_async=True)
        sums, more = warpgroup_mma_wait(0, [sums, more])
    else:
        sums = warpgroup_mma_wait(0, [sums])
    return sums, more


@gluon.jit
def _finish(
    x, y, sums, shift, image, images, top, left, first,
    HO: gl.constexpr, WO: gl.constexpr, COUT: gl.constexpr, RESIDUAL: gl.constexpr, OUT: gl.constexpr,
    PITCH: gl.constexpr, OUT_ROWS: gl.constexpr, OUT_COLS: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Add bias and residual to the sums of N channels from `first` on, and store them."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    at = gl.arange(0, M, gl.SliceLayout(1, layout))
    channel = first + gl.arange(0, N, gl.SliceLayout(0, layout))
    row, slot = at // OUT, at % OUT
    other, column = slot // PITCH, slot % PITCH
    inside = (row < OUT_ROWS) & (row + top < HO) & (column < OUT_COLS) & (column + left < WO)
    inside = inside & (image + other < images)
    offset = ((other * HO + row + top) * WO + column + left)[:, None] * COUT + channel[None, :]
    mask = inside[:, None] & (channel < COUT)[None, :]
    sums += gl.load(shift + channel)[None, :]
    if RESIDUAL:
        sums += gl.load(x + offset, mask=mask, other=0.0).to(gl.float32)
    gl.store(y + offset, sums.to(y.dtype.element_ty), mask=mask)


# Slabs are counted at run time, also where there is one: Triton 3.6 cannot compile the loop unrolled. Images
# are, too, so that one binary serves every batch.
@gluon.jit(do_not_specialize=["images", "slabs"])
def block_kernel(
    x,  # [images, H, W, CIN]; with STEM photos, [images, 3, HEIGHT, WIDTH] of any strides
    expand,  # [K * STEPS, HIDDEN]: the weight, two rows of bias, zeros
    depthwise,  # [9, HIDDEN], row 3 * ky + kx
    shift,  # [HIDDEN] float32, of the depthwise convolution
    project,  # [HIDDEN, N1 + N2]
    out_shift,  # [N1 + N2] float32
    norm,  # [2, 3] float32: what a byte is multiplied with, and what is added; read with BYTES
    y,  # [images, HO, WO, COUT]
    images, slabs,  # slabs: HIDDEN / SLAB
    image_step, channel_step, row_step, column_step,  # of photos
    H: gl.constexpr, W: gl.constexpr, CIN: gl.constexpr,
    HIDDEN: gl.constexpr,  # a multiple of SLAB
    COUT: gl.constexpr, STRIDE: gl.constexpr, RESIDUAL: gl.constexpr,
    IMAGES: gl.constexpr, PITCH: gl.constexpr, ROWS: gl.constexpr, OUT_ROWS: gl.constexpr,
    OUT_COLS: gl.constexpr, ABOVE: gl.constexpr, LEFT: gl.constexpr,
    CHUNK: gl.constexpr, SLAB: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr,
    N1: gl.constexpr, N2: gl.constexpr,
    WIDE: gl.constexpr,  # depthwise sums in float32, not in the weights' type
    STEM: gl.constexpr,  # the network's first convolution is the expansion
    HEIGHT: gl.constexpr, WIDTH: gl.constexpr, BYTES: gl.constexpr,  # of photos
    WARPS: gl.constexpr,
):  # fmt: skip
    """One program: OUT_ROWS x OUT_COLS pixels of IMAGES images. All arrays contiguous."""
    HO: gl.constexpr = (H - 1) // STRIDE + 1
    WO: gl.constexpr = (W - 1) // STRIDE + 1
    SLOTS: gl.constexpr = IMAGES * PITCH
    OUT: gl.constexpr = SLOTS // STRIDE
    PIXELS: gl.constexpr = ROWS * SLOTS
    M: gl.constexpr = OUT * (ROWS // STRIDE)
    D: gl.constexpr = expand.dtype.element_ty
    SUMS: gl.constexpr = gl.float32 if WIDE else D
    image, top, left = _first(HO, WO, IMAGES, OUT_ROWS, OUT_COLS)
    # Images are counted with 64 bits, what is within one or two of them with 32.
    y += image.to(gl.int64) * (HO * WO * COUT)

    w1, w2, w3 = _weight_buffers(D, SLAB, K, STEPS, N1, N2)
    _copy_slab(expand, project, w1, w2, w3, 0, HIDDEN, SLAB, K, STEPS, N1, N2, WARPS)
    tile, hidden, made = _tile_buffers(D, PIXELS, CHUNK, K, STEPS, SLAB, STRIDE, ROWS // STRIDE, OUT, WARPS)
    used_rows: gl.constexpr = STRIDE * (OUT_ROWS - 1) + 2 + ABOVE
    used: gl.constexpr = STRIDE * (OUT_COLS - 1) + 2 + LEFT
    if STEM:
        _gather_x(
            x, tile, norm, image, images, top - ABOVE, left - LEFT,
            image_step, channel_step, row_step, column_step,
            H, W, HEIGHT, WIDTH, BYTES, SLOTS, PITCH, used_rows, used, PIXELS, CHUNK, WARPS,
        )  # fmt: skip
    else:
        x += image.to(gl.int64) * (H * W * CIN)
        _load_x(
            x, tile, image, images, top * STRIDE - ABOVE, left * STRIDE - LEFT,
            H, W, CIN, SLOTS, PITCH, used_rows, used, PIXELS, CHUNK, K, STEPS, WARPS,
        )  # fmt: skip

    sums = _no_sums(M, N1, WARPS)
    more = _no_sums(M, N2 if N2 > 0 else 16, WARPS)
    for slab in range(slabs):
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()  # the slab's weights are there, and nobody reads the other half any more
        if slab + 1 < slabs:
            _copy_slab(expand, project, w1, w2, w3, slab + 1, HIDDEN, SLAB, K, STEPS, N1, N2, WARPS)
        half = slab % 2
        _expand(tile, w1, hidden, half, PIXELS, CHUNK, SLAB, STEPS, WARPS)
        thread_barrier()
        _depthwise(
            hidden, made, depthwise, shift, slab,
            HIDDEN, SLAB, STRIDE, SLOTS, OUT_ROWS, ABOVE, LEFT, SUMS, WARPS,
        )  # fmt: skip
        fence_async_shared()
        thread_barrier()
        sums, more = _project(made, w2, w3, half, sums, more, M, SLAB, N2)

    _finish(
        x, y, sums, out_shift, image, images, top, left, 0,
        HO, WO, COUT, RESIDUAL, OUT, PITCH // STRIDE, OUT_ROWS, OUT_COLS, M, N1, WARPS,
    )  # fmt: skip
    if N2 > 0:
        _finish(
            x, y, more, out_shift, image, images, top, left, N1,
            HO, WO, COUT, RESIDUAL, OUT, PITCH // STRIDE, OUT_ROWS, OUT_COLS, M, N2, WARPS,
        )  # fmt: skip
