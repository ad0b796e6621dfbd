"""`python -m bench.gpu`, as far as it goes without a GPU."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """bench.gpu on the CPU, with the float64 twin in the kernel's place."""
    monkeypatch.syspath_prepend(ROOT)
    from bench import gpu
    from kernels import depthwise

    def twin(x, weight, bias, stride, relu6, *, out=None, tile=None):
        y = depthwise.reference(x, weight, bias, stride, relu6).to(x.dtype)
        return y.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(y)

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(depthwise, "depthwise", twin)
    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    command = [sys.executable, "-m", "bench.gpu"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 2
    assert child.stdout == ""
    assert child.stderr.count("\n") == 1
    assert "no CUDA device" in child.stderr


def test_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    for folder in ("bench", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "mnv2_fast").mkdir()
    for name in ("__init__.py", "arch.py"):
        shutil.copy(ROOT / "mnv2_fast" / name, tmp_path / "mnv2_fast")
    program = (
        "import sys, torch, kernels\n"
        "from bench import gpu\n"
        "gpu.DEVICE = 'cpu'\n"
        "shapes = [(shape, stride) for shape in gpu.ODD_SHAPES[-2:] for stride in (1, 2)]\n"
        "assert list(gpu.check_depthwise(shapes, [torch.float16])) == []\n"
        "assert not [name for name in sys.modules if name.startswith('mnv2_fast.') and 'arch' not in name]\n"
        "print(kernels.__file__)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    child = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr[-4000:]
    assert Path(child.stdout.strip()).parent.parent == tmp_path


def _unwritten(x, weight, bias, stride, relu6, *, out, tile):
    return out


def _without_nan(x, weight, bias, stride, relu6, *, out, tile):
    from kernels import depthwise

    return out.copy_(depthwise.reference(x, weight, bias, stride, relu6).nan_to_num(0))


def _slightly_off(x, weight, bias, stride, relu6, *, out, tile):
    from kernels import depthwise

    return out.copy_(depthwise.reference(x, weight, bias, stride, relu6) * 1.01)


@pytest.mark.parametrize("kernel", [_unwritten, _without_nan, _slightly_off])
def test_check_finds_a_wrong_kernel(gpu, monkeypatch: pytest.MonkeyPatch, kernel: Callable) -> None:
    arguments = [((2, 33, 7, 8), 1)], [torch.float16]
    assert list(gpu.check_depthwise(*arguments)) == []
    monkeypatch.setattr("kernels.depthwise.depthwise", kernel)
    assert list(gpu.check_depthwise(*arguments))


def test_every_measurement_makes_a_row(gpu, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def once(call: Callable[[], object]) -> tuple[float, float, float]:
        call()
        return 2.0, 1.0, 3.0

    monkeypatch.setattr(gpu, "timed", once)
    monkeypatch.setattr(gpu, "BATCHES", (1,))
    monkeypatch.setattr(gpu, "COPY_BYTES", 2**20)
    monkeypatch.setattr(gpu, "_compiled_times", lambda batch, limit: f"not compiled within {limit:.0f} s")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    rows = gpu.measure(lambda: 7.0)
    layers = gpu.depthwise_layers()
    assert sum(count for _, count in layers) == 17
    assert len(rows) == 2 * len(layers) + 2
    for row in rows[:-1]:
        assert (row.device, row.dtype, row.ms, row.ms_p20, row.ms_p80) == ("a GPU", "fp16", 2.0, 1.0, 3.0)
    assert rows[0].gbs_share == pytest.approx(rows[0].gbs / rows[0].gbs_copy)
    assert rows[0].gbs == pytest.approx((32 * 112 * 112 * 2 + 32 * 10) * 2 / 1e9 / 2e-3)
    assert math.isnan(rows[-1].ms)
    assert rows[-1].note == "not compiled within 7 s"
    assert "all depthwise layers, triton: 34.000 ms" in capsys.readouterr().out


def test_plain_network_is_torchvisions(gpu) -> None:
    from mnv2_fast._torchvision import torchvision

    torch.manual_seed(0)
    theirs = torchvision().models.mobilenet_v2(num_classes=7).eval()
    ours = gpu.plain_network(7).eval()
    for spec, layer in zip(ours.specs, ours.layers, strict=True):
        parts = {spec.conv: layer[2] if spec.kind == "linear" else layer[0], spec.bn: layer[1]}
        for name, part in parts.items():
            if name:
                part.load_state_dict(theirs.get_submodule(name).state_dict(), strict=spec.kind != "linear")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_resources_are_printed_without_a_gpu(gpu, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    layers = gpu.depthwise_layers()[:1]
    monkeypatch.setattr(gpu, "depthwise_layers", lambda: layers)
    assert gpu.main(["--resources"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["registers", "stack", "local"]
    assert len(lines) == 12
    assert all(line.split()[-2:] == ["0", "0"] for line in lines)


def test_a_missing_package_is_named(gpu, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu.main([]) == 2
    assert "torch is not installed: install torch>=2.11" in capsys.readouterr().err
