"""Engines on a GPU, as far as they go without one: devices, dtypes, what runs in torch, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_stand_in import StandIn
from helpers import SMALL, calibrate

import mnv2_fast
from mnv2_fast import Engine, MobileNetV2, UserError, engine, images, machine
from mnv2_fast.backends import eager
from mnv2_fast.backends import triton as backend
from mnv2_fast.eager_network import EagerNetwork
from mnv2_fast.weights import Preprocessing

GPU = torch.device("cuda", 0)


def test_bytes_are_the_numbers_that_the_table_has() -> None:
    seen = Preprocessing()
    scale, shift = engine.byte_norm(seen)
    values = torch.arange(256, dtype=torch.float32)
    found = values * scale[:, None] + shift[:, None]
    torch.testing.assert_close(found, engine.byte_table(seen), rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", ["int8", "fp64"])
def test_a_gpus_dtypes_are_listed(dtype: str) -> None:
    with pytest.raises(
        UserError, match=f"dtype='{dtype}' is not offered on a GPU: use one of fp32, tf32, fp16, bf16"
    ):
        engine.check_dtype(dtype, GPU)
    assert [engine.check_dtype(known, GPU) for known in backend.DTYPES] == ["fp32", "tf32", "fp16", "bf16"]


@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
def test_a_cpu_has_no_arithmetic_for_some(dtype: str) -> None:
    with pytest.raises(
        UserError, match=f"dtype='{dtype}' has no arithmetic on a CPU: use one of fp32, bf16, int8, or"
    ):
        mnv2_fast.compile(MobileNetV2(**SMALL), dtype=dtype)


def test_images_of_another_device_are_refused() -> None:
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"takes dense tensors on cuda:0, got .* on cpu: use x.to\('cuda:0'\)"
    ):
        images.check_images(x, GPU)
    with pytest.raises(ValueError, match=r"takes dense CPU tensors, got .* on meta: use x.cpu\(\)"):
        images.check_images(x.to("meta"))


def test_a_model_in_two_places_is_refused() -> None:
    model = MobileNetV2(**SMALL)
    model.classifier.to("meta")
    with pytest.raises(UserError, match=r"a model on cpu and meta: move it with model.to\('cpu'\)"):
        mnv2_fast.compile(model)
    with pytest.raises(UserError, match=r"a model on meta: move it with model.cpu\(\)"):
        mnv2_fast.compile(MobileNetV2(**SMALL).to("meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_file_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    mnv2_fast.compile(MobileNetV2(**SMALL).eval()).save(tmp_path / "e.safetensors")
    for device, said in (
        ("cuda", "no such device here"),
        ("cuda:1", "no such device here"),
        ("gpu", "is none"),
    ):
        with pytest.raises(UserError, match=said):
            mnv2_fast.load(tmp_path / "e.safetensors", device=device)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plain_torch_serves_in_the_engines_type(kind: torch.dtype) -> None:
    """As on a GPU whose kernels are off; float32 logits."""
    torch.manual_seed(0)
    fp32 = mnv2_fast.compile(calibrate(MobileNetV2(**SMALL)))
    table = engine.byte_table(fp32.preprocessing)
    network = EagerNetwork(fp32.layers, fp32.tensors, table, engine.CPU, kind)
    x = torch.randn(2, 3, 64, 64)
    got, want = network.run(x), fp32(x)
    assert got.dtype == torch.float32
    tolerance = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}[kind]
    assert (got - want).abs().max() <= tolerance * want.abs().max()


PROVEN = frozenset({"network", *backend.OPERATORS})


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, StandIn]:
    """An engine on the CPU, whose layers may then be another's on a GPU that the CPU stands in for."""
    source = mnv2_fast.compile(calibrate(MobileNetV2(**SMALL)))
    gpu, network = StandIn(monkeypatch), backend.Network

    def on_cpu(*args: Any, **of: Any) -> backend.Network:
        return network(*args, **{**of, "device": engine.CPU})

    monkeypatch.setattr(backend, "Network", on_cpu)
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    return source, gpu


def test_an_operator_that_is_off_runs_in_torch_and_the_engine_says_so(
    frozen: tuple[Engine, StandIn], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want, gpu = frozen
    monkeypatch.setattr(backend, "PROVEN", PROVEN - {"stem"})
    with caplog.at_level("DEBUG", "mnv2_fast"):
        found = Engine(want.layers, want.tensors, device=GPU)
    assert found.backend == "triton"
    assert list(found.in_torch) == ["stem"]
    assert repr(found) == "Engine(7 classes, fp32, triton cuda:0 with stem in torch, threads=auto)"
    assert "engine partly in plain torch: the stem kernel has not run on a GPU yet" in caplog.text
    for x in (torch.randn(3, 3, 40, 33), torch.randint(0, 256, (2, 40, 33, 3), dtype=torch.uint8)):
        torch.testing.assert_close(found.network.run(x), want(x), rtol=1e-4, atol=1e-4)
    assert set(gpu.launches) == {"depthwise", "pointwise", "head"}
    assert gpu.captured.sizes == [4, 2]
    with torch.autocast("cpu", torch.bfloat16):  # engines are of their own dtype
        x = torch.randn(1, 3, 40, 33)
        torch.testing.assert_close(found.network.run(x), want(x), rtol=1e-4, atol=1e-4)


def test_strict_engines_are_whole(frozen: tuple[Engine, StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    want, _ = frozen
    *rest, last, linear = want.layers
    linear_mean = [*rest, dataclasses.replace(last, relu6=False), linear]
    monkeypatch.setenv("MNV2_STRICT", "1")
    for proven, layers, why in (
        (PROVEN - {"stem"}, want.layers, "partly in plain torch: the stem kernel has not run on a GPU yet"),
        (frozenset(), want.layers, "in plain torch: the network kernel has not run on a GPU yet"),
        (PROVEN, linear_mean, "in plain torch: a head's mean is of a pointwise layer with ReLU6"),
    ):
        monkeypatch.setattr(backend, "PROVEN", proven)
        with pytest.raises(UserError, match=f"MNV2_STRICT=1, and the engine would run {why}"):
            Engine(layers, want.tensors, device=GPU)
    monkeypatch.setattr(backend, "PROVEN", PROVEN)
    whole = Engine(want.layers, want.tensors, device=GPU)
    assert not whole.in_torch
    assert repr(whole).endswith("triton cuda:0, threads=auto)")


@pytest.mark.parametrize(("tf32", "wanted"), [(True, "tf32"), (False, "ieee")])
def test_torchs_switches_are_as_they_were(tf32: bool, wanted: str) -> None:
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]

    def fails() -> None:
        with eager.float32_products(tf32):
            assert [switch.fp32_precision for switch in switches] == [wanted, wanted]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [switch.fp32_precision for switch in switches] == before


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "unavailable_reason", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    why = backend._device_reason.__wrapped__(GPU)
    assert why == "the triton backend needs sm_80 or newer, cuda:0 is sm_75"
    monkeypatch.setattr(backend, "_device_reason", lambda device: why)
    assert backend.network_declines(GPU, "triton") == why
    assert engine._why_eager("triton", GPU, ()) == why


@pytest.mark.parametrize(("asked", "why"), [("cpu", "the backend asked for is cpu"), ("eager", "is eager")])
def test_a_backend_that_is_no_gpus(asked: str, why: str) -> None:
    assert why in engine._why_eager(asked, GPU, ())


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("gpu", "'gpu' is none: use cpu, or cuda"),
        ("meta", "no such device here"),
        ("cuda:2", "there are 2 here"),
    ],
)
def test_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch, asked: str, why: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=why):
        machine.device(asked)
    assert machine.device("cuda") == machine.device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert machine.device("cpu:0") == torch.device("cpu")
