"""Bytes that the Triton operators move: what their launchers count is what the interpreted kernels do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
import triton_interpreter
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

import triton
import triton.language as tl
from mnv2_fast.kernels import (
    depthwise,
    depthwise_gradient,
    depthwise_project,
    parts,
    pointwise,
    pointwise_gradient,
    stem,
)
from mnv2_fast.kernels.common import tiles

Tile = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call on x of a shape. `fine`: by a tile of few lanes, so that several programs share a row."""

    op: str
    shape: tuple[int, int, int, int]
    fine: bool = False

    def __str__(self) -> str:
        return "-".join((self.op, "x".join(map(str, self.shape)), "fine" if self.fine else "table"))


LANES = {"rows": 2, "cols": 2, "block": 32, "warps": 1}
PRODUCT = {"m": 16, "n": 16, "k": 16, "warps": 1, "stages": 1}


def _tile(case: Case, table: str, row: str, fine: Tile) -> Tile:
    return fine if case.fine else tiles("", table)[row]


def _random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype)


def _after(shape: tuple[int, int, int, int], stride: int) -> tuple[int, int, int, int]:
    n, c, h, w = shape
    return n, c, (h - 1) // stride + 1, (w - 1) // stride + 1


def _depthwise(case: Case, stride: int) -> int:
    tile = _tile(case, "depthwise", f"large_s{stride}", LANES)
    x, c = _random(*case.shape), case.shape[1]
    depthwise.depthwise(x, _random(c, 1, 3, 3), _random(c), stride, True, tile=tile)
    return depthwise.traffic(case.shape, stride, 2, tile)


def _depthwise_input(case: Case, stride: int) -> int:
    table = ("depthwise", "large_s1") if stride == 1 else ("depthwise_input_s2", "large")
    tile = _tile(case, *table, LANES)
    dy, weight = _random(*_after(case.shape, stride)), _random(case.shape[1], 1, 3, 3)
    depthwise_gradient.input_gradient(dy, weight, case.shape[2:], stride, tile=tile)
    return depthwise_gradient.input_traffic(case.shape, stride, 2, tile)


def _depthwise_weight(case: Case, stride: int) -> int:
    tile = _tile(case, "depthwise_weight", f"s{stride}", LANES)
    c = case.shape[1]
    out = torch.empty(3, 3, 1, c).permute(3, 2, 0, 1) if case.fine else None
    depthwise_gradient.weight_gradient(
        _random(*_after(case.shape, stride)), _random(*case.shape), stride, out=out, tile=tile
    )
    return depthwise_gradient.weight_traffic(case.shape, stride, 2, tile, out_item=4 if case.fine else None)


def _stem(case: Case, from_bytes: bool) -> int:
    tile = _tile(case, "stem", "half", {"m": 8, "warps": 1})
    x = torch.randint(0, 256, case.shape, dtype=torch.uint8) if from_bytes else _random(*case.shape)
    norm = torch.ones(2, 3) if from_bytes else None
    stem.stem(x, _random(17, 3, 3, 3), _random(17), True, norm=norm, tile=tile)
    return stem.traffic(case.shape, 17, 2, tile, from_bytes=from_bytes)


def _pointwise_input(case: Case, residual: bool) -> int:
    n, cin, h, w = case.shape
    tile = pointwise.fit(_tile(case, "pointwise", "large_half", PRODUCT), 40, cin)
    added = _random(*case.shape) if residual else None
    pointwise.input_gradient(_random(n, 40, h, w), _random(40, cin, 1, 1), added, tile=tile)
    return pointwise.traffic(n * h * w, 40, cin, 2, tile, bias=False, residual=residual)


def _pointwise_weight(case: Case) -> int:
    n, cin, h, w = case.shape
    tile = pointwise_gradient.fit(_tile(case, "pointwise_gradient", "half", PRODUCT), cin, 40)
    out = torch.empty(40, cin, 1, 1) if case.fine else None
    pointwise_gradient.weight_gradient(_random(n, 40, h, w), _random(*case.shape), out=out, tile=tile)
    return pointwise_gradient.traffic(n * h * w, cin, 40, 2, tile, out_item=4 if case.fine else None)


def _depthwise_project(case: Case, stride: int) -> int:
    c = case.shape[1]
    tile = pointwise.fit(_tile(case, "depthwise_project", "large_half", PRODUCT), c, 40)
    n, _, ho, wo = _after(case.shape, stride)
    residual = _random(n, 40, ho, wo) if case.fine else None
    depthwise_project.depthwise_project(
        _random(*case.shape),
        (_random(c, 1, 3, 3), _random(c)),
        (_random(40, c, 1, 1), _random(40)),
        stride,
        residual,
        tile=tile,
    )
    return depthwise_project.traffic(case.shape, 40, stride, 2, tile, residual=case.fine)


def _parts(case: Case) -> int:
    given = _random(*case.shape, dtype=torch.float32)
    out = torch.empty(case.shape[1:], dtype=torch.float16 if case.fine else torch.float32)
    parts.add_parts(given, out)
    return parts.traffic(len(given), out.numel(), out.element_size())


@triton.jit
def _copy_kernel(x, out, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """out = x: the second program moves the same elements as the first one, twice where WHOLE."""
    at = tl.arange(0, BLOCK)
    if WHOLE:
        tl.store(out + at, tl.load(x + at))
    tl.store(out + at, tl.load(x + at, mask=at < 5), mask=at < 5)


def _unmasked(case: Case) -> int:
    """Loads and stores without a mask are seen, an address once a program whatever reads it."""
    x, out = torch.randn(16), torch.empty(16)
    _copy_kernel[2,](x, out, WHOLE=case.fine, BLOCK=16)
    return 2 * 2 * (16 if case.fine else 5) * 4


OPERATORS: dict[str, Callable[[Case], int]] = {
    "depthwise s1": lambda case: _depthwise(case, 1),
    "depthwise s2": lambda case: _depthwise(case, 2),
    "depthwise input gradient s1": lambda case: _depthwise_input(case, 1),
    "depthwise input gradient s2": lambda case: _depthwise_input(case, 2),
    "depthwise weight gradient s1": lambda case: _depthwise_weight(case, 1),
    "depthwise weight gradient s2": lambda case: _depthwise_weight(case, 2),
    "stem": lambda case: _stem(case, False),
    "stem of bytes": lambda case: _stem(case, True),
    "pointwise input gradient": lambda case: _pointwise_input(case, False),
    "pointwise input gradient with a residual": lambda case: _pointwise_input(case, True),
    "pointwise weight gradient": _pointwise_weight,
    "depthwise project s1": lambda case: _depthwise_project(case, 1),
    "depthwise project s2": lambda case: _depthwise_project(case, 2),
    "parts": _parts,
    "unmasked": _unmasked,
}
SHAPES = ((1, 17, 1, 2), (2, 24, 9, 7), (3, 5, 15, 16))


def _cases() -> list[Case]:
    cases = []
    for op in OPERATORS:
        for n, c, h, w in SHAPES[: 1 if op == "unmasked" else None]:
            shape = (n, 3 if op.startswith("stem") else c, h, w)
            cases += [Case(op, shape, fine) for fine in (False, True)]
    return cases


CASES = _cases()


def _verdict(case: Case) -> str:
    with triton_interpreter.recorded() as moved:
        counted = OPERATORS[case.op](case)
    return "" if 0 < counted == moved.total else f"counted {counted}, the kernels moved {moved.total}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_counted_is_what_the_kernels_move(case: Case, verdicts: dict[str, str]) -> None:
    assert verdicts[str(case)] == ""


if __name__ == "__main__":
    triton_interpreter.print_verdicts(CASES, _verdict)
