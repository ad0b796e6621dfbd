"""`bench.gpu`'s training step, by the CPU's kernels where the GPU's are not."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from bench import gpu_forms, gpu_network, gpu_times, gpu_training
from bench.gpu_children import Answer
from bench.gpu_report import Report


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With small photos, and one thread: several wait for each other where the machine is busy."""
    monkeypatch.setattr(gpu_forms, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_network, "SIZE", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["bf16", "tf32"])
def test_a_right_step_passes(kind: str) -> None:
    assert gpu_training.check_step(kind) == ""


class _Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return -grad


def _one_wrong_gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    loss = gpu_training.torchs_step(model, images, targets)
    linear = model.layers[-1][2]
    return loss + (_Spoiled.apply(linear.weight) - linear.weight).sum() * 0.1


def _all_a_little_off(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    return gpu_training.torchs_step(model, images, targets) * 1.3


def _frozen(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    model.layers[3].requires_grad_(False)
    return gpu_training.torchs_step(model, images, targets)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (_one_wrong_gradient, "largest relative error"),
        (_all_a_little_off, "median relative error"),
        (_frozen, "gradients and statistics, not"),
    ],
)
def test_a_wrong_step_is_found(step: gpu_training.Step, said: str) -> None:
    assert said in gpu_training.check_step("tf32", step)  # where torch is nearest to float64


def test_steps_are_timed_and_reported(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    calls = []

    captured = []

    def timed(call) -> tuple[float, float, float]:
        calls.append(call())
        return (2.0, 1.0, 3.0) if call in captured else (4.0, 3.0, 5.0)

    def graphed(call):
        captured.append(functools.partial(call))
        return captured[-1]

    monkeypatch.setattr(gpu_training, "graphed", graphed)
    monkeypatch.setattr(gpu_times, "timed", timed)
    monkeypatch.setattr(gpu_training, "BATCHES", (2,))
    monkeypatch.setattr(torch, "compile", lambda step: step)
    for name, value in (("memory_allocated", 10**6), ("max_memory_allocated", 3 * 10**6)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    # The CPU's kernels have bfloat16.
    monkeypatch.setattr(gpu_training, "_autocast", lambda dtype: torch.autocast("cpu", torch.bfloat16))
    report = Report("a GPU")
    works = gpu_times.training_works()
    for i, work in enumerate(works):
        assert work.subject == "training"
        report.take(work, Answer(i, work.run(), ""))
    report.take(works[0], Answer(0, None, "out of memory"))
    assert len(calls) == 5
    assert len(captured) == 2
    named = [(row.name, row.contender, row.batch, row.peak_mb, row.images_per_s) for row in report.rows[:5]]
    compiled = "torch.compile channels_last"
    whose = ("mnv2_fast", "torch eager channels_last", compiled)
    whose += ("mnv2_fast, CUDA graph", f"{compiled}, CUDA graph")
    rates = dict(zip(whose, (500.0, 500.0, 500.0, 1000.0, 1000.0), strict=True))
    assert named == [("training step", name, 2, 2.0, rate) for name, rate in rates.items()]
    assert math.isnan(report.rows[5].ms)
    assert report.rows[5].note == "out of memory"
    report.rows.pop()
    said = list(report.tables())[-1]
    assert f"{compiled} 500 images/s (1.00x)" in said
    assert f"{compiled}, CUDA graph 1000 images/s (1.00x)" in said  # beside our graph
    assert "training step, batch    2, mnv2_fast" in capsys.readouterr().out
