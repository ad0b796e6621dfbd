"""Modules in eval mode on a GPU, as far as they go without one: what is served, dtypes, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_stand_in import NO_TRAINING, StandIn, near, stand_in  # noqa: F401
from helpers import TOLERANCE, check, one_thread  # noqa: F401
from torch import Tensor, nn

from mnv2_fast import MobileNetV2, UserError, info, ops, training, training_head
from mnv2_fast.backends import replay
from mnv2_fast.nn import ConvBNReLU6, InvertedResidual

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

pytestmark = pytest.mark.usefixtures("native", "gpu")


@pytest.mark.parametrize("grad", [False, True])
def test_serves_by_itself_as_graphs(model: MobileNetV2, x: Tensor, gpu: StandIn, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        check(model, x)
        y = model(torch.cat((x, 2 * x[:1])))
        assert y.requires_grad == grad
    assert gpu.captured.sizes == [2, 4]
    kinds = {"stem", "depthwise", "pointwise", "head"}
    assert set(gpu.launches) == {name + ":tf32" * (name != "depthwise") for name in kinds}


@pytest.mark.parametrize("n", [0, 1, 3, 33])
def test_any_batch_and_layout(model: MobileNetV2, n: int) -> None:
    x = torch.randn(n, 3, 33, 34)
    wide = torch.randn(n, 4, 33, 68)
    for images in (x, x.contiguous(memory_format=torch.channels_last), wide[:, 1:, :, ::2]):
        assert check(model, images).shape == (n, 7)


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("what is another device's was called")


HALVES = (torch.float16, torch.bfloat16)
# Of the parameters, and autocast's. (On a CPU torch itself refuses autocast to the other half type.)
HELD_AND_CAST = [(held, None) for held in (torch.float32, *HALVES)]
HELD_AND_CAST += [(held, cast) for cast in HALVES for held in (torch.float32, cast)]


@pytest.mark.parametrize(("held", "cast"), HELD_AND_CAST, ids=str)
def test_dtypes_are_torchs(
    model: MobileNetV2, x: Tensor, held: torch.dtype, cast: torch.dtype | None
) -> None:
    model.to(held)
    with torch.no_grad():
        for images in (x.to(held), x) if cast else (x.to(held),):
            with torch.autocast("cpu", cast, enabled=cast is not None):
                near(model, images, cast or held)
        if held is not torch.float32:
            assert f"the input is torch.float32, the weights are {held}" in str(model.why_not(x))


def test_a_classifier_of_ones_own_follows_the_features(model: MobileNetV2, x: Tensor, gpu: StandIn) -> None:
    model.classifier = nn.Sequential(nn.Linear(1280, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    assert check(model, x).shape == (2, 3)
    assert "features:tf32" in gpu.launches
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        near(model, x, torch.float16)


@pytest.mark.parametrize("precision", ["tf32", "none", "ieee"])
def test_float32_is_multiplied_as_torchs_convolutions_are(
    model: MobileNetV2, x: Tensor, gpu: StandIn, precision: str
) -> None:
    check(model, x)
    gpu.launches.clear()
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = precision
    try:
        check(model, x)
    finally:
        conv.fp32_precision = before
    assert ("pointwise:tf32" in gpu.launches) == (precision == "tf32")
    assert ("pointwise" in gpu.launches) == (precision != "tf32")


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "pointwise": lambda: ConvBNReLU6(8, 17, kernel_size=1),
    "depthwise": lambda: ConvBNReLU6(8, 8, stride=2, groups=8),
    "linear pointwise with a bias": lambda: ConvBNReLU6(8, 5, 1, activation_layer=None, bias=True),
    "residual": lambda: InvertedResidual(8, 8, 1, 6),
    "residual of no expansion": lambda: InvertedResidual(8, 8, 1, 1),
    "stride 2": lambda: InvertedResidual(8, 12, 2, 6),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_single_modules_are_launches_without_a_graph(name: str, gpu: StandIn) -> None:
    block = BLOCKS[name]()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.normal_(norm.weight, 1, 0.2)
    block.eval()
    x = torch.randn(3, 8, 9, 10)
    for images in (x, x.contiguous(memory_format=torch.channels_last), x[..., ::2], x[:0]):
        assert block.why_not(images) is None, block.why_not(images)
        with torch.no_grad():
            y = block(images)
            torch.testing.assert_close(y, block._run_eager(images), **TOLERANCE)
        layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else None
        assert y.is_contiguous(memory_format=layout or torch.contiguous_format)
    assert gpu.launches
    assert not gpu.captured.sizes


def test_launches_without_a_graph_record_nothing_for_backward(model: MobileNetV2) -> None:
    block = model.features[3]
    x = torch.randn(2, block.conv[0][0].in_channels, 9, 10, requires_grad=True)
    assert not block._plan(x).pack._network.run(x).requires_grad


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
def test_gradients_are_plain_torchs(
    model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch, cast: torch.dtype | None
) -> None:
    monkeypatch.setattr(training, "run", never)
    found = []
    for name in ("auto", "eager"):
        model.backend = name
        model.zero_grad()
        images = x.clone().requires_grad_()
        with torch.autocast("cpu", cast, enabled=cast is not None):
            y = model(images)
        assert y.dtype == (cast or torch.float32)
        (y * torch.linspace(-1, 1, 7)).sum().backward()  # the same gradient of y on both
        found.append([images.grad, *(p.grad for p in model.parameters())])
    for ours, torchs in zip(*found, strict=True):
        assert torch.equal(ours, torchs)
    model.backend = "auto"
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.autograd.grad(model(x).sum(), list(model.parameters()), create_graph=True)


def test_training_is_torchs_and_says_so(
    model: MobileNetV2, x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_head, "run", never)
    model.train()
    assert model.why_not(x) == NO_TRAINING
    model(x).sum().backward()
    assert model.features[0][0].weight.grad is not None
    assert not gpu.launches
    monkeypatch.setenv("MNV2_STRICT", "1")
    with pytest.raises(UserError, match=f"no kernel serves ConvBNReLU6: {NO_TRAINING}"):
        model(x)


def test_the_device_of_the_tensors_is_the_current_one_within(
    model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream, a capture and a launch are otherwise those of the caller's device."""
    current: list[Tensor] = []

    class DeviceOf:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __enter__(self) -> None:
            current.append(self.x)

        def __exit__(self, *_: object) -> None:
            current.pop()

    def capturing(device: torch.device) -> bool:
        assert device == x.device
        assert any(t is x for t in current)
        return False

    model(x)
    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(replay, "capturing", capturing)
    with torch.no_grad():
        model(x)


def test_the_operator_of_a_network(x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    op = next(op for op in ops.OPS if op.name == "network")
    args = next(iter(op.samples((8,), (8,), (2,))))
    assert ops.network_declines(*args) is None
    torch.testing.assert_close(
        torch.ops.mnv2.network(*args), op.reference(*args).float(), rtol=1e-4, atol=1e-4
    )
    assert gpu.launches
    assert "the input is torch.float16" in str(ops.network_declines(args[0].half(), *args[1:]))
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    assert "has not run on a GPU yet" in str(ops.network_declines(*args))


def test_info_tells_what_serves(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    network = next(op for op in ops.OPS if op.name == "network")
    assert info._backend(network, "cpu") == "triton"
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    assert info._backend(network, "cpu").startswith("eager (the network kernel has not run on a GPU yet: set")
    monkeypatch.setenv("MNV2_BACKEND", "cpu")
    assert "MNV2_BACKEND=cpu has no kernels on cpu: unset it, or set it to triton" in info._backend(
        network, "cpu"
    )
