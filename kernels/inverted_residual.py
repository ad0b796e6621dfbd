"""Whole inverted residuals by `block.block_kernel`: the maps it takes, packed weights, the launcher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
import triton

from .block import block_kernel
from .common import POINTERS, Tile, channels_last, device_of, output, tiles


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

    def programs(self, n: int, ho: int, wo: int) -> int:
        """Programs for n images of so many output rows and columns."""
        return triton.cdiv(n, self.images) * triton.cdiv(ho, self.out_rows) * triton.cdiv(wo, self.out_cols)


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


@dataclasses.dataclass(frozen=True)
class Packed:
    """A block's weights as the kernel reads them, of one dtype, padded with zeros."""

    cin: int
    cout: int
    stride: int
    residual: bool
    slab: int
    stem: bool
    expand: torch.Tensor  # [K * STEPS, HIDDEN]
    depthwise: torch.Tensor  # [9, HIDDEN]
    shift: torch.Tensor  # [HIDDEN] float32
    project: torch.Tensor  # [HIDDEN, N1 + N2]
    out_shift: torch.Tensor  # [N1 + N2] float32

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
    rest = max(16, triton.next_power_of_2(channels - most))
    return (most, rest) if most + rest < 2 * most or most >= 256 else (2 * most, 0)


def depth(cin: int) -> int:
    """Inputs of the expansion with the two that bring its bias, padded as the tensor cores want them."""
    return triton.cdiv(cin + 2, 16) * 16


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
    columns = triton.cdiv(hidden, slab) * slab

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
    if h != w or (h, packed.stride) not in GEOMETRIES or packed.stem:
        sizes = ", ".join(f"{size} at stride {stride}" for size, stride in GEOMETRIES)
        raise ValueError(f"no whole block for {h} x {w} at stride {packed.stride}: there are {sizes}")
    if cin != packed.cin or x.dtype != packed.expand.dtype or x.device != packed.expand.device:
        raise ValueError(
            f"x has {cin} channels of {x.dtype} on {x.device}, the weights are for {packed.cin} of "
            f"{packed.expand.dtype} on {packed.expand.device}"
        )
    size = (h - 1) // packed.stride + 1
    out, lines = output(out, (n, packed.cout, size, size), x)
    if out.numel():
        tile = choose_tile(device_of(x.device)[0], h, packed.stride) if tile is None else tile
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
    if channels != 3 or ((h + 1) // 2, (w + 1) // 2) != (STEM_SIZE, STEM_SIZE) or not packed.stem:
        raise ValueError(f"no stem with its block for {tuple(x.shape)}: photos are [N, 3, 224, 224]")
    kinds = (torch.uint8,) if norm is not None else (packed.expand.dtype, torch.float32)
    if x.dtype not in kinds or x.device != packed.expand.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}: with weights of {packed.expand.dtype} on {packed.expand.device} "
            f"it may be {' or '.join(map(str, kinds))}"
        )
    out, lines = output(out, (n, packed.cout, STEM_SIZE, STEM_SIZE), packed.expand)
    if out.numel():
        tile = tiles(device_of(x.device)[0], "block")["stem"] if tile is None else tile
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
    if tile["slab"] != packed.slab:
        raise ValueError(f"the weights are packed in slabs of {packed.slab}, the tile's are {tile['slab']}")
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
            **compile_constants(packed, size, tile, photo, from_bytes=norm is not None),
            num_warps=tile["warps"],
        )


def geometry_of(packed: Packed, size: int) -> Geometry:
    """How maps of `size` x `size`, which the depthwise convolution reads, are cut into tiles."""
    return STEM_GEOMETRY if packed.stem else GEOMETRIES[size, packed.stride]


def programs(packed: Packed, n: int, size: int) -> int:
    """Programs for n images whose maps are `size` x `size`."""
    made = (size - 1) // packed.stride + 1
    return geometry_of(packed, size).programs(n, made, made)


def choose_tile(device_name: str, size: int, stride: int) -> Tile:
    """The table's tile for blocks whose input is `size` x `size`."""
    return tiles(device_name, "block")[f"{size}_s{stride}"]


def compile_constants(
    packed: Packed, size: int, tile: Tile, photo: tuple[int, int] = (0, 0), from_bytes: bool = False
) -> dict[str, int | bool]:
    """The kernel's constants for maps of `size` x `size`; of the stem's block, for photos of [H, W]."""
    geometry = geometry_of(packed, size)
    n1, n2 = split(packed.cout)
    rows = depth(packed.cin)
    k = 32 if rows % 32 == 0 else 16
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
        "CHUNK": min(256, geometry.images * geometry.pitch * geometry.rows),
        "SLAB": tile["slab"],
        "K": k,
        "STEPS": rows // k,
        "N1": n1,
        "N2": n2,
        "WIDE": bool(tile["wide"]),
        "STEM": packed.stem,
        "HEIGHT": photo[0],
        "WIDTH": photo[1],
        "BYTES": from_bytes,
        "WARPS": tile["warps"],
    }


def compile_arguments(
    packed: Packed, size: int, tile: Tile, from_bytes: bool = False
) -> dict[str, str | int | bool]:
    """The kernel's arguments as `aot.compile_for` takes them, photos of 224 x 224 for the stem's block."""
    names = ("x", "expand", "depthwise", "shift", "project", "out_shift", "norm", "y")
    pointers = dict.fromkeys(names, POINTERS[packed.expand.dtype])
    pointers |= dict.fromkeys(("shift", "out_shift", "norm"), "*fp32") | ({"x": "*u8"} if from_bytes else {})
    steps = ("image_step", "channel_step", "row_step", "column_step")
    numbers = {"images": "i32", "slabs": "i32", **dict.fromkeys(steps, "i32")}
    photo = (2 * STEM_SIZE, 2 * STEM_SIZE) if packed.stem else (0, 0)
    return {**pointers, **numbers, **compile_constants(packed, size, tile, photo, from_bytes)}


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
    weights = (packed.expand, packed.depthwise, packed.shift, packed.project, packed.out_shift)
    each = sum(t.numel() * t.element_size() for t in weights) + (24 if item == 1 else 0)
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
