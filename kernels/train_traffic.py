"""Bytes that a launch of a training kernel reads and writes.

They are unique addresses of each program, summed over programs, halos and weights included. The counts follow
from the launch's own arguments; a test holds them to what instrumented kernels read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from . import parts
from .aot import Launch
from .common import cdiv

FLOAT, DOUBLE = 4, 8


def traffic(launch: Launch) -> int:
    """Bytes of one launch."""
    kernel = launch.kernel.fn
    return COUNTS[kernel.__module__.rpartition(".")[2], kernel.__name__](launch.arguments, launch.grid)


Arguments = Mapping[str, Any]
Grid = tuple[int, ...]


def _item(tensor: torch.Tensor) -> int:
    return tensor.element_size()


def _gradient_rows(of: Arguments, c: int) -> int:
    """What `norm.gradient_rows` reads for c channels."""
    values = 3 if of["MASK"] else 1 if of["BATCH"] else 0
    return (values + (3 if of["BATCH"] else 1)) * c * FLOAT


def _raw_gradient(of: Arguments) -> int:
    """Tensors of the raw output's size that its gradient is made of."""
    return 2 if (of["MASK"] or of["BATCH"]) and not of.get("REMADE") else 1


def _add_parts(of: Arguments, grid: Grid) -> int:
    return parts.traffic(of["number"], of["count"], _item(of["out"]))


def _normalize(of: Arguments, grid: Grid) -> int:
    c = of["C"]
    read = 2 * c if of["GIVEN"] else of["number"] * 3 * c
    rows = read + (4 * c if of["MOVE"] else 0) + (2 * c if of["AFFINE"] else 0) + 3 * c
    return rows * FLOAT + 2 * c * DOUBLE


def _norm_gradient(of: Arguments, grid: Grid) -> int:
    c = of["C"]
    return (of["number"] * 2 + (1 if of["AFFINE"] else 0) + 5) * c * FLOAT + c * DOUBLE


def _sums(of: Arguments, grid: Grid) -> int:
    return of["C"] * (2 * of["pixels"] * _item(of["z"]) + grid[1] * 5 * FLOAT)


def _activate(of: Arguments, grid: Grid) -> int:
    tensors = 3 if of["RESIDUAL"] else 2
    return of["C"] * (tensors * of["pixels"] * _item(of["z"]) + grid[0] * 3 * FLOAT)


def _pointwise_forward(of: Arguments, grid: Grid) -> int:
    (runs, number), pixels, cin, cout, item = grid, of["pixels"], of["CIN"], of["COUT"], _item(of["x"])
    rows = runs * number * 3 * cin if of["NORM"] else 0
    rows += number * 3 * cout if of["MOMENTS"] else 0
    weights = number * cin * cout * _item(of["weight"])
    return (runs * cin + cout) * pixels * item + rows * FLOAT + weights


def _pointwise_input(of: Arguments, grid: Grid) -> int:
    (runs, number), pixels, cin, cout = grid, of["pixels"], of["CIN"], of["COUT"]
    elements = runs * _raw_gradient(of) * cout + cin * (2 if of["RESIDUAL"] else 1)
    elements += cin if of["NORM"] or of["REMADE"] else 0
    rows = runs * _gradient_rows(of, cout) + (5 * cin * FLOAT if of["NORM"] else 0)
    weights = cin * cout * _item(of["weight"])
    return elements * pixels * _item(of["g"]) + number * (rows + weights)


def _pointwise_weight(of: Arguments, grid: Grid) -> int:
    (_, number), pixels, cin, cout = grid, of["pixels"], of["CIN"], of["COUT"]
    over_o, over_i = cdiv(cout, of["M"]), cdiv(cin, of["N"])
    elements = over_i * _raw_gradient(of) * cout + over_o * cin
    rows = over_i * _gradient_rows(of, cout) + (over_o * 3 * cin * FLOAT if of["NORM"] else 0)
    rows += cin * cout * _item(of["weight"]) if of["REMADE"] or of["FOR_X"] else 0
    if of["FOR_X"]:
        elements += cin * (2 if of["RESIDUAL"] else 1)
        rows += 2 * cin * FLOAT if of["NORM"] else 0
    return elements * pixels * _item(of["g"]) + number * (rows + cout * cin * FLOAT)


def _segments(steps: int, number: int, groups: int) -> Iterator[tuple[int, int]]:
    """First and one past the last group of each image that a part has, of `groups` an image."""
    for part in range(number):
        first, end = part * steps // number, (part + 1) * steps // number
        while first < end:
            until = min(end, (first // groups + 1) * groups)
            yield first % groups, until - first // groups * groups
            first = until


def _clipped(first: int, end: int, size: int) -> int:
    return max(0, min(end, size) - max(first, 0))


def _depthwise_columns(of: Arguments, runs: int, scale: int, before: int, size: int) -> int:
    """Columns that all runs of columns read: `scale` an output column, `before` ahead of the first one."""
    wide = of["PATCHES"] * of["COLS"]
    spans = ((run * wide * scale - before, ((run + 1) * wide - 1) * scale + 2) for run in range(runs))
    return sum(_clipped(begin, end, size) for begin, end in spans)


def _depthwise_forward(of: Arguments, grid: Grid) -> int:
    (_, runs, number), c, stride, rows = grid, of["C"], of["STRIDE"], of["ROWS"]
    groups = cdiv(of["ho"], rows)
    columns = _depthwise_columns(of, runs, stride, 1, of["w"])
    read = sum(
        _clipped(first * rows * stride - 1, (end * rows - 1) * stride + 2, of["h"])
        for first, end in _segments(of["n"] * groups, number, groups)
    )
    elements = read * columns + of["n"] * of["ho"] * of["wo"]
    each = (3 * FLOAT if of["NORM"] else 0) + (3 * FLOAT if of["MOMENTS"] else 0) + 9 * _item(of["weight"])
    return c * (elements * _item(of["x"]) + runs * number * each)


def _depthwise_gradients(of: Arguments, grid: Grid) -> int:
    (_, runs, number), c, stride, rows = grid, of["C"], of["STRIDE"], of["ROWS"]
    groups, before = cdiv(of["ho"], rows), 2 - stride
    columns = _depthwise_columns(of, runs, 1, before, of["wo"])
    read = sum(
        _clipped(first * rows - before, end * rows + 1, of["ho"])
        for first, end in _segments(of["n"] * groups, number, groups)
    )
    of_x = (1 if of["NORM"] or of["FOR_WEIGHT"] else 0) + (1 if of["FOR_X"] else 0)
    elements = read * columns * _raw_gradient(of) + of_x * of["n"] * of["h"] * of["w"]
    each = 9 * _item(of["weight"]) + _gradient_rows(of, 1) + (3 * FLOAT if of["NORM"] else 0)
    each += (2 * FLOAT if of["FOR_X"] and of["NORM"] else 0) + (9 * FLOAT if of["FOR_WEIGHT"] else 0)
    return c * (elements * _item(of["g"]) + runs * number * each)


def _stem_inputs(of: Arguments, number: int) -> int:
    """Values of images that the windows of all parts have, each once a part."""
    h, w, wo, size = of["h"], of["w"], of["wo"], of["ho"] * of["wo"]
    steps = cdiv(of["pixels"], of["M"])
    found: dict[tuple[int, int], int] = {}
    count = 0
    for part in range(number):
        first, end = (k * steps // number * of["M"] for k in (part, part + 1))
        end = min(end, of["pixels"])
        while first < end:
            until = min(end, (first // size + 1) * size)
            span = first % size, until - first // size * size
            if span not in found:
                seen = torch.zeros((h + 2, w + 2), dtype=torch.bool)
                pixel = torch.arange(*span)
                for row in range(3):
                    for column in range(3):
                        seen[2 * (pixel // wo) + row, 2 * (pixel % wo) + column] = True
                found[span] = int(seen[1:-1, 1:-1].sum())
            count += found[span]
            first = until
    return 3 * count


def _stem_forward(of: Arguments, grid: Grid) -> int:
    number, cout = grid[0], of["COUT"]
    each = 27 * cout * _item(of["weight"]) + (3 * cout * FLOAT if of["MOMENTS"] else 0)
    written = of["pixels"] * cout * _item(of["out"])
    return _stem_inputs(of, number) * _item(of["x"]) + written + number * each


def _stem_weight(of: Arguments, grid: Grid) -> int:
    number, cout = grid[0], of["COUT"]
    read = _raw_gradient(of) * of["pixels"] * cout * _item(of["g"])
    each = _gradient_rows(of, cout) + 27 * cout * FLOAT
    return _stem_inputs(of, number) * _item(of["x"]) + read + number * each


COUNTS: dict[tuple[str, str], Callable[[Arguments, Grid], int]] = {
    ("parts", "add_parts_kernel"): _add_parts,
    ("norm", "normalize_kernel"): _normalize,
    ("norm", "norm_gradient_kernel"): _norm_gradient,
    ("norm", "sums_kernel"): _sums,
    ("norm", "activate_kernel"): _activate,
    ("train_pointwise", "forward_kernel"): _pointwise_forward,
    ("train_pointwise_gradient", "input_gradient_kernel"): _pointwise_input,
    ("train_pointwise_gradient", "weight_gradient_kernel"): _pointwise_weight,
    ("train_depthwise", "forward_kernel"): _depthwise_forward,
    ("train_depthwise", "gradients_kernel"): _depthwise_gradients,
    ("train_stem", "forward_kernel"): _stem_forward,
    ("train_stem", "weight_gradient_kernel"): _stem_weight,
}
