"""Engines and modules on a GPU, where there is one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import calibrate

import mnv2_fast
from mnv2_fast import Engine, MobileNetV2
from mnv2_fast.backends import triton as backend
from mnv2_fast.nn import eager_only

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.mark.parametrize("dtype", backend.DTYPES)
def test_on_a_gpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    torch.manual_seed(0)
    model = calibrate(MobileNetV2(num_classes=7))
    want = mnv2_fast.compile(model)
    found = mnv2_fast.compile(model.cuda(), dtype=dtype)
    assert isinstance(found, Engine)
    assert found.backend == "triton"
    tolerance = {"fp32": 1e-4, "tf32": 0.01, "fp16": 0.02, "bf16": 0.1}[dtype]
    for x in (torch.randn(3, 3, 224, 224), torch.randint(0, 256, (2, 96, 128, 3), dtype=torch.uint8)):
        monkeypatch.setenv("MNV2_BACKEND", "auto")
        right = want(x)
        monkeypatch.setenv("MNV2_BACKEND", "triton")
        assert (found(x.cuda()).cpu() - right).abs().max() <= tolerance * right.abs().max()
    found.save(tmp_path / "e.safetensors")
    again = mnv2_fast.load(tmp_path / "e.safetensors", device="cuda")
    x = torch.randn(1, 3, 224, 224, device="cuda")
    assert torch.equal(again(x), found(x))


@pytest.mark.parametrize("cast", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_modules_on_a_gpu(
    held: torch.dtype, cast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Served as torch would answer, never stale, with torch's gradients."""
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    model = calibrate(MobileNetV2(num_classes=7))
    exact = copy.deepcopy(model).double().cuda()
    model.to("cuda", held)
    x = torch.randn(3, 3, 224, 224, device="cuda", dtype=held)
    for change in (lambda: None, lambda: model.classifier[1].weight.mul_(2)):
        with torch.no_grad():
            change()
            exact.load_state_dict(model.state_dict())
        for photos in (x, x.contiguous(memory_format=torch.channels_last), x[:0]):
            with torch.autocast("cuda", cast, enabled=cast is not None):
                assert model.why_not(photos) is None, model.why_not(photos)
                ours = model(photos)
                with eager_only():
                    torchs = model(photos)
            right = exact._forward_impl(photos.double())
            assert ours.dtype == torchs.dtype
            assert (ours - right).norm() <= 2 * (torchs - right).norm() + 1e-5 * right.norm()
    ours.sum().backward()
    block, features = model.features[3], torch.randn(2, 24, 56, 56, device="cuda", dtype=held)
    with torch.no_grad():
        assert block.why_not(features) is None
        torch.testing.assert_close(block(features), block._run_eager(features), rtol=0.05, atol=0.05)
