"""`model.eval()(x)` is fast by itself, and as differentiable and observable as torch's."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers import SMALL, TOLERANCE, changed, check, eager, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from mnv2_fast import MobileNetV2

pytestmark = pytest.mark.usefixtures("native", "one_thread")


@pytest.mark.parametrize("grad", [False, True])
def test_serves_by_itself(model: MobileNetV2, x: Tensor, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        y = check(model, x)
        assert model(x).requires_grad == grad
    assert y.shape == (2, 7)


def test_requires_grad_is_torchs(model: MobileNetV2, x: Tensor) -> None:
    model.requires_grad_(False)
    assert not model(x).requires_grad
    assert model(x.clone().requires_grad_()).requires_grad
    model.classifier[1].bias.requires_grad_(True)
    assert model(x).requires_grad
    with torch.inference_mode():
        assert model(x).is_inference()


def test_gradients_are_torchs(model: MobileNetV2, x: Tensor) -> None:
    found = []
    for backend in ("auto", "eager"):
        model.backend = backend
        model.zero_grad()
        images = x.clone().requires_grad_()
        (model(images) * torch.arange(7.0)).square().sum().backward()
        found.append([images.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_gradients_of_a_frozen_trunk(model: MobileNetV2, x: Tensor) -> None:
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    model(x).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]


def test_gradients_within_autocast(model: MobileNetV2, x: Tensor) -> None:
    """The forward ran outside of it, in float32: so are the gradients."""
    found = []
    for autocast in (False, True):
        model.zero_grad()
        y = model(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_backward_after_a_write_is_refused_as_by_torch(model: MobileNetV2, x: Tensor) -> None:
    y = model(x)
    with torch.no_grad():
        model.features[0][0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_two_forwards_and_retained_graphs(model: MobileNetV2, x: Tensor) -> None:
    a, b = model(x), model(2 * x)
    a.sum().backward(retain_graph=True)
    first = model.classifier[1].weight.grad.clone()
    b.sum().backward()
    a.sum().backward()
    model.backend = "eager"
    expected = torch.autograd.grad(model(x).sum() * 2 + model(2 * x).sum(), model.classifier[1].weight)[0]
    torch.testing.assert_close(model.classifier[1].weight.grad, expected, rtol=1e-4, atol=1e-4)
    assert first.abs().sum() > 0


def test_double_backward_is_declined_clearly(model: MobileNetV2, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.autograd.grad(model(x).sum(), list(model.parameters()), create_graph=True)
    model.backend = "eager"
    torch.autograd.grad(model(x).sum(), list(model.parameters()), create_graph=True)


HOOKED = ["features", "features.0", "features.3", "features.3.conv.1.0", "features.18.0", "features.5.conv"]


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_inner_modules_fire(model: MobileNetV2, x: Tensor, name: str, kind: str) -> None:
    check(model, x)
    calls: list[object] = []
    module = model.get_submodule(name)
    handle = getattr(module, f"register_{kind}_hook")(lambda *args: calls.append(args))
    assert "hook" in str(model.why_not(x))
    model(x).sum().backward()
    assert len(calls) == 1
    handle.remove()
    check(model, x)
    assert len(calls) == 1


def test_hook_dicts_replaced(model: MobileNetV2, x: Tensor) -> None:
    check(model, x)
    model.features[2]._forward_hooks = type(model.features[2]._forward_hooks)()
    check(model, x)
    model.features[2].register_forward_hook(lambda module, args, y: y * 0)
    check(model, x, served=False)


def test_hooks_on_the_classifier_see_the_pooled_features(model: MobileNetV2, x: Tensor) -> None:
    seen: list[Tensor] = []
    model.classifier[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    check(model, x)
    assert seen[0].shape == (2, 1280)


def test_hooks_on_the_model_itself(model: MobileNetV2, x: Tensor) -> None:
    model.register_forward_hook(lambda module, args, y: y + 1)
    check(model, x)


def test_global_hooks(model: MobileNetV2, x: Tensor) -> None:
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: names.append(type(module).__name__)
    )
    try:
        check(model, x, served=False)
    finally:
        handle.remove()
    assert names.count("Conv2d") == 2 * 52


def test_hooks_keep_the_memory_format(model: MobileNetV2, x: Tensor) -> None:
    """A hook or a feature extractor that calls `.view` on a contiguous network's tensors goes on working."""
    outputs: list[Tensor] = []
    model.features[4].register_forward_hook(lambda module, args, y: outputs.append(y))
    model(x)
    model(x.contiguous(memory_format=torch.channels_last))
    assert outputs[0].is_contiguous()
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)


def test_replaced_modules_decline(model: MobileNetV2, x: Tensor) -> None:
    changed(model, x, lambda: model.features.__setitem__(3, nn.Identity()), served=False)
    model = MobileNetV2(**SMALL, norm_layer=lambda c: nn.GroupNorm(1, c)).eval()
    check(model, x, served=False)
    assert "GroupNorm" in str(model.why_not(x))


def test_added_and_removed_modules(model: MobileNetV2, x: Tensor) -> None:
    before = check(model, x)
    model.features.append(nn.Softmax(1))
    assert not torch.equal(check(model, x, served=False), before)
    del model.features[-1]
    assert torch.equal(check(model, x), before)


def test_forward_replaced(model: MobileNetV2, x: Tensor) -> None:
    before = check(model, x)
    conv = model.features[0][0]
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)
    assert not torch.equal(check(model, x, served=False), before)
    del conv.forward
    assert torch.equal(check(model, x), before)

    model._forward_impl = lambda x: x.sum()
    assert "_forward_impl" in str(model.why_not(x))
    assert torch.equal(model(x), x.sum())

    class Halved(MobileNetV2):
        def _forward_impl(self, x: Tensor) -> Tensor:
            return super()._forward_impl(x) / 2

    check(Halved(**SMALL).eval(), x, served=False)


def test_partly_in_train_mode(model: MobileNetV2, x: Tensor) -> None:
    check(model, x)
    model.features[3].conv[0][1].train()
    assert "train mode" in str(model.why_not(x))
    model(x)
    model.eval()
    check(model, x)


def test_pruned_weights(model: MobileNetV2, x: Tensor) -> None:
    conv = model.features[3].conv[0][0]
    changed(model, x, lambda: prune.l1_unstructured(conv, "weight", 0.5), served=False)
    y = model(x)
    y.sum().backward()
    assert conv.weight_orig.grad is not None
    prune.remove(conv, "weight")
    torch.testing.assert_close(check(model, x), y.detach(), **TOLERANCE)


def test_parametrized_weights(model: MobileNetV2, x: Tensor) -> None:
    conv = model.features[3].conv[0][0]
    check(model, x)
    parametrizations.weight_norm(conv)
    check(model, x, served=False)
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)
    check(model, x, served=False)
    nn.utils.parametrize.remove_parametrizations(conv, "weight")
    check(model, x)


def test_subclassed_tensors(model: MobileNetV2, x: Tensor) -> None:
    class Tagged(Tensor):
        pass

    check(model, x)
    assert "Tagged" in str(model.why_not(x.as_subclass(Tagged)))
    assert isinstance(model(x.as_subclass(Tagged)), Tagged)
    model.classifier[1].weight = nn.Parameter(model.classifier[1].weight.detach().as_subclass(Tagged))
    model(x)


def test_functorch(model: MobileNetV2, x: Tensor) -> None:
    weights = dict(model.named_parameters())
    weights.update(model.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).sum()

    each = torch.func.vmap(torch.func.grad(loss, argnums=1), (None, 0))(weights, x)
    images = x.clone().requires_grad_()
    eager(model, images).sum().backward()
    torch.testing.assert_close(each, images.grad, rtol=1e-3, atol=1e-4)
    tangent = torch.func.jvp(model, (x,), (x,))[1]
    assert tangent.shape == (2, 7)


def test_forward_mode(model: MobileNetV2, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None


def test_modes_see_every_call(model: MobileNetV2, x: Tensor) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    check(model, x)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 1e6


def check_bf16(model: MobileNetV2, x: Tensor) -> None:
    """The kernels serve the call, in bf16, and are at most twice as far from float64 as torch."""
    assert model.why_not(x) is None, model.why_not(x)
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        exact = copy.deepcopy(model).double()._forward_impl(x.double())
    y, torchs = model(x), eager(model, x)
    assert y.dtype == torchs.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() <= 2 * (torchs.double() - exact).abs().max()


def test_autocast(model: MobileNetV2, x: Tensor) -> None:
    for images in (x, x.bfloat16(), x.contiguous(memory_format=torch.channels_last)):
        with torch.autocast("cpu", torch.bfloat16):
            check_bf16(model, images)
        check(model, images.float())
    with torch.autocast("cpu", torch.float16):
        assert "autocast to torch.float16" in str(model.why_not(x))
        assert model(x).dtype == torch.float16


def test_bf16_parameters(model: MobileNetV2, x: Tensor) -> None:
    model.bfloat16()
    check_bf16(model, x.bfloat16())
    assert "the weights are torch.bfloat16" in str(model.why_not(x))
    with torch.autocast("cpu", torch.bfloat16):
        check_bf16(model, x)
    model.features[0][1].float()
    assert "several dtypes" in str(model.why_not(x.bfloat16()))


def test_another_classifier_in_bf16(model: MobileNetV2, x: Tensor) -> None:
    model.classifier = nn.Sequential(nn.Linear(1280, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        check_bf16(model, x)
    check_bf16(model.bfloat16(), x.bfloat16())


def test_gradients_in_bf16_are_torchs(model: MobileNetV2, x: Tensor) -> None:
    """Of bf16 parameters to the bit; under autocast in type, `test_train_network` judges their values."""
    for cast, images in ((True, x), (False, x.bfloat16())):
        found = []
        if not cast:
            model.bfloat16()
        for backend in ("auto", "eager"):
            model.backend = backend
            model.zero_grad()
            leaf = images.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                y = model(leaf)
            (y * torch.linspace(-1, 1, 7)).sum().backward()  # the same gradient of y on both
            found.append([leaf.grad, *(p.grad for p in model.parameters())])
        for ours, torchs in zip(*found, strict=True):
            assert ours.dtype == torchs.dtype
            assert cast or torch.equal(ours, torchs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(model: MobileNetV2, x: Tensor, dtype: torch.dtype) -> None:
    model.to(dtype)
    x = x.to(dtype)
    assert model.why_not(x) is not None
    y = model(x)
    assert y.dtype == dtype
    assert torch.equal(y, eager(model, x))


def test_strict(model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV2_STRICT", "1")
    model(x)
    model.features[3].register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"MNV2_STRICT=1 and no kernel serves MobileNetV2: features\.3 has a hook"
    ):
        model(x)
    model.backend = "eager"  # asked for, and so no failure of the fast path
    model(x)
    model.backend = "auto"
    model.train()(x)


def test_decline_is_logged(model: MobileNetV2, x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "mnv2_fast"):
        model(x)
        assert not caplog.records
        model.features[2].conv[1][0].dilation = (2, 2)
        model(x)
    assert "features.2.conv.1.0" in caplog.text
    assert "dilation=(2, 2)" in caplog.text


def test_backends(model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "eager")
    assert "eager backend" in str(model.why_not(x))
    model.backend = "cpu"
    assert model.why_not(x) is None
    monkeypatch.setenv("MNV2_BACKEND", "fast")
    model.backend = "auto"
    with pytest.raises(ValueError, match="auto, eager, cpu, triton"):
        model(x)
    with pytest.raises(ValueError, match="auto, eager, cpu, triton"):
        MobileNetV2(backend="gpu")
