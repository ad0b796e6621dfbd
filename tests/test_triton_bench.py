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
    shutil.copy(ROOT / "tests" / "triton_interpreter.py", tmp_path)
    program = (
        "import sys, torch, kernels, triton_interpreter\n"
        "triton_interpreter.mend()\n"
        "from bench import gpu\n"
        "gpu.DEVICE = 'cpu'\n"
        "shapes = [(shape, stride) for shape in gpu.ODD_SHAPES[-2:] for stride in (1, 2)]\n"
        "assert list(gpu.check_depthwise(shapes, [torch.float16])) == []\n"
        "from mnv2_fast import arch\n"
        "specs = [arch.LayerSpec('stem', '', '', 3, 8, 2, True), *arch.inverted_residual('', 8, 8, 2, 3)]\n"
        "specs += arch.inverted_residual('', 8, 8, 1, 2) + list(arch.network(5, 0.01)[-2:])\n"
        "specs[-2] = arch.LayerSpec('pointwise', '', '', 8, 40, 1, True)\n"
        "layers = arch.layers(size=11, specs=specs)\n"
        "shares = [list(gpu.check_forms(k, 2, layers)) for k in (0, 1)]\n"
        "assert shares == [[], []], shares\n"
        "made = gpu.forms(layers)\n"
        "assert {form.name for form in made} > {'stem', 'features', 'block', 'pointwise weight gradient'}\n"
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


class _Probe:
    """A kernel that fills its result with what is right, or with `values`."""

    bytes = 10**6

    def __init__(self, values: float | None = None) -> None:
        self.out, self.values = torch.full((4, 5), torch.nan), values

    def run(self) -> None:
        self.out.copy_(self.judge()[0] if self.values is None else torch.full((4, 5), self.values))

    def eager(self) -> None:
        pass

    def judge(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(20.0).view(4, 5), torch.full((4, 5), 0.1)


def _forms(gpu, **probes: _Probe | None) -> list:
    def make(probe: _Probe | None) -> Callable:
        def made(*_: object) -> _Probe:
            if probe is None:
                raise RuntimeError("ptxas\nis out of registers")
            return probe

        return made

    return [gpu.Form(name, "8 to 8 s1", 7, 10**9, 3, make(probe)) for name, probe in probes.items()]


def test_what_is_wrong_is_named(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = {"right": _Probe(), "off": _Probe(3.05), "unwritten": _Probe(math.nan), "broken": None}
    monkeypatch.setattr(gpu, "forms", lambda layers: _forms(gpu, **probes))
    said = "\n".join(gpu.check_forms())
    assert "right" not in said
    assert "off 8 to 8 s1 at 7, torch.float16: 19 of 20 values beyond tolerance" in said
    assert "unwritten 8 to 8 s1 at 7, torch.float16: 20 values not written, or NaN" in said
    assert "broken 8 to 8 s1 at 7, torch.float16: RuntimeError: is out of registers" in said


def test_shares_are_all_forms_and_a_lost_one_is_named(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "forms", lambda layers: _forms(gpu, **{f"f{i}": None for i in range(7)}))
    said = [line.split()[0] for share in range(3) for line in gpu.check_forms(share, 3)]
    assert set(said) == {f"f{i}" for i in range(7)}
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(gpu.sys, "executable", "/bin/false")
    assert gpu.shared_out(5.0) == ["share 0 of 2: no message", "share 1 of 2: no message"]


def test_every_measurement_makes_a_row(gpu, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def once(call: Callable[[], object]) -> tuple[float, float, float]:
        call()
        return 2.0, 1.0, 3.0

    monkeypatch.setattr(gpu, "timed", once)
    monkeypatch.setattr(gpu, "BATCHES", (1,))
    monkeypatch.setattr(gpu, "OUR_BATCHES", (1,))
    monkeypatch.setattr(gpu, "COPY_BYTES", 2**20)
    monkeypatch.setattr(gpu, "replayed", lambda call: call)
    monkeypatch.setattr(gpu, "our_network", lambda *_: lambda x: x)
    monkeypatch.setattr(gpu, "_compiled_times", lambda batch, limit: f"not compiled within {limit:.0f} s")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(gpu, "forms", lambda: _forms(gpu, right=_Probe(), off=_Probe()))
    rows = gpu.measure(lambda: 7.0, ["off 8 to 8 s1 at 7, torch.float16: 19 of 20 values beyond tolerance"])
    named = [(row.name, row.contender) for row in rows]
    assert named == [
        ("right 8 to 8 s1", "triton"),
        ("right 8 to 8 s1", "torch eager channels_last"),
        ("network", "mnv2_fast by layer, graph"),
        ("network", "torch eager channels_last"),
        ("network", "torch.compile max-autotune"),
    ]
    for row in rows[:-1]:
        assert (row.device, row.dtype, row.ms, row.ms_p20, row.ms_p80) == ("a GPU", "fp16", 2.0, 1.0, 3.0)
    assert rows[0].gbs == pytest.approx(1e6 / 1e9 / 2e-3)
    assert rows[0].gbs_share == pytest.approx(rows[0].gbs / rows[0].gbs_copy)
    assert math.isnan(rows[-1].ms)
    assert rows[-1].note == "not compiled within 7 s"
    assert "all of right, triton: 6.000 ms" in capsys.readouterr().out


def test_our_network_is_the_plain_one(gpu) -> None:
    """Its folded layers, by the float64 twins of the operators, for no interpreter is in this process."""
    torch.manual_seed(0)
    model = gpu.plain_network(7).eval()
    for layer in model.layers[:-1]:
        torch.nn.init.uniform_(layer[1].running_mean, -0.1, 0.1)
        torch.nn.init.uniform_(layer[1].running_var, 0.5, 2)
    network = gpu.our_network(model, torch.float32, "cpu", False)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y = x
        inputs = []
        for i, spec in enumerate(network.specs):
            weight, bias = network._layer(i)
            inputs.append(y)
            if spec.kind == "linear":
                y = torch.nn.functional.linear(y.mean((2, 3)), weight, bias)
                break
            groups = spec.cout if spec.kind == "depthwise" else 1
            y = torch.nn.functional.conv2d(y, weight, bias, spec.stride, weight.shape[2] // 2, 1, groups)
            y = y.clamp(0, 6) if spec.relu6 else y
            y = y + inputs[-spec.residual - 1] if spec.residual else y
        torch.testing.assert_close(y, model(x))


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
