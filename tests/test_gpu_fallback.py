"""Modules on a GPU that the kernels do not serve, as far as they go without one: torch does, and why."""

from __future__ import annotations

import logging

import pytest
import torch
from gpu_stand_in import StandIn, near, stand_in  # noqa: F401
from helpers import check, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import mnv2_fast.nn
from mnv2_fast import MobileNetV2, UserError, arch, reading
from mnv2_fast.backends import chains, replay
from mnv2_fast.backends import triton as backend
from mnv2_fast.nn import ConvBNReLU6, InvertedResidual

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

pytestmark = pytest.mark.usefixtures("native", "gpu")


def test_other_dtypes_are_torchs_business(model: MobileNetV2, x: Tensor) -> None:
    model.double()
    assert "float64" in str(model.why_not(x.double()))
    assert model(x.double()).dtype == torch.float64
    model.float().features[3].half()
    assert "several dtypes" in str(model.why_not(x))


def test_a_residual_that_autocast_would_widen_is_torchs() -> None:
    block, x = InvertedResidual(8, 8, 1, 6).eval(), torch.randn(1, 8, 5, 5)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert block.why_not(x) == "autocast adds a float32 input to a float16 answer"
        assert block(x).dtype == torch.float32
        assert block.why_not(x.half()) is None
        assert block(x.half()).dtype == torch.float16


def test_features_that_end_without_relu6_are_torchs(model: MobileNetV2, x: Tensor) -> None:
    model.features[18] = ConvBNReLU6(112, 1280, kernel_size=1, activation_layer=None).eval()
    assert "mean is of a pointwise layer with ReLU6" in str(model.why_not(x))
    check(model, x, served=False)


def test_what_the_kernels_would_hide_from_declines(model: MobileNetV2, x: Tensor) -> None:
    calls: list[object] = []
    handle = model.features[3].register_forward_hook(lambda *args: calls.append(args))
    assert model.why_not(x) == "features.3 has a hook"
    check(model, x, served=False)
    assert calls
    handle.remove()
    model.features[3].conv[0][1].train()
    assert "train mode" in str(model.why_not(x))
    model.eval()
    torch.func.vmap(lambda image: model(image[None]))(x)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 1e6
    parametrizations.weight_norm(model.features[3].conv[0][0])
    check(model, x, served=False)
    assert "ParametrizedConv2d" in str(model.why_not(x))


def test_off_until_proven(
    model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch, gpu: StandIn
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    assert str(model.why_not(x)).startswith("the network kernel has not run on a GPU yet: set MNV2_BACKEND=")
    model(x)
    assert not gpu.launches
    monkeypatch.setenv("MNV2_STRICT", "1")
    with pytest.raises(UserError, match="no kernel serves MobileNetV2: the network kernel has not run"):
        model(x)
    model.backend = "triton"  # the model's own wish is as good as the variable
    check(model, x)
    assert gpu.launches
    model.backend = "cpu"
    assert model.why_not(x) == "the cpu backend was asked for"
    model.backend = "auto"
    monkeypatch.setattr(backend, "PROVEN", frozenset({"network", *backend.OPERATORS}))
    assert model.why_not(x) is None


def test_an_operator_that_is_off_runs_in_torch_among_the_others(
    model: MobileNetV2,
    x: Tensor,
    gpu: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    monkeypatch.setattr(backend, "PROVEN", frozenset({"network", "stem", "pointwise", "head"}))
    with caplog.at_level(logging.DEBUG, "mnv2_fast"):
        check(model, x)
    assert "a depthwise layer runs in plain torch: the depthwise kernel has not run on a GPU" in caplog.text
    assert {name.partition(":")[0] for name in gpu.launches} == {"stem", "pointwise", "head"}
    assert gpu.captured.sizes == [2]
    monkeypatch.setenv("MNV2_STRICT", "1")
    with pytest.raises(UserError, match="no kernel serves MobileNetV2: the depthwise kernel has not run"):
        model(x)
    monkeypatch.setattr(backend, "PROVEN", frozenset({"network", *backend.OPERATORS}))
    model.refresh()
    model(x)


@pytest.mark.parametrize("op", backend.OPERATORS)
def test_each_operator_may_be_the_one_that_is_off(
    model: MobileNetV2, x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    monkeypatch.setattr(backend, "PROVEN", frozenset({"network", *backend.OPERATORS} - {op}))
    for head in (model.classifier, nn.Linear(1280, 5).eval()):
        model.classifier = head
        check(model, x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        near(model, x, torch.bfloat16)
    launched = {name.partition(":")[0] for name in gpu.launches}
    assert launched == {"stem", "depthwise", "pointwise", "head", "features"} - {
        op,
        "features" if op == "head" else op,
    }


def test_a_row_too_long_for_its_kernel_runs_in_torch(
    model: MobileNetV2, x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mnv2_fast.kernels import depthwise

    check(model, x)
    model.refresh()
    count = gpu.launches.count("depthwise")
    gpu.launches.clear()
    monkeypatch.setattr(depthwise, "ROW_LIMIT", 900)  # the first blocks have longer ones
    check(model, x)
    assert 0 < gpu.launches.count("depthwise") < count
    monkeypatch.setenv("MNV2_STRICT", "1")
    model.refresh()
    with pytest.raises(UserError, match="MNV2_STRICT=1, and a depthwise layer would run in plain torch"):
        model(x)


def test_a_kernel_that_does_not_fit_on_the_gpu_gives_way_to_torch(
    model: MobileNetV2, x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with less shared memory than its tiles take."""
    from mnv2_fast.kernels import network
    from triton.runtime.errors import OutOfResources

    tried = []

    def too_large(*args: object, **kwargs: object) -> None:
        tried.append(True)
        raise OutOfResources(166912, 101376, "shared memory")

    monkeypatch.setattr(network, "depthwise", too_large)
    check(model, x)
    assert len(tried) == 1  # of all layers, and of all calls
    assert list(model._plan(x).pack.in_torch) == ["depthwise"]
    assert "pointwise:tf32" in gpu.launches
    monkeypatch.setenv("MNV2_STRICT", "1")
    with pytest.raises(
        UserError, match="the depthwise kernel does not run on this GPU: out of resource: sha"
    ):
        model(x)
    model.refresh()
    with pytest.raises(
        UserError, match="MNV2_STRICT=1, and a depthwise layer would run in plain torch: the d"
    ):
        model(x)
    with pytest.raises(OutOfResources):  # where nothing can take its place
        network.Network(list(arch.network()), _zeros(), torch.float32, x.device)(x)


def _zeros() -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(spec.weight_shape), torch.zeros(spec.cout)) for spec in arch.network()]


def test_in_a_capture_of_the_callers(model: MobileNetV2, x: Tensor, gpu: StandIn) -> None:
    """No pack is made in it, since weights go by way of the host; one that is there is launched, for batches
    that it has served.
    """
    gpu.captured.capturing = True
    assert "call the model once before" in str(model.why_not(x))
    check(model, x, served=False)
    gpu.captured.capturing = False
    model(x)
    gpu.captured.sizes.clear()
    gpu.captured.capturing = True
    check(model, x)
    with pytest.raises(RuntimeError, match=r"call once with 4 images of \[3, 48, 40\] before the capture"):
        model(torch.cat((x, x)))
    assert not gpu.captured.sizes


def test_a_lack_of_memory_is_torchs_error_in_one_line(
    model: MobileNetV2, x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(x)

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(replay, "capture", full)
        for kind in (torch.OutOfMemoryError, MemoryError):
            with pytest.raises(
                kind, match=r"4 images of \[3, 48, 40\] need more memory than the GPU has: use"
            ):
                model(torch.cat((x, x)))
    check(model, torch.cat((x, x)))


def test_tensors_in_other_places(model: MobileNetV2, x: Tensor) -> None:
    elsewhere = x.to("meta")
    check(model, x)
    assert model.why_not(elsewhere) == "the input is on meta, the kernels are on cpu and cuda"
    with pytest.raises(
        ValueError, match=r"the input is on meta, the model on cpu: move one of them with .to"
    ):
        model(elsewhere)
    model.features[3].to("meta")
    assert "holds torch.float32 on meta, the kernels take" in str(model.why_not(x))
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(x)


@pytest.mark.parametrize("packed", [False, True])
def test_another_device_with_kernels_of_the_same_kind(
    model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """As a second GPU is: its calls would find the pack of the first one."""
    monkeypatch.setitem(chains.KERNELS, "meta", chains.KERNELS["cpu"])
    for module in (reading, mnv2_fast.nn):  # there is no autocast for meta
        monkeypatch.setattr(module, "autocast_dtype", lambda device: None)
    if packed:
        model(x)
    elsewhere = x.to("meta")
    assert model.why_not(elsewhere) == "the input is on meta, the weights are on cpu"
    with pytest.raises(ValueError, match="the input is on meta, the model on cpu"):
        model(elsewhere)
    model.features[3].to("meta")
    assert model.why_not(x) == "tensors are on several devices: cpu, meta"
