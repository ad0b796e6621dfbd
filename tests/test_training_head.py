"""The head's autograd node against pool, dropout and linear layer of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SMALL
from torch import Tensor, nn

from mnv2_fast import MobileNetV2, training_head
from mnv2_fast.nn import eager_only

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
    """In train mode, also with frozen features, of whose gradient there is no need."""
    model = MobileNetV2(**SMALL).train()
    x = torch.randn(4, 3, 64, 64)
    assert "HeadTraining" in str(model(x).grad_fn)
    model.features.requires_grad_(False)
    y = model(x)
    assert "HeadTraining" in str(y.grad_fn)
    y.sum().backward()
    assert model.classifier[1].weight.grad is not None


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
