"""The Triton operators on tensors of more than 2**31 elements, of which only the last ones are in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch
import triton_interpreter
from torch import Tensor
from triton_far import Cast, Far, casts, run, without

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from mnv2_fast.kernels import (
    aot,
    depthwise,
    depthwise_gradient,
    depthwise_project,
    head,
    norm,
    pointwise,
    pointwise_gradient,
    stem,
    train_depthwise,
    train_pointwise,
    train_pointwise_gradient,
    train_reference,
    train_stem,
)
from mnv2_fast.kernels.common import GRID_LIMIT, tiles
from mnv2_fast.kernels.norm import Applied, RawGradient
from mnv2_fast.kernels.parts import BLOCK, ROWS, add_parts_kernel

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


def _pointwise_weight(pixels: int) -> Judged:
    """After so many pixels, of one part a step; there are 120 more."""
    dy, x = _map(1, 24, 10, 12), _map(1, 16, 10, 12)
    tile = tiles("", "pointwise_gradient")["half"]
    parts = pixels // tile["k"]
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


def _spread(shape: tuple[int, ...], strides: list[int], axis: int, most: int) -> Tensor:
    """Random bytes, three along an axis, where they are 2**30 elements apart: few pages are touched."""
    strides[axis] = 2**30
    memory = torch.from_numpy(np.empty(2**31 + 2**10, np.uint8))
    return memory.as_strided(shape, strides).copy_(torch.randint(0, most, shape))


def _photo(axis: int, most: int) -> Tensor:
    return _spread((1, 3, 3, 3), [0, 1, 9, 3], axis, most)


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


# The kernels of a training step get small whole numbers, of which all sums are exact: answers are float64's.
# Their programs share the pixels, so that as many shares come before as make the number of pixels wanted.
NORM = torch.tensor([1.0, 0.0, -1.0, 2.0])  # repeated along the channels
FINE = {"m": 16, "n": 16, "k": 16, "warps": 4, "stages": 2}
PAST = 2**32
# Numbers of pixels that 32 bits hold, though not with those that a kernel adds to round up.
BELOW = 2**31 - 4


def _whole(*shape: int, most: int = 2) -> Tensor:
    return torch.randint(-most, most + 1, shape).to(F16)


def _norm_of(c: int, *, relu6: bool = True) -> Applied:
    mean = NORM.repeat(c // 4)
    return Applied(torch.stack((mean, 1 + mean.abs(), mean + 1)), relu6)


def _of(g: Tensor, z: Tensor, *, mask: bool) -> RawGradient:
    values, coefficients = _norm_of(g.shape[-1]).values, NORM.repeat(3, g.shape[-1] // 4)
    return RawGradient(g, z, values, coefficients, mask, batch=True)


def _exact(*pairs: tuple[Tensor | None, Tensor | None]) -> Judged:
    """Answers and what they have to be. No whole number may be another; moments are rounded to float32."""
    found, wanted = [], []
    for out, want in pairs:
        assert out is not None
        assert want is not None
        found.append(out.double().flatten())
        wanted.append(want.double().flatten())
    out, want = torch.cat(found), torch.cat(wanted)
    return out, want, 1e-6 * (1 + want.abs())


def _moments(parts: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """The moments that follow from the parts in memory, and those of the pixels there."""
    assert parts is not None
    return norm.normalize(parts, None, None, 1e-5)[0], train_reference.moments(z)


def _before(pixels: int, local: int, step: int) -> int:
    """Steps of so many pixels before the `local` ones, for `pixels` in all or the next larger number."""
    return -((local - pixels) // step)


def _add_parts() -> Judged:
    """The first elements of three far parts."""
    far = _spread((3, BLOCK), [0, 1], 0, 16)
    out = torch.empty(BLOCK)
    with run(Far("add_parts_kernel")):
        add_parts_kernel[1,](far, out, far.stride(0), 3, BLOCK=BLOCK, ROWS=ROWS, num_warps=1)
    return _exact((out, far.sum(0)))


def _sums(pixels: int) -> Judged:
    c, rows = 16, tiles("", "norm")["sums"]["m"]
    g, z, of = _whole(1, 2, rows - 2, c), _whole(1, 2, rows - 2, c), _norm_of(c)
    shares = _before(pixels, 2 * (rows - 2), rows)
    before = {"g": shares * rows * c, "z": shares * rows * c, "parts": shares * 2 * c}
    with run(Far("sums_kernel", (0, shares, 0), before, {"pixels": shares * rows})):
        parts = norm.sums(g, z, of.values, of.relu6)
    return _exact((parts.sum(0), train_reference.masked(g, z, of)[1]))


def _activate(pixels: int) -> Judged:
    c, rows = 16, tiles("", "norm")["activate"]["m"]
    z, residual, of = _whole(1, 3, rows - 3, c), _whole(1, 3, rows - 3, c), _norm_of(c)
    programs = pixels // rows
    before = dict.fromkeys(("z", "residual", "out"), programs * rows * c)
    with run(Far("activate_kernel", (programs, 0, 0), before, {"pixels": programs * rows})):
        out = norm.activate(z, of.values, of.relu6, residual)
    return _exact((out, train_reference.applied(z, of) + residual))


def _train_pointwise(pixels: int) -> Judged:
    """One program has two steps: as many shares of two come before."""
    cin, cout, local = 16, 24, 28
    x, of, weight = _whole(1, 4, 7, cin), _norm_of(cin), _whole(cout, cin, 1, 1, most=1)
    step = 2 * FINE["m"]
    shares = _before(pixels, local, step)
    before = {"x": shares * step * cin, "out": shares * step * cout, "parts": shares * 3 * cout}
    with run(Far("forward_kernel", (0, shares, 0), before, {"pixels": shares * step})):
        z, parts = train_pointwise.forward(x, of, weight, moments=True, tile=FINE)
    return _exact((z, train_reference.forward(x, of, weight)), _moments(parts, z))


def _train_pointwise_gradients(pixels: int, wanted: str, cout: int = 24) -> Judged:
    """Of a projection, or of an expansion with a residual, whose raw output is made again."""
    cin, local = 16, 28
    expansion = cout >= 2 * cin
    x, weight = _whole(1, 4, 7, cin), _whole(cout, cin, 1, 1, most=1)
    applied, residual = (None, _whole(1, 4, 7, cin)) if expansion else (_norm_of(cin), None)
    z = train_reference.forward(x, applied, weight).to(F16) if expansion else _whole(1, 4, 7, cout)
    of = _of(_whole(1, 4, 7, cout), z, mask=not expansion)
    both = train_pointwise_gradient.choose_tiles("", "half", cin, cout, expansion).both
    assert both is not None
    rows = both["k"] if wanted == "both" else FINE["m"]
    step = -(-local // rows) * rows
    shares = _before(pixels, local, step)
    elements = {"g": cout, "z": cout, "x": cin}
    if wanted != "weight":
        elements |= {"out": cin} | ({"residual": cin} if expansion else {})
    before = {name: shares * step * each for name, each in elements.items()}
    if wanted != "weight" and not expansion:
        before["parts"] = shares * 2 * cin
    if wanted != "input":
        before["weight_parts"] = shares * cout * cin
    kernel = "input_gradient_kernel" if wanted == "input" else "weight_gradient_kernel"
    far = Far(kernel, (0, shares, 0), before, {"pixels": shares * step})
    with run(far), aot.launches() as made:
        dx, parts, dw = train_pointwise_gradient.gradients(
            of,
            weight,
            x,
            applied,
            residual,
            for_x=wanted != "weight",
            for_weight=wanted != "input",
            tile=None if wanted == "both" else FINE,
        )
    assert made[0].kernel.__name__ == kernel
    want = train_reference.gradients(of, weight, x, applied, residual)
    assert [dx is not None, dw is not None] == [wanted != "weight", wanted != "input"]
    pairs = [(dx, want.x), (dw, want.weight), (None if parts is None else parts.sum(0), want.sums)]
    return _exact(*(pair for pair in pairs if pair[0] is not None))


# Two groups of rows in an image: past 2**30 images 32 bits do not count them.
GROUPS = {"rows": 2, "cols": 1, "patches": 2, "channels": 16, "warps": 4}


def _train_depthwise(images: int, stride: int) -> Judged:
    """The columns take two programs, which leave two parts."""
    c, size = 16, 3 * stride
    x, of, weight = _whole(2, 4 * stride, size, c), _norm_of(c), _whole(c, 1, 3, 3)
    before = {"x": images * x[0].numel(), "out": images * 12 * c, "parts": 2 * images * 3 * c}
    with run(Far("forward_kernel", (0, 0, images), before, {"n": images})):
        z, parts = train_depthwise.forward(x, of, weight, stride, moments=True, tile=GROUPS)
    return _exact((z, train_reference.forward(x, of, weight, stride)), _moments(parts, z))


def _train_depthwise_gradients(images: int, stride: int) -> Judged:
    c, size = 16, 3 * stride
    x, applied, weight = _whole(2, 4 * stride, size, c), _norm_of(c), _whole(c, 1, 3, 3)
    of = _of(_whole(2, 4, 3, c), _whole(2, 4, 3, c), mask=True)
    before = dict.fromkeys(("x", "out"), images * x[0].numel())
    before |= dict.fromkeys(("g", "z"), images * of.g[0].numel())
    before |= {"parts": 2 * images * 2 * c, "weight_parts": 2 * images * c * 9}
    with run(Far("gradients_kernel", (0, 0, images), before, {"n": images})):
        dx, parts, dw = train_depthwise.gradients(of, weight, x, applied, stride, tile=GROUPS)
    want = train_reference.gradients(of, weight, x, applied, stride=stride)
    assert parts is not None
    return _exact((dx, want.x), (parts.sum(0), want.sums), (dw, want.weight))


def _train_stem(x: Tensor, images: int = 0) -> Judged:
    """Photos of 7 x 5, so that the first program begins within one: four images are three steps."""
    weight, shares = _whole(16, 3, 3, 3, most=1), images // 4 * 3
    before = {"x": images * x[0].numel(), "out": images * 12 * 16, "parts": shares * 3 * 16}
    with run(Far("forward_kernel", (shares, 0, 0), before if images else {}, {"pixels": images * 12})):
        z, parts = train_stem.forward(x, weight, F16, moments=True, tile=FINE)
    return _exact((z, train_reference.forward(x, None, weight, 2)), _moments(parts, z))


def _train_stem_weight(x: Tensor, images: int) -> Judged:
    of = _of(_whole(len(x), 4, 3, 16), _whole(len(x), 4, 3, 16), mask=True)
    weight, shares = torch.empty(16, 3, 3, 3), images // 4 * 3
    before = {"x": images * x[0].numel(), "parts": shares * 16 * 27}
    before |= dict.fromkeys(("g", "z"), images * of.g[0].numel())
    with run(Far("weight_gradient_kernel", (shares, 0, 0), before, {"pixels": images * 12})):
        dw = train_stem.weight_gradient(of, x, tile=FINE)
    return _exact((dw, train_reference.gradients(of, weight, x, None, stride=2).weight))


def _photos(n: int) -> Tensor:
    return torch.randint(0, 16, (n, 3, 7, 5)).to(F16)


OPERATORS: dict[str, Callable[[], Judged]] = {
    "depthwise s1": lambda: _depthwise(1),
    "depthwise s2": lambda: _depthwise(2),
    "depthwise input gradient s2": _depthwise_input,
    "depthwise weight gradient s1": lambda: _depthwise_weight(1),
    "depthwise weight gradient s2": lambda: _depthwise_weight(2),
    "pointwise": lambda: _pointwise(2**28),
    "pointwise past 2**31 pixels": lambda: _pointwise(2**33),
    "pointwise input gradient": lambda: _pointwise_input(2**28),
    "pointwise weight gradient": lambda: _pointwise_weight(2**30),
    "pointwise weight gradient below 2**31 pixels": lambda: _pointwise_weight(2**31 - 128),
    "depthwise project s1": lambda: _depthwise_project(2**22, 1),
    "depthwise project s2": lambda: _depthwise_project(2**22, 2),
    "depthwise project past 2**31 pixels": lambda: _depthwise_project(2**29, 1),
    "stem": _stem_images,
    "stem with far channels": lambda: _stem(_photo(1, 256), Far("stem_kernel")),
    "stem with far rows": lambda: _stem(_photo(2, 256), Far("stem_kernel")),
    "stem with far columns": lambda: _stem(_photo(3, 256), Far("stem_kernel")),
    "features": _features,
    "add parts": _add_parts,
    "norm activate": lambda: _activate(2**28),
    "norm activate past 2**31 pixels": lambda: _activate(PAST),
    "train depthwise s1": lambda: _train_depthwise(2**30, 1),
    "train depthwise s2": lambda: _train_depthwise(2**30, 2),
    "train depthwise gradients s1": lambda: _train_depthwise_gradients(2**30, 1),
    "train depthwise gradients s2": lambda: _train_depthwise_gradients(2**30, 2),
    # (178956968 + 2) * 12 pixels are 2**31 - 8.
    "train stem below 2**31 pixels": lambda: _train_stem(_photos(2), 178956968),
    "train stem past 2**31 pixels": lambda: _train_stem(_photos(3), 2**28),
    "train stem with far channels": lambda: _train_stem(_photo(1, 16)),
    "train stem with far rows": lambda: _train_stem(_photo(2, 16)),
    "train stem with far columns": lambda: _train_stem(_photo(3, 16)),
    "train stem weight gradient below 2**31 pixels": lambda: _train_stem_weight(_photos(2), 178956968),
    "train stem weight gradient past 2**31 pixels": lambda: _train_stem_weight(_photos(3), 2**28),
    "train expansion input gradient": lambda: _train_pointwise_gradients(BELOW, "input", 40),
}
# Past 2**31 `pixels` has 64 bits, and 32 below.
for _where, _pixels in {"below 2**31 pixels": BELOW, "past 2**31 pixels": PAST}.items():
    OPERATORS |= {
        f"{name} {_where}": functools.partial(*call)
        for name, call in {
            "norm sums": (_sums, _pixels),
            "train pointwise": (_train_pointwise, _pixels),
            "train pointwise input gradient": (_train_pointwise_gradients, _pixels, "input"),
            "train pointwise weight gradient": (_train_pointwise_gradients, _pixels, "weight"),
            "train pointwise both gradients": (_train_pointwise_gradients, _pixels, "both"),
            "train expansion both gradients": (_train_pointwise_gradients, _pixels, "both", 40),
        }.items()
    }
CASTS = casts()


def _judged(op: str, dropped: Collection[Cast]) -> tuple[str, set[Cast]]:
    """What is wrong with an operator's answer without these casts, and the casts that widened something."""
    from triton.runtime.errors import InterpreterError

    torch.manual_seed(0)
    with without(dropped) as met:
        try:
            return triton_interpreter.judge(*OPERATORS[op]()), met
        except InterpreterError as error:
            return str(error), met


_as_written = functools.cache(functools.partial(_judged, dropped=()))


def _without(cast: Cast) -> str:
    """Which operator's answer is wrong without a cast."""
    wrong = (op for op in OPERATORS if cast in _as_written(op)[1] and _judged(op, {cast})[0])
    return next(wrong, "")


@pytest.mark.parametrize("op", OPERATORS)
def test_elements_past_32_bits_are_found(op: str, verdicts: dict[str, str]) -> None:
    assert verdicts[op] == ""


@pytest.mark.parametrize("op", OPERATORS)
def test_they_are_not_found_without_64_bits(op: str, verdicts: dict[str, str]) -> None:
    """What shows that the test above can fail."""
    said = verdicts[f"{op} in 32 bits"]
    assert any(wrong in said for wrong in ("outside of the tensors", "off by", "NaN or Inf where"))


@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_each_cast_is_needed(cast: Cast, verdicts: dict[str, str]) -> None:
    """By an operator whose answer is wrong without it alone."""
    assert verdicts[f"without {cast}"] in OPERATORS


if __name__ == "__main__":
    # What is not written is NaN.
    torch.use_deterministic_algorithms(True)
    checks: dict[str, Callable[[], str]] = {}
    for op in OPERATORS:
        checks[op] = lambda op=op: _as_written(op)[0]
        checks[f"{op} in 32 bits"] = lambda op=op: _judged(op, CASTS)[0]
    for cast in CASTS:
        checks[f"without {cast}"] = lambda cast=cast: _without(cast)
    triton_interpreter.print_verdicts(checks, lambda name: checks[name]())
