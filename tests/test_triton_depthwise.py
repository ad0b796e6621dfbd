"""The Triton depthwise kernel: its answers in Triton's interpreter, its machine code from Triton's ptxas."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton_interpreter

from mnv2_fast import arch
from mnv2_fast.backends import triton as backend

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from mnv2_fast.kernels import aot, common, depthwise
from mnv2_fast.kernels.common import CONFIGS, DTYPES, GRID_LIMIT, slug, tiles

TILES = tiles("", "depthwise")
# Registers a thread may use so that 16 warps fit on a multiprocessor of 65,536.
REGISTERS = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: x's shape, stride, dtype, tile, activation, x's layout, what is planted, launch limit."""

    n: int
    c: int
    h: int
    w: int
    stride: int
    dtype: str
    tile: str
    relu6: bool = True
    layout: str = "channels_last"
    planted: str = ""
    grid_limit: int = GRID_LIMIT

    def __str__(self) -> str:
        parts = [
            f"{self.n}x{self.c}x{self.h}x{self.w}",
            f"s{self.stride}",
            self.dtype,
            self.tile,
            self.layout,
        ]
        parts += [self.planted or "finite", "relu6" if self.relu6 else "linear"]
        parts += [f"chunks of {self.grid_limit}"] if self.grid_limit < GRID_LIMIT else []
        return "-".join(parts)


def _cases() -> list[Case]:
    """Every shape with every stride, dtype and tile; layouts and planted values on one shape."""
    shapes = [
        (1, 1, 1, 1),
        (1, 3, 2, 15),
        (3, 8, 7, 7),
        (1, 17, 15, 2),
        (1, 24, 8, 8),
        (3, 33, 1, 7),
        (1, 33, 15, 8),
        (0, 8, 7, 7),
        (1, 144, 7, 2),
    ]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    cases = [
        Case(*shape, stride, dtype, f"{size}_s{stride}", relu6=(i + stride) % 3 != 0)
        for i, shape in enumerate(shapes)
        for stride in (1, 2)
        for dtype in dtypes
        for size in ("large", "small")
    ]
    for dtype in dtypes:
        for stride in (1, 2):
            for layout in ("contiguous", "sliced", "expanded"):
                cases.append(Case(2, 8, 7, 8, stride, dtype, f"large_s{stride}", layout=layout))
            for planted in ("nan", "inf", "-inf"):
                for relu6 in (True, False):
                    cases.append(
                        Case(1, 8, 7, 8, stride, dtype, f"large_s{stride}", relu6=relu6, planted=planted)
                    )
    cases.append(Case(5, 3, 2, 2, 1, "float32", "large_s1", grid_limit=2))
    return cases


CASES = _cases()


def _input(case: Case) -> torch.Tensor:
    """x [N, C, H, W] in the case's layout, about a third of its outputs below 0 and a third above 6."""
    shape = (case.n, case.c, case.h, case.w)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(shape, dtype=torch.float64).mul(2).to(dtype)
    if case.planted:
        x[0, case.c // 2, case.h // 2, case.w // 2] = float(case.planted)
    if case.layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if case.layout == "sliced":
        wide = torch.full((case.n, 2 * case.c, case.h, case.w + 3), torch.nan, dtype=dtype)
        wide[:, ::2, :, 1:-2] = x
        return wide[:, ::2, :, 1:-2]
    if case.layout == "expanded":
        return x[:1, :, :1].expand(shape)
    return x


def _verdict(case: Case) -> str:
    """What is wrong with the kernel's answer to one case, or "". Runs in the child."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    x = _input(case)
    weight = torch.randn(case.c, 1, 3, 3, dtype=torch.float64).to(dtype)
    bias = torch.randn(case.c, dtype=torch.float64).add(2).to(dtype)
    ho, wo = (case.h - 1) // case.stride + 1, (case.w - 1) // case.stride + 1
    # One image more on either side shows a write outside the output; NaN in it, an element not written.
    guarded = torch.full((case.n + 2, ho, wo, case.c), torch.nan, dtype=dtype)
    out = guarded[1:-1].permute(0, 3, 1, 2)
    with mock.patch.object(common, "GRID_LIMIT", case.grid_limit):
        result = depthwise.depthwise(x, weight, bias, case.stride, case.relu6, out=out, tile=TILES[case.tile])
    if result is not out:
        return "the result is not the buffer that was given"
    if not (guarded[0].isnan().all() and guarded[-1].isnan().all()):
        return "wrote outside the output"
    want = depthwise.reference(x, weight, bias, case.stride, case.relu6)
    allowed = depthwise.tolerance(x, weight, bias, case.stride, want)
    return triton_interpreter.judge(out, want, allowed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_matches_float64(case: Case, verdicts: dict[str, str]) -> None:
    assert verdicts[str(case)] == ""


# The network's own depthwise layers, by what the kernel is compiled for.
LAYERS = sorted({(spec.cin, spec.stride) for spec in arch.network() if spec.kind == "depthwise"})


def _builds() -> list:
    """Every layer for sm_90 in fp16, and one channel count in everything; the other combinations are slow."""
    product = itertools.product(LAYERS, DTYPES, (80, 90), ("large", "small"))
    return [
        pytest.param(
            c,
            stride,
            dtype,
            sm,
            f"{size}_s{stride}",
            id=f"c{c}-s{stride}-{str(dtype).removeprefix('torch.')}-sm{sm}-{size}",
            marks=()
            if c == 144 or (dtype, sm, size) == (torch.float16, 90, "large")
            else (pytest.mark.slow,),
        )
        for (c, stride), dtype, sm, size in product
    ]


@pytest.mark.parametrize(("c", "stride", "dtype", "sm", "tile"), _builds())
def test_compiles_without_spills(
    *,
    c: int,
    stride: int,
    dtype: torch.dtype,
    sm: int,
    tile: str,
    record_property: Callable[[str, object], None],
) -> None:
    row = TILES[tile]
    arguments = depthwise.compile_arguments(c, stride, True, dtype, row)
    built = aot.compile_for(depthwise.depthwise_kernel, sm, arguments, row["warps"])
    for name in ("registers", "stack", "local", "shared"):
        record_property(name, getattr(built, name))
    print(f"registers {built.registers}, stack {built.stack}, local {built.local}, shared {built.shared}")
    assert (built.stack, built.local) == (0, 0)
    assert built.registers <= REGISTERS
    # NaN must survive ReLU6 on the hardware, where the interpreter proves nothing.
    clamps = re.findall(r"\b(?:min|max)\.\S*", built.ptx)
    outputs = row["rows"] * row["cols"] * row["block"] // (32 * row["warps"])
    assert clamps.count("max.NaN.f32") == clamps.count("min.NaN.f32") == outputs
    assert all(".NaN." in clamp or not clamp.endswith("f32") for clamp in clamps)
    if dtype != torch.float32:
        narrow = {torch.float16: "cvt.rn.f16x2.f32", torch.bfloat16: "cvt.rn.bf16x2.f32"}[dtype]
        assert 2 * built.ptx.count(narrow) == outputs
    # Activations move in vectors of a lane's elements, not one by one.
    lane_bytes = row["block"] // (32 * row["warps"]) * dtype.itemsize
    vector = {4: "b32", 8: "v2.b32", 16: "v4.b32"}[lane_bytes]
    assert set(re.findall(r"(?:ld|st)\.global\.(\S+)", built.ptx)) == {vector}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("sizes", ["i32", 1])
def test_odd_channels_and_single_pixels_compile_without_spills(tile: str, sizes: str | int) -> None:
    """At 17 channels no load is a vector; a size of 1 is a constant, as Triton makes it at a launch."""
    row = TILES[tile]
    arguments = depthwise.compile_arguments(17, int(tile[-1]), True, torch.float16, row)
    arguments |= dict.fromkeys(("h", "w", "ho", "wo"), sizes)
    built = aot.compile_for(depthwise.depthwise_kernel, 90, arguments, row["warps"])
    assert (built.stack, built.local) == (0, 0)


def test_linear_kernel_clamps_nothing() -> None:
    row = TILES["large_s1"]
    arguments = depthwise.compile_arguments(144, 1, False, torch.float32, row)
    built = aot.compile_for(depthwise.depthwise_kernel, 90, arguments, row["warps"])
    assert not re.search(r"\b(?:min|max)\.\S*f32", built.ptx)


def test_pack_weight_is_the_same_weight_in_the_kernels_order() -> None:
    weight = torch.randn(5, 1, 3, 3)
    packed = depthwise.pack_weight(weight)
    assert torch.equal(packed, weight)
    assert packed.permute(2, 3, 1, 0).is_contiguous()


def _arguments(**changes: object) -> list:
    values: dict[str, object] = {
        "x": torch.zeros(1, 4, 5, 5),
        "weight": torch.zeros(4, 1, 3, 3),
        "bias": torch.zeros(4),
        "stride": 1,
        "relu6": True,
    }
    return list((values | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4, 5, 5)}, r"x must be \[N, C, H, W\]"),
        ({"x": torch.zeros(1, 3, 5, 5)}, "x has 3 channels"),
        ({"weight": torch.zeros(4, 3, 3)}, "weight must be"),
        ({"bias": torch.zeros(1)}, r"bias \(4,\)"),
        ({"x": torch.zeros(1, 4, 0, 5)}, "at least 1x1"),
        ({"stride": 3}, "stride must be 1 or 2"),
        ({"x": torch.zeros(1, 4, 5, 5, dtype=torch.float64)}, "must share one of"),
        ({"weight": torch.zeros(4, 1, 3, 3, dtype=torch.float16)}, "must share one of"),
        ({"bias": torch.zeros(4, device="meta")}, "use one"),
        ({"x": torch.zeros(1, 4, 65536, 1)}, "split it"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depthwise.depthwise(*_arguments(**changes))


def test_a_wrong_output_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="out must be channels_last"):
        depthwise.depthwise(*_arguments(), out=torch.empty(1, 4, 5, 5))


def test_a_row_beyond_32_bits_is_refused() -> None:
    assert depthwise.limit(torch.Size((1, 2**14, 1, 2**14))) is not None
    assert depthwise.limit(torch.Size((1, 1, 2**15, 2**16))) is not None
    assert depthwise.limit(torch.Size((2**20, 960, 112, 112))) is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_tile_table_is_complete(path: Path) -> None:
    rows = json.loads(path.read_text())["depthwise"]
    assert set(rows) == {f"{size}_s{stride}" for size in ("large", "small") for stride in (1, 2)}
    for row in rows.values():
        assert set(row) == {"rows", "cols", "block", "warps"}
        assert row["block"].bit_count() == row["warps"].bit_count() == 1
        assert row["block"] >= 32 * row["warps"]


def test_a_gpus_own_table_comes_before_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default.json").write_text('{"depthwise": {"a": {"rows": 1}}, "other": {"a": {"rows": 2}}}')
    (tmp_path / "h200.json").write_text('{"depthwise": {"a": {"rows": 3}}}')
    monkeypatch.setattr("mnv2_fast.kernels.common.CONFIGS", tmp_path)
    find = tiles.__wrapped__
    assert slug("NVIDIA H200") == "h200"
    assert find("NVIDIA H200", "depthwise")["a"]["rows"] == 3
    assert find("NVIDIA H200", "other")["a"]["rows"] == 2
    assert find("NVIDIA A100-SXM4-80GB", "depthwise")["a"]["rows"] == 1
    with pytest.raises(KeyError, match="no tiles for 'third'"):
        find("", "third")


def test_backend_declines_what_it_has_no_kernel_for() -> None:
    assert "no network kernel" in (backend.declines("network", *_arguments()) or "")
    assert "serves CUDA tensors, not cpu" in (backend.declines("depthwise", *_arguments()) or "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"x": torch.zeros(1, 4, 5, 5, dtype=torch.float64)}, "no torch.float64 kernels"),
        ({"weight": torch.zeros(4, 1, 3, 3, dtype=torch.float16)}, "another tensor is torch.float16"),
        ({"bias": torch.zeros(4, device="meta")}, "on meta"),
        ({"bias": torch.zeros(4, dtype=torch.complex64).conj().imag}, "negative view"),
        ({"x": torch.zeros(1, 4, 65536, 1)}, "split it"),
    ],
)
def test_backend_declines_tensors_the_kernel_cannot_read(
    changes: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_device_reason", lambda device: None)
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    declined = backend.declines("depthwise", *_arguments(**changes))
    assert declined is None if reason is None else reason in (declined or "")


@pytest.mark.parametrize("op", [op for op in backend.OPERATORS if op not in backend.PROVEN])
def test_what_has_not_run_on_a_gpu_is_off_by_default(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_device_reason", lambda device: None)
    monkeypatch.delenv("MNV2_BACKEND", raising=False)
    assert "has not run on a GPU yet: set MNV2_BACKEND=triton" in (backend.declines(op, *_arguments()) or "")
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    assert backend.declines(op, *_arguments()) is None


def test_backend_says_why_it_is_unavailable() -> None:
    assert backend.available() == (backend.unavailable_reason() == "")
    assert backend.available() or torch.cuda.device_count() == 0


def test_backend_imports_without_triton() -> None:
    program = (
        "import sys, importlib.machinery; sys.modules['triton'] = None\n"
        "from mnv2_fast.backends import triton as backend\n"
        "print(backend.unavailable_reason())\n"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert "triton is not installed" in child.stdout


@pytest.mark.skipif(not backend.available(), reason=backend.unavailable_reason())
def test_backend_on_the_gpu_matches_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    torch.manual_seed(0)
    for dtype in DTYPES:
        x = torch.randn(3, 24, 15, 8, device="cuda").to(dtype)
        weight, bias = (
            torch.randn(24, 1, 3, 3, device="cuda").to(dtype),
            torch.randn(24, device="cuda").to(dtype),
        )
        for stride in (1, 2):
            assert backend.declines("depthwise", x, weight, bias, stride, True) is None
            want = depthwise.reference(x, weight, bias, stride, True)
            got = backend.depthwise(x, weight, bias, stride, True)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert ((got - want).abs() <= depthwise.tolerance(x, weight, bias, stride, want)).all()


if __name__ == "__main__":
    triton_interpreter.print_verdicts(CASES, _verdict)
