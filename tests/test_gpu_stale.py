"""Modules on a GPU whose weights change, as far as they go without one: answers are never stale."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from gpu_stand_in import StandIn, stand_in  # noqa: F401
from helpers import SMALL, TOLERANCE, changed, check, one_thread  # noqa: F401
from torch import Tensor

from mnv2_fast import MobileNetV2, packs
from mnv2_fast.backends import chains

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

pytestmark = pytest.mark.usefixtures("native", "gpu")


def test_frozen_features_before_a_classifier_that_trains(
    model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.features.requires_grad_(False)
    model.train()
    model.features.eval()
    made = []
    pack = packs.Pack.__init__
    monkeypatch.setattr(packs.Pack, "__init__", lambda *a, **k: (made.append(1), pack(*a, **k))[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert model.classifier[1].weight.grad is not None
        optimizer.step()
    assert len(made) == 1


def test_whatever_torch_records_is_seen(model: MobileNetV2, x: Tensor) -> None:
    weight, norm = model.classifier[1].weight, model.features[0][1]

    def train() -> None:
        model.train()(x)
        model.eval()

    def fused_step() -> None:
        optimizer = torch.optim.SGD([weight], 0.5, fused=True)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        weight.grad = None

    other = {k: v * 1.5 if k.startswith("features.0.0") else v.clone() for k, v in model.state_dict().items()}
    third = {k: v * 1.5 if k.startswith("classifier") else v.clone() for k, v in other.items()}
    with torch.no_grad():
        changed(model, x, lambda: weight[0, 1:9].add_(5))
        changed(model, x, lambda: norm.running_var.mul_(4))
        changed(model, x, lambda: setattr(norm, "running_mean", norm.running_mean + 0.5))
        changed(model, x, lambda: setattr(weight, "data", weight.data * 2))
        changed(model, x, fused_step)
        changed(model, x, train)
        changed(model, x, lambda: model.load_state_dict(other))
        changed(model, x, lambda: model.load_state_dict(third, assign=True))
        changed(model, x, lambda: setattr(model.features[3], "use_res_connect", False))


def test_a_write_through_data_is_seen_after_refresh(model: MobileNetV2, x: Tensor) -> None:
    """Of every element: no value is looked at, since that would wait for a GPU."""
    before = check(model, x)
    model.classifier[1].weight.data.mul_(2)
    assert torch.equal(model(x), before)
    model.refresh()
    assert not torch.equal(check(model, x), before)
    assert not packs._sample_addresses([model.classifier[1].weight])


def test_weights_of_inference_mode_are_torchs(x: Tensor) -> None:
    """They have no version, and no value is looked at."""
    with torch.inference_mode():
        model = MobileNetV2(**SMALL).eval()
        assert model.why_not(x) == chains.UNSEEN
        model(x)
        model.classifier[1].weight.add_(1)
        check(model, x, served=False)
        counter = model.features[0][1].num_batches_tracked.clone()
    model = MobileNetV2(**SMALL).eval()
    check(model, x)
    model.features[0][1].num_batches_tracked = counter  # which alone tells of a batch norm's moves
    assert model.why_not(x) == chains.UNSEEN


def test_functional_call(model: MobileNetV2, x: Tensor) -> None:
    for i in range(3):
        weights = {name: p.detach() * (1 + 0.02 * i) for name, p in model.named_parameters()}
        y = torch.func.functional_call(model, weights, (x,))
        model.backend = "eager"
        torch.testing.assert_close(y, torch.func.functional_call(model, weights, (x,)), **TOLERANCE)
        model.backend = "auto"
        del weights


def test_packs_of_what_a_model_was_go(model: MobileNetV2, x: Tensor) -> None:
    """With their graphs, which hold a GPU's memory."""
    model(x)
    pack = weakref.ref(model._plan(x).pack)
    gc.collect()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
        assert pack() is not None
        model.classifier[1].weight.mul_(2)
        model(x)
    assert pack() is None


def test_threads_share_a_pack(model: MobileNetV2, x: Tensor, gpu: StandIn) -> None:
    with torch.no_grad():
        want = [model(x * k) for k in range(4)]
    wrong = []

    def work(k: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(x * k), want[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert gpu.captured.sizes == [2]
