"""The Triton operators but the depthwise one: their answers in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton_interpreter
from torch import Tensor
from triton_interpreter import kinds

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from mnv2_fast.kernels import (
    common,
    depthwise_gradient,
    depthwise_project,
    head,
    pointwise,
    pointwise_gradient,
    stem,
)
from mnv2_fast.kernels.common import CONFIGS, GRID_LIMIT, arithmetic, tiles
from mnv2_fast.kernels.inverted_residual import GEOMETRIES

NORM = [[0.0171, 0.0175, 0.0174], [-2.118, -2.036, -1.804]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: operator, x's shape, dtype, and what the operator's function reads of the rest."""

    op: str
    shape: tuple[int, int, int, int]
    dtype: str
    cout: int = 0
    stride: int = 1
    tile: str = ""
    tf32: bool = False
    relu6: bool = True
    residual: bool = False
    from_bytes: bool = False
    layout: str = "channels_last"
    planted: str = ""
    grid_limit: int = GRID_LIMIT

    def __str__(self) -> str:
        parts = [self.op, "x".join(map(str, self.shape)), self.dtype]
        for field in dataclasses.fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value}")
        return "-".join(parts)


# Answers are judged by element: out, a float64 twin's answer, and how far out may be from it.
Judged = tuple[Tensor, Tensor, Tensor]


def _tensor(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).mul(scale).add(shift).to(dtype)


def _laid(x: Tensor, case: Case) -> Tensor:
    """x in the case's layout, with what the case plants."""
    if case.planted:
        x[tuple(size // 2 for size in x.shape)] = float(case.planted)
    if case.layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if case.layout == "sliced":
        n, c, h, w = x.shape
        wide = torch.zeros((n, 2 * c, h, w + 3), dtype=x.dtype)
        wide.fill_(torch.nan if x.is_floating_point() else 77)
        wide[:, ::2, :, 1:-2] = x
        return wide[:, ::2, :, 1:-2]
    return x


def _guarded(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaN of `shape` inside of NaN: what is left shows an element not written, what is not one outside."""
    count = math.prod(shape)
    memory = torch.full((count + 2 * 64,), torch.nan, dtype=dtype)
    return memory, memory[64 : 64 + count].view(*shape)


def _image(case: Case, channels: int, dtype: torch.dtype, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    memory, inner = _guarded((case.shape[0], *size, channels), dtype)
    return memory, inner.permute(0, 3, 1, 2)


def _pointwise(case: Case, dtype: torch.dtype, tile: Mapping[str, int]) -> tuple[Tensor, Judged]:
    n, cin, h, w = case.shape
    x = _laid(_tensor(*case.shape, dtype=dtype, scale=2), case)
    weight = _tensor(case.cout, cin, 1, 1, dtype=dtype, scale=cin**-0.5)
    bias = _tensor(case.cout, dtype=dtype, shift=2)
    residual = _laid(_tensor(n, case.cout, h, w, dtype=dtype), dataclasses.replace(case, planted=""))
    args = (bias, residual if case.residual else None)
    memory, out = _image(case, case.cout, dtype, (h, w))
    pointwise.pointwise(x, weight, *args, case.relu6, out=out, tf32=case.tf32, tile=tile)
    want = pointwise.reference(x, weight, *args, case.relu6)
    return memory, (out, want, pointwise.tolerance(x, weight, *args, want, case.tf32))


def _pointwise_input(case: Case, dtype: torch.dtype, tile: Mapping[str, int]) -> tuple[Tensor, Judged]:
    n, cin, h, w = case.shape
    dy = _laid(_tensor(n, case.cout, h, w, dtype=dtype), case)
    weight = _tensor(case.cout, cin, 1, 1, dtype=dtype)
    residual = _tensor(*case.shape, dtype=dtype) if case.residual else None
    memory, out = _image(case, cin, dtype, (h, w))
    pointwise.input_gradient(dy, weight, residual, out=out, tf32=case.tf32, tile=tile)
    want = pointwise.reference_gradient(dy, weight, residual)
    return memory, (
        out,
        want,
        pointwise.tolerance(dy, weight.transpose(0, 1), None, residual, want, case.tf32),
    )


def _pointwise_weight(case: Case, dtype: torch.dtype, tile: Mapping[str, int]) -> tuple[Tensor, Judged]:
    n, cin, h, w = case.shape
    x, dy = _laid(_tensor(*case.shape, dtype=dtype), case), _tensor(n, case.cout, h, w, dtype=dtype)
    memory, out = _guarded((case.cout, cin, 1, 1), dtype)
    pointwise_gradient.weight_gradient(dy, x, out=out, tf32=case.tf32, tile=tile)
    want = pointwise_gradient.reference(dy, x)
    return memory, (out, want, pointwise_gradient.tolerance(dy, x, want, case.tf32))


def _depthwise_input(case: Case, dtype: torch.dtype, tile: Mapping[str, int]) -> tuple[Tensor, Judged]:
    n, c, h, w = case.shape
    size = (h - 1) // case.stride + 1, (w - 1) // case.stride + 1
    dy, weight = _laid(_tensor(n, c, *size, dtype=dtype), case), _tensor(c, 1, 3, 3, dtype=dtype)
    memory, out = _image(case, c, dtype, (h, w))
    depthwise_gradient.input_gradient(dy, weight, (h, w), case.stride, out=out, tile=tile)
    want, size_of = (
        depthwise_gradient.reference_input(f(dy), f(weight), (h, w), case.stride)
        for f in (Tensor.double, Tensor.abs)
    )
    return memory, (out, want, depthwise_gradient.tolerance(want, size_of, 9, dtype))


def _depthwise_weight(case: Case, dtype: torch.dtype, tile: Mapping[str, int]) -> tuple[Tensor, Judged]:
    n, c, h, w = case.shape
    size = (h - 1) // case.stride + 1, (w - 1) // case.stride + 1
    x, dy = _laid(_tensor(*case.shape, dtype=dtype), case), _tensor(n, c, *size, dtype=dtype)
    memory, out = _guarded((3, 3, 1, c), dtype)
    out = out.permute(3, 2, 0, 1)
    depthwise_gradient.weight_gradient(dy, x, case.stride, out=out, tile=tile)
    want, size_of = (
        depthwise_gradient.reference_weight(f(dy), f(x), case.stride) for f in (Tensor.double, Tensor.abs)
    )
    return memory, (out, want, depthwise_gradient.tolerance(want, size_of, n * size[0] * size[1], dtype))


def _depthwise_project(case: Case, dtype: torch.dtype, tile: Mapping[str, int]) -> tuple[Tensor, Judged]:
    n, c, h, w = case.shape
    size = (h - 1) // case.stride + 1, (w - 1) // case.stride + 1
    x = _laid(_tensor(*case.shape, dtype=dtype, scale=2), case)
    spread = _tensor(c, 1, 3, 3, dtype=dtype), _tensor(c, dtype=dtype, shift=2)
    project = _tensor(case.cout, c, 1, 1, dtype=dtype, scale=c**-0.5), _tensor(case.cout, dtype=dtype)
    residual = _tensor(n, case.cout, *size, dtype=dtype) if case.residual else None
    args = x, spread, project, case.stride, residual
    memory, out = _image(case, case.cout, dtype, size)
    depthwise_project.depthwise_project(*args, out=out, tf32=case.tf32, tile=tile)
    want = depthwise_project.reference(*args)
    return memory, (out, want, depthwise_project.tolerance(*args, want, case.tf32))


def _stem(case: Case, dtype: torch.dtype, tile: Mapping[str, int]) -> tuple[Tensor, Judged]:
    _, _, h, w = case.shape
    norm = torch.tensor(NORM) if case.from_bytes else None
    image = (
        torch.randint(0, 256, case.shape, dtype=torch.uint8)
        if case.from_bytes
        else _tensor(*case.shape, dtype=dtype)
    )
    x, weight = _laid(image, case), _tensor(case.cout, 3, 3, 3, dtype=dtype)
    bias = _tensor(case.cout, dtype=dtype, shift=2)
    memory, out = _image(case, case.cout, dtype, ((h - 1) // 2 + 1, (w - 1) // 2 + 1))
    stem.stem(x, weight, bias, case.relu6, norm=norm, out=out, tf32=case.tf32, tile=tile)
    want = stem.reference(x, weight, bias, case.relu6, norm)
    return memory, (out, want, stem.tolerance(x, weight, bias, want, norm, case.tf32))


def _features(case: Case, dtype: torch.dtype, tile: Mapping[str, int]) -> tuple[Tensor, Judged]:
    n, cin, _, _ = case.shape
    x = _laid(_tensor(*case.shape, dtype=dtype, scale=2), case)
    weight, bias = (
        _tensor(case.cout, cin, 1, 1, dtype=dtype, scale=cin**-0.5),
        _tensor(case.cout, dtype=dtype, shift=2),
    )
    memory, out = _guarded((n, case.cout), dtype)
    head.features(x, weight, bias, out=out, tf32=case.tf32, tile=tile)
    want = head.reference(x, weight, bias)
    return memory, (out, want, head.tolerance(x, weight, bias, want, case.tf32))


# Operator -> its function and the tile table that it reads.
OPERATORS: dict[str, tuple[Callable[[Case, torch.dtype, Mapping[str, int]], tuple[Tensor, Judged]], str]] = {
    "stem": (_stem, "stem"),
    "pointwise": (_pointwise, "pointwise"),
    "pointwise input gradient": (_pointwise_input, "pointwise"),
    "pointwise weight gradient": (_pointwise_weight, "pointwise_gradient"),
    "depthwise input gradient": (_depthwise_input, "depthwise"),
    "depthwise weight gradient": (_depthwise_weight, "depthwise_weight"),
    "depthwise project": (_depthwise_project, "depthwise_project"),
    "features": (_features, "head"),
}


def _products(op: str, stride: int = 1) -> Iterator[Case]:
    """Cases of an operator that multiplies matrices: around the tiles' edges, layouts, planted values."""
    sizes = ("",) if op in ("pointwise weight gradient", "features") else ("large", "small")
    shapes = [
        ((1, 1, 1, 1), 1),
        ((3, 16, 2, 5), 24),
        ((1, 17, 7, 9), 33),
        ((2, 72, 3, 5), 15),
        ((1, 24, 12, 11), 144),
    ]
    for ((shape, cout), (dtype, tf32)), size in itertools.product(itertools.product(shapes, kinds()), sizes):
        kind = arithmetic(getattr(torch, dtype), tf32)
        tile = "_".join(filter(None, (size, kind)))
        yield Case(
            op,
            shape,
            dtype,
            cout,
            stride,
            tile,
            tf32=tf32,
            relu6=sum(shape) % 2 == 0,
            residual=cout % 2 == 1,
        )
    tile = "small_ieee" if sizes[0] else "ieee"
    yield Case(op, (0, 8, 3, 3), "float32", 8, stride, tile)
    for layout in ("contiguous", "sliced"):
        yield Case(op, (2, 8, 3, 5), "float32", 8, stride, tile, residual=True, layout=layout)
    for planted in ("nan", "inf", "-inf"):
        yield Case(op, (2, 8, 3, 5), "float16", 8, stride, tile.replace("ieee", "half"), planted=planted)


def _cases() -> list[Case]:
    cases = [
        case
        for op in ("pointwise", "pointwise input gradient", "pointwise weight gradient", "features")
        for case in _products(op)
    ]
    cases += [case for stride in (1, 2) for case in _products("depthwise project", stride)]
    for op, stride in itertools.product(("depthwise input gradient", "depthwise weight gradient"), (1, 2)):
        tables = ("large", "small") if "input" in op else ("",)
        named = "" if op == "depthwise input gradient" and stride == 2 else f"s{stride}"
        for size, (dtype, tf32) in itertools.product(tables, kinds()):
            tile = "_".join(filter(None, (size, named)))
            for shape in ((1, 1, 1, 1), (3, 8, 7, 7), (1, 17, 15, 2), (2, 24, 8, 9), (1, 33, 1, 6)):
                if not tf32:
                    cases.append(Case(op, shape, dtype, stride=stride, tile=tile))
        cases.append(Case(op, (0, 8, 3, 3), "float32", stride=stride, tile=tile))
        cases += [
            Case(op, (2, 8, 6, 5), "float16", stride=stride, tile=tile, layout=layout)
            for layout in ("contiguous", "sliced")
        ]
        cases += [
            Case(op, (2, 8, 6, 5), "float16", stride=stride, tile=tile, planted=planted)
            for planted in ("nan", "inf")
        ]
    for shape, (dtype, tf32), from_bytes in itertools.product(
        ((1, 3, 1, 1), (2, 3, 15, 18), (1, 3, 32, 9)), kinds(), (False, True)
    ):
        tile = arithmetic(getattr(torch, dtype), tf32)
        for layout in ("channels_last", "contiguous", "sliced"):
            cout = 32 if shape[0] == 2 else 17
            cases.append(
                Case(
                    "stem",
                    shape,
                    dtype,
                    cout,
                    tile=tile,
                    tf32=tf32,
                    from_bytes=from_bytes,
                    layout=layout,
                    relu6=cout == 32,
                )
            )
    cases += [
        Case("stem", (2, 3, 5, 6), "float16", 8, tile="half", planted=planted) for planted in ("nan", "inf")
    ]
    cases.append(Case("stem", (0, 3, 5, 6), "float16", 8, tile="half"))
    # Batches of more images than one launch may have.
    cases.append(Case("stem", (5, 3, 3, 4), "float16", 8, tile="half", grid_limit=2))
    cases.append(Case("features", (11, 16, 1, 2), "float16", 24, tile="half", grid_limit=1))
    cases.append(
        Case("depthwise input gradient", (5, 3, 3, 4), "float16", stride=2, tile="small", grid_limit=2)
    )
    return cases


CASES = _cases()


def _tile(case: Case) -> Mapping[str, int]:
    table = OPERATORS[case.op][1]
    return tiles(
        "", f"{table}_input_s2" if case.op == "depthwise input gradient" and case.stride == 2 else table
    )[case.tile]


def _verdict(case: Case) -> str:
    """What is wrong with the kernel's answer to one case, or "". Runs in the child."""
    torch.manual_seed(0)
    with mock.patch.object(common, "GRID_LIMIT", case.grid_limit):
        memory, (out, want, allowed) = OPERATORS[case.op][0](case, getattr(torch, case.dtype), _tile(case))
    if not (memory[:64].isnan().all() and memory[-64:].isnan().all()):
        return "wrote outside the output"
    return triton_interpreter.judge(out, want, allowed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_matches_float64(case: Case, verdicts: dict[str, str]) -> None:
    assert verdicts[str(case)] == ""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_tile_table_is_complete(path: Path) -> None:
    """Every table has the rows that the launchers look for, with the numbers that the kernels read."""
    kinds, warps = ("half", "tf32", "ieee"), {"warps"}
    product = warps | {"m", "n", "k", "stages"}
    wanted = {
        "depthwise_project": (
            [f"{size}_{kind}" for size in ("large", "small") for kind in kinds],
            product | {"used"},
        ),
        "stem": (kinds, warps | {"m"}),
        "pointwise": ([f"{size}_{kind}" for size in ("large", "small") for kind in kinds], product),
        "head": (kinds, product | {"images"}),
        "pointwise_gradient": (kinds, product),
        "norm": (("sums", "activate"), warps | {"m", "n"}),
        "train_stem": (kinds, warps | {"m"}),
        "train_depthwise": (
            [f"{what}_s{stride}" for what in ("forward", "gradients") for stride in (1, 2)],
            warps | {"rows", "cols", "patches", "lanes"},
        ),
        "train_pointwise": (
            [
                f"{what}_{kind}"
                for what in ("forward", "forward_wide", "input", "input_wide", "weight")
                for kind in kinds
            ],
            product,
        ),
        "train_pointwise_both": (kinds, warps | {"k", "most", "stages"}),
        "depthwise_input_s2": (("large", "small"), warps | {"rows", "block"}),
        "depthwise_weight": (("s1", "s2"), warps | {"rows", "cols", "block"}),
        "block": (
            ("stem", *(f"{size}_s{stride}" for size, stride in GEOMETRIES)),
            warps | {"slab", "wide"},
        ),
    }
    table = json.loads(path.read_text())
    assert path.stem != "default" or table.keys() == wanted.keys() | {"depthwise"}
    for kernel in table.keys() & wanted.keys():
        rows, names = wanted[kernel]
        assert set(rows) <= table[kernel].keys()
        for row in table[kernel].values():
            assert row.keys() == names
            assert all(row[name].bit_count() == 1 for name in row.keys() - {"rows", "stages", "wide", "used"})
            assert row.get("used", 0) in (0, 1)


F16 = {"dtype": torch.float16}


def _project(x: Tensor, cin: int = 3, stride: int = 2, residual: Tensor | None = None) -> Tensor:
    spread, project = (torch.zeros(3, 1, 3, 3), torch.zeros(3)), (torch.zeros(4, cin, 1, 1), torch.zeros(4))
    return depthwise_project.depthwise_project(x, spread, project, stride, residual)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pointwise.pointwise(torch.zeros(2, 3), torch.zeros(4, 3, 1, 1)), "4-dimensional"),
        (lambda: pointwise.pointwise(torch.zeros(1, 3, 2, 2), torch.zeros(4, 2, 1, 1)), "do not fit"),
        (
            lambda: pointwise.pointwise(torch.zeros(1, 3, 2, 2), torch.zeros(4, 3, 1, 1), torch.zeros(3)),
            "do not fit",
        ),
        (
            lambda: pointwise.pointwise(
                torch.zeros(1, 3, 2, 2), torch.zeros(4, 3, 1, 1), None, torch.zeros(1, 4, 2, 1)
            ),
            "residual must be",
        ),
        (
            lambda: pointwise.pointwise(torch.zeros(1, 3, 2, 2), torch.zeros(4, 3, 1, 1, **F16)),
            "share a device",
        ),
        (
            lambda: pointwise.pointwise(
                torch.zeros(1, 3, 2, 2), torch.zeros(4, 3, 1, 1), out=torch.zeros(1, 4, 2, 2)
            ),
            "out must be channels_last",
        ),
        (lambda: pointwise.input_gradient(torch.zeros(1, 3, 2, 2), torch.zeros(4, 3, 1, 1)), "do not fit"),
        (
            lambda: pointwise_gradient.weight_gradient(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 1)),
            "share N, H and W",
        ),
        (
            lambda: pointwise_gradient.weight_gradient(
                torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 2, **F16)
            ),
            "use one of each",
        ),
        (
            lambda: depthwise_gradient.input_gradient(
                torch.zeros(1, 3, 2, 2), torch.zeros(3, 1, 3, 3), (5, 4), 2
            ),
            "needs dy",
        ),
        (
            lambda: depthwise_gradient.input_gradient(
                torch.zeros(1, 3, 2, 2), torch.zeros(3, 3, 3, 3), (4, 4), 2
            ),
            "weight must be",
        ),
        (
            lambda: depthwise_gradient.weight_gradient(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), 3),
            "stride must be 1 or 2",
        ),
        (
            lambda: stem.stem(torch.zeros(1, 4, 2, 2), torch.zeros(4, 3, 3, 3), torch.zeros(4), True),
            r"\[N, 3, H, W\]",
        ),
        (
            lambda: stem.stem(
                torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(4, 3, 3, 3), torch.zeros(4), True
            ),
            "x must be torch.float32",
        ),
        (
            lambda: stem.stem(
                torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
                torch.zeros(4, 3, 3, 3),
                torch.zeros(4),
                True,
                norm=torch.zeros(3, 2),
            ),
            r"norm must be float32 \(2, 3\)",
        ),
        (lambda: _project(torch.zeros(1, 3, 5, 4), cin=4), "do not fit"),
        (lambda: _project(torch.zeros(1, 4, 5, 4)), "x has 4 channels"),
        (lambda: _project(torch.zeros(1, 3, 5, 4), residual=torch.zeros(1, 4, 5, 4)), "residual must be"),
        (lambda: _project(torch.zeros(1, 3, 5, 4, **F16)), "must share one of"),
        (lambda: _project(torch.zeros(1, 3, 5, 4), stride=3), "stride must be 1 or 2"),
        (
            lambda: head.features(torch.zeros(1, 3, 0, 2), torch.zeros(4, 3, 1, 1), torch.zeros(4)),
            "at least 1x1",
        ),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


if __name__ == "__main__":
    triton_interpreter.print_verdicts(CASES, _verdict)
