"""Engines, modules and training steps on a GPU, where there is one."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import calibrate
from torch import Tensor, nn
from training_scenes import between_bends, compare_with_torch, distance, scaled_step, step, weights_of

import mnv2_fast
from bench.gpu_training import graphed
from mnv2_fast import Engine, MobileNetV2, data
from mnv2_fast.backends import triton as backend
from mnv2_fast.nn import eager_only
from mnv2_fast.weights import Preprocessing, load_state_dict

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

DEVICE = "cuda"
# A training step's arithmetic -> autocast's dtype, torch's switch for convolutions, epsilon.
STEPS = {
    "fp32": (None, "ieee", 2.0**-20),  # of sums of thousands of products
    "tf32": (None, "tf32", 2.0**-10),
    "fp16": (torch.float16, "tf32", 2.0**-10),
    "bf16": (torch.bfloat16, "tf32", 2.0**-7),
}
IMAGES = (8, 3, 64, 64)
SIZE = 224


@pytest.mark.parametrize("dtype", backend.DTYPES)
def test_on_a_gpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    torch.manual_seed(0)
    model = calibrate(MobileNetV2(num_classes=7))
    want = mnv2_fast.compile(model)
    found = mnv2_fast.compile(model.to(DEVICE), dtype=dtype)
    assert isinstance(found, Engine)
    assert found.backend == "triton"
    tolerance = {"fp32": 1e-4, "tf32": 0.01, "fp16": 0.02, "bf16": 0.1}[dtype]
    for x in (torch.randn(3, 3, 224, 224), torch.randint(0, 256, (2, 96, 128, 3), dtype=torch.uint8)):
        monkeypatch.setenv("MNV2_BACKEND", "auto")
        right = want(x)
        monkeypatch.setenv("MNV2_BACKEND", "triton")
        assert (found(x.to(DEVICE)).cpu() - right).abs().max() <= tolerance * right.abs().max()
    found.save(tmp_path / "e.safetensors")
    again = mnv2_fast.load(tmp_path / "e.safetensors", device=DEVICE)
    x = torch.randn(1, 3, 224, 224, device=DEVICE)
    assert torch.equal(again(x), found(x))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_keeps_the_answers(
    dtype: str, weights_v1: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    model = MobileNetV2()
    model.load_state_dict(load_state_dict(weights_v1)[0])
    crops = [torch.tensor(data.resize_and_crop(data.read_image(p), Preprocessing())) for p in photos]
    classes = {}
    for of in ("fp32", dtype):
        engine = mnv2_fast.compile(model.eval().to(DEVICE), dtype=of)
        assert engine.backend == "triton"
        classes[of] = torch.cat([engine(x.to(DEVICE)).argmax(1) for x in torch.stack(crops).split(50)])
    agreement = (classes[dtype] == classes["fp32"]).double().mean().item()
    print(f"{dtype}: agreement {agreement:.1%} on {len(photos)} photos")
    assert agreement >= 0.99


@pytest.mark.parametrize("cast", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_modules_on_a_gpu(
    held: torch.dtype, cast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Served as torch would answer, never stale, in eval mode with torch's gradients."""
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    model = calibrate(MobileNetV2(num_classes=7))
    exact = copy.deepcopy(model).double().to(DEVICE)
    model.to(DEVICE, held)
    x = torch.randn(3, 3, SIZE, SIZE, device=DEVICE, dtype=held)
    for change in (lambda: None, lambda: model.classifier[1].weight.mul_(2)):
        with torch.no_grad():
            change()
            exact.load_state_dict(model.state_dict())
        for photos in (x, x.contiguous(memory_format=torch.channels_last), x[:0]):
            with torch.autocast(DEVICE, cast, enabled=cast is not None):
                assert model.why_not(photos) is None, model.why_not(photos)
                ours = model(photos)
                with eager_only():
                    torchs = model(photos)
            right = exact._forward_impl(photos.double())
            assert ours.dtype == torchs.dtype
            assert (ours - right).norm() <= 2 * (torchs - right).norm() + 1e-5 * right.norm()
            near_torchs_gradients(gradients(ours, model), gradients(torchs, model), gradients(right, exact))
    block, features = model.features[3], torch.randn(2, 24, 56, 56, device=DEVICE, dtype=held)
    with torch.no_grad():
        assert block.why_not(features) is None
        torch.testing.assert_close(block(features), block._run_eager(features), rtol=0.05, atol=0.05)


def gradients(y: Tensor, of: nn.Module) -> list[Tensor]:
    """Of the parameters, for a loss that float16 has room for."""
    loss = (y.double() * weights_of(y)).sum() / 8
    return [grad.double() for grad in torch.autograd.grad(loss, list(of.parameters()))]


def near_torchs_gradients(ours: list[Tensor], torchs: list[Tensor], right: list[Tensor]) -> None:
    """At most twice as far from float64 as torch's in the median, four times in any one; zeros as zeros."""
    least = 1e-2 * max(float(grad.norm()) for grad in right)
    if not least:
        assert not any(grad.any() for grad in ours)
        return
    mine, others = (
        [distance(grad, want, least) for grad, want in zip(found, right, strict=True)]
        for found in (ours, torchs)
    )
    assert statistics.median(mine) <= 2 * statistics.median(others) + 1e-5
    for i, (off, torchs_off) in enumerate(zip(mine, others, strict=True)):
        assert off <= 4 * torchs_off + 1e-4, f"the gradient of parameter {i}"


@pytest.fixture(params=STEPS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A training step's arithmetic, for which torch's switch is set."""
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    monkeypatch.setenv("MNV2_STRICT", "1")
    if request.param == "fp32" and torch.cuda.get_device_capability() >= backend.NO_EXACT_DOT:
        pytest.skip("the training kernels multiply no float32 in full on this GPU")
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = STEPS[request.param][1]
    yield request.param
    switch.fp32_precision = before


def network() -> MobileNetV2:
    return between_bends(MobileNetV2(5, dropout=0.0)).train().to(DEVICE)


def test_a_training_step_is_torchs(kind: str) -> None:
    cast, _, eps = STEPS[kind]
    ours, x = network(), torch.randn(IMAGES, device=DEVICE)
    with torch.autocast(DEVICE, cast, enabled=cast is not None):
        assert ours.why_not(x) is None
    assert compare_with_torch(ours, x, eps, cast) == ""


def test_a_scale_that_overflows_skips_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    monkeypatch.setenv("MNV2_STRICT", "1")
    ours, x = network(), torch.randn(IMAGES, device=DEVICE)
    assert scaled_step(ours, x, 2.0**40) == (False, 2.0**39)
    assert scaled_step(ours, x, 1.0) == (True, 1.0)


def test_a_step_makes_the_same_bits_again_and_captured(kind: str) -> None:
    """Without a classifier, whose products are torch's: all bits are the kernels'."""
    cast = STEPS[kind][0]
    ours, batches = network(), torch.randn(2, *IMAGES, device=DEVICE)
    ours.classifier = nn.Identity()
    twins = copy.deepcopy(ours), copy.deepcopy(ours)
    with torch.no_grad():
        weights = weights_of(copy.deepcopy(ours)(batches[0]))
    for twin in twins:
        for x in batches:
            step(twin, x, cast, weights)
    assert same_bits(*twins) == ""
    x = batches[0].clone()
    replay = graphed(
        lambda: step(ours, x, cast, weights)
    )  # the first batch's step, and the launches of a step
    x.copy_(batches[1])
    replay()
    assert same_bits(ours, twins[0]) == ""


def same_bits(ours: nn.Module, other: nn.Module) -> str:
    """Names of the parameters whose gradients differ, and of buffers that do."""
    pairs = zip(ours.named_parameters(), other.parameters(), strict=True)
    found = [name for (name, p), q in pairs if p.grad is None or not torch.equal(p.grad, q.grad)]
    pairs = zip(ours.named_buffers(), other.buffers(), strict=True)
    return ", ".join(found + [name for (name, b), c in pairs if not torch.equal(b, c)])
