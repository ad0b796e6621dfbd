"""The head's autograd node against pool, dropout and linear layer of plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SMALL, calibrate
from torch import Tensor, nn

from mnv2_fast import MobileNetV2, training_head
from mnv2_fast.nn import eager_only
from mnv2_fast.packs import Pack

Found = dict[str, Tensor]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    means = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
    return nn.functional.linear(nn.functional.dropout(means, dropout), weight, bias)


def step(head: Callable[..., Tensor], *tensors: Tensor | None, dropout: float, autocast: bool) -> Found:
    """The answer and the gradients, with one and the same dropout."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = head(*leaves, dropout)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    found = {"y": y.detach()}
    return found | {str(i): leaf.grad for i, leaf in enumerate(leaves) if leaf is not None}  # type: ignore[misc]


@pytest.mark.parametrize("dropout", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_head(dropout: float, bias: bool, dtype: torch.dtype, autocast: bool) -> None:
    """As torch's, whose types and dropped means it has; the same in both memory formats."""
    held = torch.float32 if autocast else dtype
    x = torch.randn(3, 21, 5, 4).to(dtype)
    rest = torch.randn(7, 21).to(held), torch.randn(7).to(held) if bias else None
    right = step(plain, x, *rest, dropout=dropout, autocast=autocast)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = step(training_head.run, x.to(memory_format=layout), *rest, dropout=dropout, autocast=autocast)
        assert found.keys() == right.keys()
        for name, expected in right.items():
            narrow = torch.bfloat16 in (dtype, expected.dtype) or autocast
            tolerance = {"rtol": 2**-7, "atol": 2**-6} if narrow else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(found[name], expected, **tolerance, msg=name)


def test_the_gradient_of_the_mean_is_no_memory() -> None:
    x = torch.randn(2, 16, 7, 7, requires_grad=True)
    y = training_head.run(x, torch.randn(5, 16), None)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.stride()[2:] == (0, 0)


@pytest.mark.parametrize("asked", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for(asked: tuple[bool, ...]) -> None:
    tensors = torch.randn(2, 16, 7, 7), torch.randn(5, 16), torch.randn(5)
    for tensor, ask in zip(tensors, asked, strict=True):
        tensor.requires_grad_(ask)
    training_head.run(*tensors, 0.5).sum().backward()
    assert tuple(tensor.grad is not None for tensor in tensors) == asked


def test_double_backward_is_declined() -> None:
    x = torch.randn(2, 16, 7, 7, requires_grad=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(training_head.run(x, torch.randn(5, 16), None).sum(), x, create_graph=True)


def _hooked(model: MobileNetV2, seen: list[Any]) -> None:
    model.classifier[1].register_forward_hook(lambda *_: seen.append("hook"))


def _another_layer(model: MobileNetV2, seen: list[Any]) -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append("Twice")
            return 2 * super().forward(x)

    model.classifier[1] = Twice(model.last_channel, 7)


def _longer(model: MobileNetV2, seen: list[Any]) -> None:
    class Watch(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            seen.append("Watch")
            return x

    model.classifier.append(Watch())


def _another_impl(model: MobileNetV2, seen: list[Any]) -> None:
    impl = model._forward_impl
    model._forward_impl = lambda x: (seen.append("impl"), impl(x))[1]  # type: ignore[method-assign]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("change", [_hooked, _another_layer, _longer, _another_impl])
def test_what_the_node_does_not_know_runs_as_it_is(change: Callable[[MobileNetV2, list[Any]], None]) -> None:
    torch.manual_seed(0)
    model, seen = MobileNetV2(**SMALL).train(), []
    x = torch.randn(4, 3, 64, 64)
    change(model, seen)
    torch.manual_seed(5)
    y = model(x)
    assert len(seen) == 1
    torch.manual_seed(5)
    with eager_only():
        torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("native")
def test_a_network_has_the_node() -> None:
    """In train mode, but with frozen features, of whose gradient there is no need."""
    model = MobileNetV2(**SMALL).train()
    x = torch.randn(4, 3, 64, 64)
    assert "HeadTraining" in str(model(x).grad_fn)
    model.features.requires_grad_(False)
    y = model(x)
    assert "HeadTraining" not in str(y.grad_fn)
    y.sum().backward()
    assert model.classifier[1].weight.grad is not None


@pytest.fixture
def frozen() -> MobileNetV2:
    """A network whose head alone is trained, on features that answer as in eval mode."""
    model = calibrate(MobileNetV2(**SMALL), (64, 64)).train()
    model.features.requires_grad_(False).eval()
    return model


def _answers(model: MobileNetV2, x: Tensor, autocast: bool) -> Found:
    """Logits and gradients of a step, with one and the same dropout."""
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def _check_frozen(model: MobileNetV2, x: Tensor, autocast: bool = False) -> None:
    """By the kernels, in torch's types, and as near to float64 as torch."""
    assert model.why_not(x) is None
    ours = _answers(model, x, autocast)
    with eager_only():
        torchs = _answers(model, x, autocast)
        right = _answers(copy.deepcopy(model).double(), x.double(), False)
    assert ours.keys() == torchs.keys() == right.keys()
    for name, expected in right.items():
        assert ours[name].dtype is torchs[name].dtype
        far, torchs_far = (torch.linalg.vector_norm(found[name] - expected) for found in (ours, torchs))
        assert far <= 2 * torchs_far + 1e-6 * torch.linalg.vector_norm(expected), name


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("mode", ["train", "classifier in eval mode", "eval"])
@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_features_in_eval_mode_are_one_call(
    frozen: MobileNetV2, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the kernels, once a step, whatever else is in eval mode; no step makes them anew."""
    (frozen if mode == "eval" else frozen.classifier).train(mode == "train")
    x = torch.randn(4, 3, 64, 64)
    if kind == "bfloat16":
        frozen, x = frozen.bfloat16(), x.bfloat16()
    _check_frozen(frozen, x, kind == "autocast")
    runs: list[Any] = []
    run = Pack.run
    monkeypatch.setattr(Pack, "run", lambda pack, x: (runs.append(pack), run(pack, x))[1])
    optimizer = torch.optim.SGD(frozen.classifier.parameters(), 0.1)
    for _ in range(3):
        _answers(frozen, x, kind == "autocast")
        optimizer.step()
    assert len(runs) == 3
    assert len(set(map(id, runs))) == 1


@pytest.mark.usefixtures("native")
def test_changes_of_features_in_eval_mode_are_seen(frozen: MobileNetV2) -> None:
    x = torch.randn(4, 3, 64, 64)
    _check_frozen(frozen, x)
    with torch.no_grad():
        frozen.features[3].conv[0][0].weight.mul_(0.9)
    _check_frozen(frozen, x)
    frozen.load_state_dict({name: value * 0.9 for name, value in frozen.state_dict().items()})
    _check_frozen(frozen, x)
    frozen.features[5].conv[1][1].running_mean.add_(0.1)
    _check_frozen(frozen, x)
    frozen.features[7].conv[0][1].weight.requires_grad_()
    assert "features.7.conv.0.1.weight" in _answers(frozen, x, False)
    _check_frozen(frozen, x)
    frozen.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    frozen(leaf).sum().backward()
    assert leaf.grad is not None
    frozen.classifier.requires_grad_()
    before = frozen.features[4].conv[0][1].num_batches_tracked.item()
    frozen.features[4].train()
    _check_frozen(frozen, x)
    assert frozen.features[4].conv[0][1].num_batches_tracked == before + 2


@pytest.mark.usefixtures("native")
def test_a_model_without_features_runs_its_own_forward() -> None:
    class Own(MobileNetV2):
        def __init__(self) -> None:
            super().__init__(**SMALL)
            self.trunk = self.features
            del self.features

        def _forward_impl(self, x: Tensor) -> Tensor:
            return self.trunk(x).mean((2, 3))

    assert Own().train()(torch.randn(4, 3, 64, 64)).shape == (4, 1280)


@pytest.mark.usefixtures("native")
def test_mixed_types_are_torchs_error() -> None:
    model = MobileNetV2(**SMALL).train()
    model.classifier.bfloat16()
    x = torch.randn(4, 3, 64, 64)
    with pytest.raises(RuntimeError) as ours:
        model(x)
    with eager_only(), pytest.raises(RuntimeError) as torchs:
        model(x)
    assert str(ours.value) == str(torchs.value)
