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
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (9, 0)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A block's weights as the kernel reads them, of one dtype, padded with zeros."""

    cin: int
    cout: int
    stride: int
    residual: bool
    slab: int
    expand: torch.Tensor  # [K * STEPS, HIDDEN]
    depthwise: torch.Tensor  # [9, HIDDEN]
    shift: torch.Tensor  # [HIDDEN] float32
    project: torch.Tensor  # [HIDDEN, N1 + N2]
    out_shift: torch.Tensor  # [N1 + N2] float32


def split(channels: int) -> tuple[int, int]:
    """Columns of the projection's two products: powers of two; the second is 0 where one product does."""
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
        weights: of float32, batch norm folded: expand [E, Cin, 1, 1], expand_bias [E], depthwise
            [E, 1, 3, 3], depthwise_bias [E], project [Cout, E, 1, 1], project_bias [Cout].
        stride: of the depthwise convolution.
        residual: whether the input is added.
        dtype: float16 or bfloat16.
        slab: of the tile table.
    """
    expand, project = weights["expand"][:, :, 0, 0], weights["project"][:, :, 0, 0]
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
    return Packed(cin, cout, stride, residual, slab, wide, taps, shift[0], narrow, out_shift[0])


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
    if h != w or (h, packed.stride) not in GEOMETRIES:
        sizes = ", ".join(f"{size} at stride {stride}" for size, stride in GEOMETRIES)
        raise ValueError(f"no whole block for {h} x {w} at stride {packed.stride}: there are {sizes}")
    if cin != packed.cin or x.dtype != packed.expand.dtype or x.device != packed.expand.device:
        raise ValueError(
            f"x has {cin} channels of {x.dtype} on {x.device}, the weights are for {packed.cin} of "
            f"{packed.expand.dtype} on {packed.expand.device}"
        )
    size = (h - 1) // packed.stride + 1
    out, lines = output(out, (n, packed.cout, size, size), x)
    if not out.numel():
        return out
    tile = choose_tile(device_of(x.device)[0], h, packed.stride) if tile is None else tile
    if tile["slab"] != packed.slab:
        raise ValueError(f"the weights are packed in slabs of {packed.slab}, the tile's are {tile['slab']}")
    programs = GEOMETRIES[h, packed.stride].programs(n, size, size)
    constants = compile_constants(packed, h, tile)
    with torch.cuda.device_of(x):
        block_kernel[(programs,)](
            channels_last(x),
            packed.expand,
            packed.depthwise,
            packed.shift,
            packed.project,
            packed.out_shift,
            lines,
            n,
            **constants,
            num_warps=tile["warps"],
        )
    return out


def choose_tile(device_name: str, size: int, stride: int) -> Tile:
    """The table's tile for blocks whose input is `size` x `size`."""
    return tiles(device_name, "block")[f"{size}_s{stride}"]


def compile_constants(packed: Packed, size: int, tile: Tile) -> dict[str, int | bool]:
    """The kernel's constants for an input of `size` x `size`."""
    geometry = GEOMETRIES[size, packed.stride]
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
        "WARPS": tile["warps"],
    }


def compile_arguments(packed: Packed, size: int, tile: Tile) -> dict[str, str | int | bool]:
    """The kernel's arguments as `aot.compile_for` takes them."""
    names = ("x", "expand", "depthwise", "shift", "project", "out_shift", "y")
    pointers = dict.fromkeys(names, POINTERS[packed.expand.dtype]) | {"shift": "*fp32", "out_shift": "*fp32"}
    return {**pointers, "images": "i32", **compile_constants(packed, size, tile)}


def traffic(packed: Packed, n: int, size: int) -> tuple[int, int]:
    """Bytes that the kernel reads and writes for n images of `size` x `size`.

    The unique addresses of each program, halo and weights included, summed over programs. L2 serves a part.
    """
    geometry, stride, item = GEOMETRIES[size, packed.stride], packed.stride, packed.expand.dtype.itemsize
    made = (size - 1) // stride + 1

    def seen(out: int, before: int) -> int:
        """Input rows or columns that tiles of `out` output rows or columns read, in sum."""
        total = 0
        for first in range(0, made, out):
            begin = first * stride - before
            total += min(begin + stride * (out - 1) + 2 + before, size) - max(begin, 0)
        return total

    pixels = seen(geometry.out_rows, geometry.above) * seen(geometry.out_cols, geometry.left)
    weights = (packed.expand, packed.depthwise, packed.shift, packed.project, packed.out_shift)
    each = sum(t.numel() * t.element_size() for t in weights)
    read = n * pixels * packed.cin * item + geometry.programs(n, made, made) * each
    return read, n * made**2 * packed.cout * item


def reference(
    x: torch.Tensor, weights: Mapping[str, torch.Tensor], stride: int, residual: bool
) -> torch.Tensor:
    """The float64 twin of `block`, from the weights that `pack` takes: [N, Cout, HO, WO] float64."""
    return _stages(x.double(), weights, stride, residual)[-1]


def tolerance(
    x: torch.Tensor, weights: Mapping[str, torch.Tensor], stride: int, residual: bool, dtype: torch.dtype
) -> torch.Tensor:
    """How far `block` with "wide" sums may be from its float64 twin, for weights that `dtype` can hold.

    Each stage rounds its result to `dtype` and adds in float32, where tensor cores truncate; what the stage
    before was off passes through the sizes of the weights. [N, Cout, HO, WO] float64.
    """
    own, single = torch.finfo(dtype), torch.finfo(torch.float32).eps
    h, d, y = _stages(x.double(), weights, stride, residual)
    w = {name: t.double().abs() for name, t in weights.items()}
    groups = len(w["depthwise"])
    size = F.conv2d(x.double().abs(), w["expand"], w["expand_bias"])
    off = (x.shape[1] + 5) * single * size + own.eps**2 * w["expand_bias"].view(-1, 1, 1) + own.eps / 2 * h
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
    h = F.conv2d(x, w["expand"], w["expand_bias"]).clamp(0, 6)
    d = F.conv2d(h, w["depthwise"], w["depthwise_bias"], stride, 1, groups=len(w["depthwise"])).clamp(0, 6)
    y = F.conv2d(d, w["project"], w["project_bias"])
    return h, d, y + x if residual else y
