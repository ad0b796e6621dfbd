"""The Triton operators but the depthwise one: their answers in Triton's interpreter, their machine code from
ptxas.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor

from mnv2_fast import arch

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from mnv2_fast.kernels import aot, depthwise, depthwise_gradient, head, pointwise, pointwise_gradient, stem
from mnv2_fast.kernels.common import CONFIGS, DTYPES, arithmetic, tiles
from mnv2_fast.kernels.inverted_residual import GEOMETRIES

# Bytes of shared memory that one program may have: sm_80 163 KiB, sm_90 and sm_100 227 KiB.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
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
    "features": (_features, "head"),
}


def _kinds() -> Iterator[tuple[str, bool]]:
    """dtype and whether float32 is multiplied as TF32."""
    for dtype in DTYPES:
        yield str(dtype).removeprefix("torch."), False
    yield "float32", True


def _products(op: str) -> Iterator[Case]:
    """Cases of an operator that multiplies matrices: around the tiles' edges, layouts, planted values."""
    sizes = ("large", "small") if op.startswith("pointwise") and "weight" not in op else ("",)
    shapes = [
        ((1, 1, 1, 1), 1),
        ((3, 16, 2, 5), 24),
        ((1, 17, 7, 9), 33),
        ((2, 72, 3, 5), 15),
        ((1, 24, 12, 11), 144),
    ]
    for ((shape, cout), (dtype, tf32)), size in itertools.product(itertools.product(shapes, _kinds()), sizes):
        kind = arithmetic(getattr(torch, dtype), tf32)
        tile = "_".join(filter(None, (size, kind)))
        yield Case(
            op, shape, dtype, cout, tile=tile, tf32=tf32, relu6=sum(shape) % 2 == 0, residual=cout % 2 == 1
        )
    tile = "small_ieee" if sizes[0] else "ieee"
    yield Case(op, (0, 8, 3, 3), "float32", 8, tile=tile)
    for layout in ("contiguous", "sliced"):
        yield Case(op, (2, 8, 3, 5), "float32", 8, tile=tile, residual=True, layout=layout)
    for planted in ("nan", "inf", "-inf"):
        yield Case(op, (2, 8, 3, 5), "float16", 8, tile=tile.replace("ieee", "half"), planted=planted)


def _cases() -> list[Case]:
    cases = [
        case
        for op in ("pointwise", "pointwise input gradient", "pointwise weight gradient", "features")
        for case in _products(op)
    ]
    for op, stride in itertools.product(("depthwise input gradient", "depthwise weight gradient"), (1, 2)):
        tables = ("large", "small") if "input" in op else ("",)
        named = "" if op == "depthwise input gradient" and stride == 2 else f"s{stride}"
        for size, (dtype, tf32) in itertools.product(tables, _kinds()):
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
        ((1, 3, 1, 1), (2, 3, 15, 18), (1, 3, 32, 9)), _kinds(), (False, True)
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
    memory, (out, want, allowed) = OPERATORS[case.op][0](case, getattr(torch, case.dtype), _tile(case))
    if not (memory[:64].isnan().all() and memory[-64:].isnan().all()):
        return "wrote outside the output"
    return triton_interpreter.judge(out, want, allowed)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    return triton_interpreter.verdicts(__file__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_matches_float64(case: Case, verdicts: dict[str, str]) -> None:
    assert verdicts[str(case)] == ""


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel as a layer launches it, for one GPU."""

    name: str
    kernel: Any
    arguments: Mapping[str, str | int | bool]
    tile: Mapping[str, int]
    sm: int
    dtype: torch.dtype
    tf32: bool = False
    relu6: bool = False
    multiplies: bool = True  # matrices


def _layers(kind: str) -> list[tuple[int, int, int, bool]]:
    """cin, cout, stride and ReLU6 of the network's layers of a kind."""
    return sorted({(s.cin, s.cout, s.stride, s.relu6) for s in arch.network() if s.kind == kind})


def _kernels(
    dtype: torch.dtype, tf32: bool
) -> Iterator[tuple[str, Any, Mapping[str, Any], Mapping[str, int], bool, bool]]:
    """Of every layer: name, kernel, arguments, tile, whether it has a ReLU6 and multiplies matrices."""
    kind = arithmetic(dtype, tf32)
    tile = tiles("", "stem")[kind]
    for from_bytes in (False, True):
        arguments = stem.compile_arguments(arch.STEM_CHANNELS, dtype, tile, from_bytes=from_bytes, tf32=tf32)
        yield f"stem bytes={from_bytes}", stem.stem_kernel, arguments, tile, True, True
    tile = tiles("", "head")[kind]
    yield (
        "features 320x1280",
        head.pool_kernel,
        head.compile_arguments(320, 1280, dtype, tile, tf32=tf32),
        tile,
        True,
        True,
    )
    for (cin, cout, _, relu6), size in itertools.product(
        [*_layers("pointwise"), (1280, 1000, 1, False)], ("large", "small")
    ):
        tile = pointwise.row("", f"{size}_{kind}", cin, cout)
        arguments = pointwise.compile_arguments(
            cin, cout, dtype, tile, relu6=relu6, residual=not relu6, tf32=tf32
        )
        yield f"pointwise {cin}x{cout} {size}", pointwise.pointwise_kernel, arguments, tile, relu6, True
        tile = pointwise.row("", f"{size}_{kind}", cout, cin)
        arguments = pointwise.compile_arguments(
            cout, cin, dtype, tile, residual=True, gradient=True, tf32=tf32
        )
        yield f"pointwise input {cin}x{cout} {size}", pointwise.pointwise_kernel, arguments, tile, False, True
    for cin, cout, _, _ in _layers("pointwise"):
        tile = tiles("", "pointwise_gradient")[kind]
        arguments = pointwise_gradient.compile_arguments(cin, cout, dtype, tile, tf32=tf32)
        yield (
            f"pointwise weight {cin}x{cout}",
            pointwise_gradient.weight_gradient_kernel,
            arguments,
            tile,
            False,
            True,
        )
    if tf32:
        return
    for c, _, stride, _ in _layers("depthwise"):
        tile = tiles("", "depthwise_weight")[f"s{stride}"]
        arguments = depthwise_gradient.weight_arguments(c, stride, dtype, tile)
        yield (
            f"depthwise weight {c} s{stride}",
            depthwise_gradient.weight_gradient_kernel,
            arguments,
            tile,
            False,
            False,
        )
        for size in ("large", "small"):
            tile = tiles("", "depthwise_input_s2" if stride == 2 else "depthwise")[
                size if stride == 2 else f"{size}_s1"
            ]
            if stride == 2:
                kernel, arguments = (
                    depthwise_gradient.input_gradient_s2_kernel,
                    depthwise_gradient.input_arguments(c, dtype, tile),
                )
            else:
                kernel, arguments = (
                    depthwise.depthwise_kernel,
                    depthwise.compile_arguments(c, 1, False, dtype, tile, turned=True),
                )
            yield f"depthwise input {c} s{stride} {size}", kernel, arguments, tile, False, False


def _builds() -> Iterator[Any]:
    """Every layer for every GPU and dtype; of those that are not slow, fp16 on sm_90 alone."""
    for sm, (name, tf32) in itertools.product(SHARED, _kinds()):
        dtype = getattr(torch, name)
        for what, kernel, arguments, tile, relu6, multiplies in _kernels(dtype, tf32):
            build = Build(what, kernel, arguments, tile, sm, dtype, tf32, relu6, multiplies)
            often = sm == 90 and dtype == torch.float16 and "small" not in what
            yield pytest.param(
                build,
                id=f"{what}-{arithmetic(dtype, tf32)}-{name}-sm{sm}",
                marks=() if often else pytest.mark.slow,
            )


@pytest.mark.parametrize("build", list(_builds()))
def test_compiles_without_spills(build: Build, record_property: Callable[[str, object], None]) -> None:
    tile = build.tile
    built = aot.compile_for(build.kernel, build.sm, build.arguments, tile["warps"], tile.get("stages", 3))
    for name in ("registers", "stack", "local", "shared"):
        record_property(name, getattr(built, name))
    print(f"registers {built.registers}, stack {built.stack}, local {built.local}, shared {built.shared}")
    assert (built.stack, built.local) == (0, 0)
    assert built.shared <= SHARED[build.sm]
    # NaN must survive ReLU6 on the hardware, where the interpreter proves nothing.
    clamps = [clamp for clamp in re.findall(r"\b(?:min|max)\.\S*", built.ptx) if clamp.endswith("f32")]
    assert {"max.NaN.f32", "min.NaN.f32"} == set(clamps) if build.relu6 else not clamps
    if build.multiplies:
        on_tensor_cores = re.search(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", built.ptx) is not None
        assert on_tensor_cores == (arithmetic(build.dtype, build.tf32) != "ieee")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_tile_table_is_complete(path: Path) -> None:
    """Every table has the rows that the launchers look for, with the numbers that the kernels read."""
    kinds, warps = ("half", "tf32", "ieee"), {"warps"}
    product = warps | {"m", "n", "k", "stages"}
    wanted = {
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
        "train_pointwise_both": (kinds, warps | {"m", "most", "stages"}),
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
            assert all(row[name].bit_count() == 1 for name in row.keys() - {"rows", "stages", "wide"})


F16 = {"dtype": torch.float16}


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
