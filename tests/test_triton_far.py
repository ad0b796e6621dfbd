"""The Triton operators on tensors of more than 2**31 elements, of which only the last ones are in memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch
import triton_interpreter
from torch import Tensor
from triton_far import Far, run, without_64_bits

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from mnv2_fast.kernels import (
    depthwise,
    depthwise_gradient,
    depthwise_project,
    head,
    pointwise,
    pointwise_gradient,
    stem,
)
from mnv2_fast.kernels.common import GRID_LIMIT, tiles

F16 = torch.float16
# Images before the last one that a launch may have along its grid.
BEFORE = GRID_LIMIT - 1
Judged = tuple[Tensor, Tensor, Tensor]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape).to(F16)


def _map(n: int, c: int, h: int, w: int) -> Tensor:
    return _random(n, h, w, c).permute(0, 3, 1, 2)


def _depthwise(stride: int) -> Judged:
    c, h = (960, 7) if stride == 1 else (192, 28)
    x, weight, bias = _map(1, c, h, h), _random(c, 1, 3, 3), _random(c)
    before = {"x": BEFORE * x.numel(), "out": BEFORE * x.numel() // stride**2}
    assert min(before.values()) > 2**31
    with run(Far("depthwise_kernel", (0, 0, BEFORE), before)):
        out = depthwise.depthwise(x, weight, bias, stride, True)
    want = depthwise.reference(x, weight, bias, stride, True)
    return out, want, depthwise.tolerance(x, weight, bias, stride, want)


def _depthwise_input() -> Judged:
    dy, weight = _map(1, 192, 14, 14), _random(192, 1, 3, 3)
    before = {"dy": BEFORE * dy.numel(), "dx": BEFORE * 4 * dy.numel()}
    assert min(before.values()) > 2**31
    with run(Far("input_gradient_s2_kernel", (0, 0, BEFORE), before)):
        out = depthwise_gradient.input_gradient(dy, weight, (28, 28), 2)
    want = depthwise_gradient.reference_input(dy, weight, (28, 28), 2)
    sizes = depthwise_gradient.reference_input(dy.abs(), weight.abs(), (28, 28), 2)
    return out, want, depthwise_gradient.tolerance(want, sizes, 9, F16)


def _depthwise_weight(stride: int) -> Judged:
    """2**30 images before, two groups of rows in each: a part for an image, all of them in as many parts."""
    c, images = 136, 2**30
    x, dy = _map(2, c, 14 * stride, 3 * stride), _map(2, c, 14, 3)
    patches = 2
    before = {"x": images * x[0].numel(), "dy": images * dy[0].numel(), "parts": images * patches * 9 * c}
    with run(Far("weight_gradient_kernel", (0, images, 0), before, {"n": images})):
        out = depthwise_gradient.weight_gradient(dy, x, stride)
    want = depthwise_gradient.reference_weight(dy, x, stride)
    sizes = depthwise_gradient.reference_weight(dy.abs(), x.abs(), stride)
    return out, want, depthwise_gradient.tolerance(want, sizes, 2 * 14 * 3, F16)


def _pointwise(pixels: int) -> Judged:
    x, weight, bias, residual = _map(1, 16, 10, 13), _random(24, 16, 1, 1), _random(24), _map(1, 24, 10, 13)
    tile = pointwise.fit(tiles("", "pointwise")["large_half"], 16, 24)
    before = {"x": pixels * 16, "out": pixels * 24, "residual": pixels * 24}
    with run(Far("pointwise_kernel", (pixels // tile["m"], 0, 0), before, {"pixels": pixels})):
        out = pointwise.pointwise(x, weight, bias, residual, True, tile=tile)
    want = pointwise.reference(x, weight, bias, residual, True)
    return out, want, pointwise.tolerance(x, weight, bias, residual, want)


def _pointwise_input(pixels: int) -> Judged:
    dy, weight = _map(1, 24, 10, 13), _random(24, 16, 1, 1)
    tile = pointwise.fit(tiles("", "pointwise")["large_half"], 24, 16)
    far = Far(
        "pointwise_kernel",
        (pixels // tile["m"], 0, 0),
        {"x": pixels * 24, "out": pixels * 16},
        {"pixels": pixels},
    )
    with run(far):
        out = pointwise.input_gradient(dy, weight, tile=tile)
    want = pointwise.reference_gradient(dy, weight)
    return out, want, pointwise.tolerance(dy, weight.transpose(0, 1), None, None, want)


def _depthwise_project(images: int, stride: int) -> Judged:
    """On odd maps, so that the first program begins within an image."""
    h, c, cout = 7, 24, 16
    x = _map(2, c, h, h)
    spread, project = (_random(c, 1, 3, 3), _random(c)), (_random(cout, c, 1, 1), _random(cout))
    tile = pointwise.fit(tiles("", "depthwise_project")["large_half"], c, cout)
    size = (h - 1) // stride + 1
    pixels, residual = images * size**2, _map(2, cout, size, size)
    before = {"x": images * h * h * c, "out": pixels * cout, "residual": pixels * cout}
    far = Far("depthwise_project_kernel", (pixels // tile["m"], 0, 0), before, {"pixels": pixels})
    with run(far):
        out = depthwise_project.depthwise_project(x, spread, project, stride, residual, tile=tile)
    want = depthwise_project.reference(x, spread, project, stride, residual)
    return out, want, depthwise_project.tolerance(x, spread, project, stride, residual, want)


def _pointwise_weight() -> Judged:
    """2**24 parts before, of one step each."""
    dy, x, parts = _map(1, 24, 10, 12), _map(1, 16, 10, 12), 2**24
    tile = tiles("", "pointwise_gradient")["half"]
    pixels = parts * tile["k"]
    before = {"dy": pixels * 24, "x": pixels * 16, "parts": parts * 24 * 16}
    with run(Far("weight_gradient_kernel", (0, parts, 0), before, {"pixels": pixels})):
        out = pointwise_gradient.weight_gradient(dy, x, tile=tile)
    want = pointwise_gradient.reference(dy, x)
    return out, want, pointwise_gradient.tolerance(dy, x, want)


def _stem(x: Tensor, far: Far) -> Judged:
    norm = torch.tensor([[0.02, 0.02, 0.02], [-2.0, -2.0, -2.0]]) if x.dtype == torch.uint8 else None
    weight, bias = _random(16, 3, 3, 3), _random(16)
    with run(far):
        out = stem.stem(x, weight, bias, True, norm=norm)
    want = stem.reference(x, weight, bias, True, norm)
    return out, want, stem.tolerance(x, weight, bias, want, norm)


def _stem_images() -> Judged:
    x = _random(1, 3, 105, 105)
    before = {"x": BEFORE * x.numel(), "out": BEFORE * 53 * 53 * 16}
    assert min(before.values()) > 2**31
    return _stem(x, Far("stem_kernel", (0, BEFORE, 0), before))


def _stem_steps(axis: int) -> Judged:
    """A view whose neighbours along an axis are 2**30 elements apart: of the memory few pages are touched."""
    strides = [0, 1, 9, 3]
    strides[axis] = 2**30
    x = torch.empty(2**31 + 2**10, dtype=torch.uint8).as_strided((1, 3, 3, 3), strides)
    x.copy_(torch.randint(0, 256, (1, 3, 3, 3)))
    return _stem(x, Far("stem_kernel"))


def _features() -> Judged:
    x, weight, bias = _map(5, 168, 7, 7), _random(24, 168, 1, 1), _random(24)
    tile = tiles("", "head")["half"]
    images = BEFORE * tile["images"]
    before = {"x": images * x[0].numel(), "out": images * 24}
    assert before["x"] > 2**31
    with run(Far("pool_kernel", (0, BEFORE, 0), before, {"images": images})):
        out = head.features(x, weight, bias, tile=tile)
    want = head.reference(x, weight, bias)
    return out, want, head.tolerance(x, weight, bias, want)


OPERATORS: dict[str, Callable[[], Judged]] = {
    "depthwise s1": lambda: _depthwise(1),
    "depthwise s2": lambda: _depthwise(2),
    "depthwise input gradient s2": _depthwise_input,
    "depthwise weight gradient s1": lambda: _depthwise_weight(1),
    "depthwise weight gradient s2": lambda: _depthwise_weight(2),
    "pointwise": lambda: _pointwise(2**28),
    "pointwise past 2**31 pixels": lambda: _pointwise(2**33),
    "pointwise input gradient": lambda: _pointwise_input(2**28),
    "pointwise weight gradient": _pointwise_weight,
    "depthwise project s1": lambda: _depthwise_project(2**22, 1),
    "depthwise project s2": lambda: _depthwise_project(2**22, 2),
    "depthwise project past 2**31 pixels": lambda: _depthwise_project(2**29, 1),
    "stem": _stem_images,
    "stem with far channels": lambda: _stem_steps(1),
    "stem with far rows": lambda: _stem_steps(2),
    "stem with far columns": lambda: _stem_steps(3),
    "features": _features,
}


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    narrow: bool = False

    def __str__(self) -> str:
        return f"{self.op} in 32 bits" if self.narrow else self.op


CASES = [Case(op, narrow) for op in OPERATORS for narrow in (False, True)]


def _verdict(case: Case) -> str:
    from triton.runtime.errors import InterpreterError

    torch.manual_seed(0)
    try:
        with without_64_bits() if case.narrow else contextlib.nullcontext():
            return triton_interpreter.judge(*OPERATORS[case.op]())
    except InterpreterError as error:
        return str(error)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    return triton_interpreter.verdicts(__file__)


@pytest.mark.parametrize("op", OPERATORS)
def test_elements_past_32_bits_are_found(op: str, verdicts: dict[str, str]) -> None:
    assert verdicts[op] == ""


@pytest.mark.parametrize("op", OPERATORS)
def test_they_are_not_found_without_64_bits(op: str, verdicts: dict[str, str]) -> None:
    """What shows that the test above can fail."""
    assert (
        "outside of the tensors" in verdicts[f"{op} in 32 bits"] or "off by" in verdicts[f"{op} in 32 bits"]
    )


if __name__ == "__main__":
    triton_interpreter.print_verdicts(CASES, _verdict)
