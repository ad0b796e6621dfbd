"""Whole inverted residuals by `block.block_kernel`: the maps it takes, packed weights, the launcher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from .block import PAD, block_kernel
from .common import (
    Tile,
    cdiv,
    channels_last,
    device_of,
    next_power_of_2,
    output,
    tiles,
)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a map of one size at one stride is cut into tiles; see the file's first lines."""

    images: int
    pitch: int
    rows: int
    out_rows: int
    out_cols: int
    above: int = 0
    left: int = 0

    @property
    def pixels(self) -> int:
        """Pixels of a tile, its halo and the slots past the last column included."""
        return self.images * self.pitch * self.rows

    @property
    def chunk(self) -> int:
        """How many of them are expanded at once."""
        return min(256, self.pixels)

    def programs(self, n: int, ho: int, wo: int) -> int:
        """Programs for n images of so many output rows and columns."""
        return cdiv(n, self.images) * cdiv(ho, self.out_rows) * cdiv(wo, self.out_cols)


# Height and width of a block's input, stride -> its tiles.
GEOMETRIES = {
    (112, 2): Geometry(1, 32, 16, 7, 14, 1, 1),
    (56, 1): Geometry(1, 32, 16, 14, 28, 1, 1),
    (56, 2): Geometry(1, 32, 16, 7, 14, 1, 1),
    (28, 1): Geometry(1, 32, 16, 14, 28, 1, 0),
    (28, 2): Geometry(1, 32, 16, 7, 14, 1, 0),
    (14, 1): Geometry(1, 16, 16, 14, 14),
    (14, 2): Geometry(2, 16, 16, 7, 7),
    (7, 1): Geometry(2, 8, 8, 7, 7),
}
# Stem and first block, whose map is 112 x 112.
STEM_SIZE = 112
STEM_GEOMETRY = Geometry(1, 32, 16, 14, 28, 1, 1)
DTYPES = (torch.float16, torch.bfloat16)
# The kernel is for this compute capability alone; there a program may have SHARED bytes of shared memory.
CAPABILITY = (9, 0)
SHARED = 227 << 10
# What ptxas makes of more float32 sums a thread, and of more steps of the expansion, spills.
MOST_SUMS, MOST_STEPS = 208, 16


@dataclasses.dataclass(frozen=True)
class Form:
    """What a block is, whatever its weights are.

    `slab`: hidden channels at a time, of the tile table. `stem`: the network's first convolution is its
    expansion.
    """

    cin: int
    cout: int
    stride: int
    residual: bool
    slab: int
    stem: bool

    @property
    def steps(self) -> tuple[int, int]:
        """Inputs that tensor cores take at once, and how many times."""
        rows = depth(self.cin)
        k = 32 if rows % 32 == 0 else 16
        return k, rows // k


@dataclasses.dataclass(frozen=True)
class Packed(Form):
    """A block's weights as the kernel reads them, of one dtype, padded with zeros."""

    expand: torch.Tensor  # [K * STEPS, HIDDEN]
    depthwise: torch.Tensor  # [9, HIDDEN]
    shift: torch.Tensor  # [HIDDEN] float32
    project: torch.Tensor  # [HIDDEN, N1 + N2]
    out_shift: torch.Tensor  # [N1 + N2] float32

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a program reads of it."""
        return self.expand, self.depthwise, self.shift, self.project, self.out_shift

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        expand, depthwise, shift, project, out_shift = (t.to(device) for t in self.tensors)
        return dataclasses.replace(
            self, expand=expand, depthwise=depthwise, shift=shift, project=project, out_shift=out_shift
        )

    @property
    def slabs(self) -> int:
        """How many slabs of hidden channels there are."""
        return len(self.shift) // self.slab


def split(channels: int) -> tuple[int, int]:
    """Columns of the projection's two products: powers of two; the second is 0 where one product does."""
    channels = max(channels, 16)  # the narrowest that the layout of shared memory takes
    most = 1 << (channels.bit_length() - 1)
    if most == channels:
        return channels, 0
    rest = max(16, next_power_of_2(channels - most))
    return (most, rest) if most + rest < 2 * most or most >= 256 else (2 * most, 0)


def depth(cin: int) -> int:
    """Inputs of the expansion with the two that bring its bias, padded as the tensor cores want them."""
    return cdiv(cin + 2, 16) * 16


def pack(
    weights: Mapping[str, torch.Tensor], stride: int, residual: bool, dtype: torch.dtype, slab: int
) -> Packed:
    """A block's weights for `block`.

    Args:
        weights: of float32, batch norm folded: expand [E, Cin, 1, 1], or the stem's weight [E, 3, 3, 3],
            expand_bias [E], depthwise [E, 1, 3, 3], depthwise_bias [E], project [Cout, E, 1, 1],
            project_bias [Cout].
        stride: of the depthwise convolution.
        residual: whether the input is added.
        dtype: float16 or bfloat16.
        slab: of the tile table.
    """
    expand, project = weights["expand"].flatten(1), weights["project"][:, :, 0, 0]
    (hidden, cin), cout = expand.shape, len(project)
    columns = cdiv(hidden, slab) * slab

    def padded(rows: int, width: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros((rows, width), dtype=kind, device=expand.device)

    wide = padded(depth(cin), columns)
    wide[:cin, :hidden] = expand.T
    bias = weights["expand_bias"].float()
    wide[cin, :hidden] = bias
    wide[cin + 1, :hidden] = bias - wide[cin, :hidden].float()
    taps = padded(9, columns)
    taps[:, :hidden] = weights["depthwise"].reshape(hidden, 9).T
    shift = padded(1, columns, torch.float32)
    shift[0, :hidden] = weights["depthwise_bias"]
    narrow = padded(columns, sum(split(cout)))
    narrow[:hidden, :cout] = project.T
    out_shift = padded(1, sum(split(cout)), torch.float32)
    out_shift[0, :cout] = weights["project_bias"]
    stem = weights["expand"].shape[2] == 3
    return Packed(cin, cout, stride, residual, slab, stem, wide, taps, shift[0], narrow, out_shift[0])


def block(
    x: torch.Tensor, packed: Packed, *, out: torch.Tensor | None = None, tile: Tile | None = None
) -> torch.Tensor:
    """An inverted residual with expansion: project(relu6(depthwise(relu6(expand(x))))) (+ x).

    Args:
        x: [N, Cin, H, W] of the weights' dtype, any strides, copied unless channels_last; H = W.
        packed: of `pack`, on x's device.
        out: [N, Cout, HO, WO], channels_last, filled and returned where it is given.
        tile: a row of the tile table, instead of the one for this GPU and size.

    Returns:
        [N, Cout, HO, WO], channels_last. Sums are float32, the depthwise ones of the weights' dtype where the
        tile says "wide": 0. Hidden activations are rounded to the weights' dtype.

    Raises:
        ValueError: there is no geometry for x, or it does not fit the weights.
    """
    n, cin, h, w = x.shape
    if packed.stem:
        raise ValueError("the weights are of the stem with its block: use stem_block")
    tile = choose_tile(device_of(x.device)[0], h, packed.stride) if tile is None else tile
    if refused := declines(packed, h, w, tile):
        raise ValueError(refused)
    if cin != packed.cin or x.dtype != packed.expand.dtype or x.device != packed.expand.device:
        raise ValueError(
            f"x has {cin} channels of {x.dtype} on {x.device}, the weights are for {packed.cin} of "
            f"{packed.expand.dtype} on {packed.expand.device}"
        )
    size = (h - 1) // packed.stride + 1
    out, lines = output(out, (n, packed.cout, size, size), x)
    if out.numel():
        _launch(channels_last(x), (0, 0, 0, 0), None, packed, lines, h, tile)
    return out


def stem_block(
    x: torch.Tensor,
    packed: Packed,
    *,
    norm: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The network's first convolution and its first block, which has no expansion, in one launch.

    Args:
        x: [N, 3, H, W], H and W 223 or 224, of the weights' dtype or float32, any strides; or uint8.
        packed: of `pack`, with the stem's weight as the expansion, on x's device.
        norm: as `stem.stem` takes it.
        out: [N, Cout, 112, 112] of the weights' dtype, channels_last, filled and returned where given.
        tile: a row of the tile table, instead of the one for this GPU.

    Returns:
        [N, Cout, 112, 112] of the weights' dtype, channels_last, as `block` has it. Photos are rounded to it.

    Raises:
        ValueError: x is of another size, or does not fit the weights.
    """
    n, channels, h, w = x.shape
    if channels != 3 or not packed.stem:
        raise ValueError(f"x has {channels} channels: the stem with its block is of photos [N, 3, H, W]")
    tile = tiles(device_of(x.device)[0], "block")["stem"] if tile is None else tile
    if refused := declines(packed, (h + 1) // 2, (w + 1) // 2, tile):
        raise ValueError(refused)
    kinds = (torch.uint8,) if norm is not None else (packed.expand.dtype, torch.float32)
    if x.dtype not in kinds or x.device != packed.expand.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}: with weights of {packed.expand.dtype} on {packed.expand.device} "
            f"it may be {' or '.join(map(str, kinds))}"
        )
    out, lines = output(out, (n, packed.cout, STEM_SIZE, STEM_SIZE), packed.expand)
    if out.numel():
        _launch(x, x.stride(), norm, packed, lines, STEM_SIZE, tile)
    return out


def _launch(  # noqa: PLR0917
    x: torch.Tensor,
    steps: tuple[int, ...],
    norm: torch.Tensor | None,
    packed: Packed,
    lines: torch.Tensor,
    size: int,
    tile: Tile,
) -> None:
    photo = (x.shape[2], x.shape[3]) if packed.stem else (0, 0)
    with torch.cuda.device_of(x):
        block_kernel[programs(packed, len(lines), size),](
            x,
            packed.expand,
            packed.depthwise,
            packed.shift,
            packed.project,
            packed.out_shift,
            packed.out_shift if norm is None else norm,
            lines,
            len(lines),
            packed.slabs,
            *steps,
            **_constants(packed, size, tile, photo, from_bytes=norm is not None),
            num_warps=tile["warps"],
        )


def geometry_of(form: Form, size: int) -> Geometry:
    """How maps of `size` x `size`, which the depthwise convolution reads, are cut into tiles."""
    return STEM_GEOMETRY if form.stem else GEOMETRIES[size, form.stride]


def programs(form: Form, n: int, size: int) -> int:
    """Programs for n images whose maps are `size` x `size`."""
    made = (size - 1) // form.stride + 1
    return geometry_of(form, size).programs(n, made, made)


def choose_tile(device_name: str, size: int, stride: int) -> Tile:
    """The table's tile for blocks whose input is `size` x `size`; where there is none, that of the next."""
    nearest = min((known for known, of in GEOMETRIES if of == stride), key=lambda known: abs(known - size))
    return tiles(device_name, "block")[f"{nearest}_s{stride}"]


def shared_bytes(form: Form, size: int) -> int:
    """Shared memory of a program for maps of `size` x `size`, but for what alignment adds: under 1 KiB."""
    geometry, (k, steps) = geometry_of(form, size), form.steps
    weights = 2 * form.slab * (k * steps + sum(split(form.cout)))
    hidden = (geometry.pixels + 2 * form.stride + 8) * (form.slab + PAD.value)
    made = geometry.pixels // form.stride**2 * form.slab
    return 2 * (geometry.pixels * k * steps + weights + hidden + made)


def sums_of_a_thread(form: Form, size: int, warps: int) -> int:
    """Registers that hold sums of both products of tensor cores at once, maps being `size` x `size`."""
    geometry = geometry_of(form, size)
    project = geometry.pixels // form.stride**2 * sum(split(form.cout))
    return (geometry.chunk * form.slab + project) // (32 * warps)


def declines(form: Form, h: int, w: int, tile: Tile) -> str | None:
    """Why there is no whole block for maps of h x w with such a tile, or None."""
    what = "stem with its block" if form.stem else "whole block"
    sizes = f"{STEM_SIZE}" if form.stem else ", ".join(f"{a} at stride {b}" for a, b in GEOMETRIES)
    if h != w or not ((h == STEM_SIZE) if form.stem else (h, form.stride) in GEOMETRIES):
        return f"no {what} for maps of {h} x {w} at stride {form.stride}: there are {sizes}"
    if tile["slab"] != form.slab:
        return f"the weights are packed in slabs of {form.slab}, the tile's are {tile['slab']}"
    if too_much := _too_much(form, h, tile["warps"]):
        return f"no {what} of {form.cin} to {form.cout} channels at {h} x {w}: {too_much}"
    return None


def _too_much(form: Form, size: int, warps: int) -> str:
    """What of a program does not fit on the chip, or nothing."""
    if (shared := shared_bytes(form, size) + 1024) > SHARED:
        return f"it would need {shared >> 10} KiB of shared memory, there are {SHARED >> 10}"
    if max(split(form.cout)) > 256:
        return "tensor cores make at most 256 in a product, and there are two"
    if (sums := sums_of_a_thread(form, size, warps)) > MOST_SUMS:
        return f"a thread would hold {sums} sums, more than its registers do"
    return "too many inputs for the registers" if form.steps[1] > MOST_STEPS else ""


def _constants(
    packed: Packed, size: int, tile: Tile, photo: tuple[int, int], from_bytes: bool
) -> dict[str, int | bool]:
    """The kernel's constants for maps of `size` x `size`; of the stem's block, for photos of [H, W]."""
    geometry = geometry_of(packed, size)
    (k, steps), (n1, n2) = packed.steps, split(packed.cout)
    return {
        "H": size,
        "W": size,
        "CIN": packed.cin,
        "HIDDEN": packed.expand.shape[1],
        "COUT": packed.cout,
        "STRIDE": packed.stride,
        "RESIDUAL": packed.residual,
        "IMAGES": geometry.images,
        "PITCH": geometry.pitch,
        "ROWS": geometry.rows,
        "OUT_ROWS": geometry.out_rows,
        "OUT_COLS": geometry.out_cols,
        "ABOVE": geometry.above,
        "LEFT": geometry.left,
        "CHUNK": geometry.chunk,
        "SLAB": packed.slab,
        "K": k,
        "STEPS": steps,
        "N1": n1,
        "N2": n2,
        "WIDE": bool(tile["wide"]),
        "STEM": packed.stem,
        "HEIGHT": photo[0],
        "WIDTH": photo[1],
        "BYTES": from_bytes,
        "WARPS": tile["warps"],
    }


def traffic(packed: Packed, n: int, size: int, item: int = 2) -> tuple[int, int]:
    """Bytes that the kernel reads and writes for n images whose maps are `size` x `size`.

    The unique addresses of each program, halo and weights included, summed over programs. L2 serves a part.
    `item`: bytes of a number of x; the stem's block reads photos of 2 * size.
    """
    geometry, stride = geometry_of(packed, size), packed.stride
    made = (size - 1) // stride + 1

    def seen(out: int, before: int) -> int:
        """Input rows or columns that tiles of `out` output rows or columns read, in sum."""
        total = 0
        for first in range(0, made, out):
            begin = first * stride - before
            begin, end = max(begin, 0), min(begin + stride * (out - 1) + 2 + before, size)
            total += min(2 * end, 2 * size) - max(2 * begin - 1, 0) if packed.stem else end - begin
        return total

    pixels = seen(geometry.out_rows, geometry.above) * seen(geometry.out_cols, geometry.left)
    each = sum(t.numel() * t.element_size() for t in packed.tensors) + (24 if item == 1 else 0)
    read = n * pixels * (3 if packed.stem else packed.cin) * item + programs(packed, n, size) * each
    return read, n * made**2 * packed.cout * packed.expand.element_size()


def reference(
    x: torch.Tensor, weights: Mapping[str, torch.Tensor], stride: int, residual: bool
) -> torch.Tensor:
    """The float64 twin of `block` and `stem_block`, from the weights that `pack` takes, and floats.

    [N, Cout, HO, WO] float64.
    """
    return _stages(x.double(), weights, stride, residual)[-1]


def tolerance(
    x: torch.Tensor, weights: Mapping[str, torch.Tensor], stride: int, residual: bool, dtype: torch.dtype
) -> torch.Tensor:
    """How far `block` with "wide" sums may be from its float64 twin, for weights that `dtype` can hold.

    Each stage rounds its result to `dtype` and adds in float32, where tensor cores truncate; what the stage
    before was off passes through the sizes of the weights. Photos are rounded, too. [N, Cout, HO, WO]
    float64.
    """
    own, single = torch.finfo(dtype), torch.finfo(torch.float32).eps
    h, d, y = _stages(x.double(), weights, stride, residual)
    w = {name: t.double().abs() for name, t in weights.items()}
    groups = len(w["depthwise"])
    size = _first(x.double().abs(), w)
    rounded = own.eps / 2 + 2 * single if w["expand"].shape[2] == 3 else 0.0
    off = ((w["expand"][0].numel() + 5) * single + rounded) * size + own.eps / 2 * h
    off += own.eps**2 * w["expand_bias"].view(-1, 1, 1)
    size = F.conv2d(h, w["depthwise"], w["depthwise_bias"], stride, 1, groups=groups)
    off = F.conv2d(off, w["depthwise"], None, stride, 1, groups=groups) + 12 * single * size + own.eps / 2 * d
    size = F.conv2d(d, w["project"], w["project_bias"])
    off = F.conv2d(off, w["project"]) + (groups + 5) * single * size
    return off + own.eps / 2 * y.abs() + own.tiny * own.eps


def _stages(
    x: torch.Tensor, weights: Mapping[str, torch.Tensor], stride: int, residual: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both hidden activations and the result, in float64."""
    w = {name: t.double() for name, t in weights.items()}
    h = _first(x, w).clamp(0, 6)
    d = F.conv2d(h, w["depthwise"], w["depthwise_bias"], stride, 1, groups=len(w["depthwise"])).clamp(0, 6)
    y = F.conv2d(d, w["project"], w["project_bias"])
    return h, d, y + x if residual else y


def _first(x: torch.Tensor, w: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The expansion, or the stem."""
    stem = w["expand"].shape[2] == 3
    return F.conv2d(x, w["expand"], w["expand_bias"], 2 if stem else 1, 1 if stem else 0)
