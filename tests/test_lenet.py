"""LeNet-5: the paper's layout, sizes and count of parameters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mnv2_fast.lenet import PREPROCESSING, SIZE, LeNet5, ScaledTanh, Subsampling


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_layers_have_the_papers_parameters() -> None:
    """Table and text of section II.B: C1 156, S2 12, S4 32, C5 48,120, F6 10,164; C3 without its table."""
    layers = [_count(m) for m in LeNet5(10, in_channels=1).modules() if not list(m.children()) and _count(m)]
    assert layers == [156, 12, 2416, 32, 48120, 10164, 850]


@pytest.mark.parametrize(("classes", "count"), [(5, 61_625), (1000, 61_625 + 995 * 85)])
def test_count_for_colour(classes: int, count: int) -> None:
    assert _count(LeNet5(classes)) == count
    assert f"{_count(LeNet5(5)):,} parameters for five" in " ".join((LeNet5.__doc__ or "").split())


def test_maps_have_the_papers_sizes() -> None:
    x = torch.zeros(2, 3, SIZE, SIZE)
    sizes = []
    for layer in LeNet5(5).features:
        x = layer(x)
        if not isinstance(layer, ScaledTanh):
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120, 1, 1)]
    assert LeNet5(5)(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, 5)
    assert LeNet5(5)(torch.zeros(0, 3, SIZE, SIZE)).shape == (0, 5)
    assert PREPROCESSING.crop == SIZE


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, C, 32, 32\], not \[1, 3, 64, 64\]: resize"):
        LeNet5(5)(torch.zeros(1, 3, 64, 64))


def test_scaled_tanh_is_one_at_one() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 100.0])
    torch.testing.assert_close(ScaledTanh()(x), torch.tensor([-1.0, 0.0, 1.0, 1.7159]), atol=1e-4, rtol=0)


def test_subsampling_is_a_coefficient_of_the_sum_and_a_bias() -> None:
    layer = Subsampling(2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -2.0]))
        layer.bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    total = x.unfold(2, 2, 2).unfold(3, 2, 2).sum((4, 5))
    expected = total * torch.tensor([0.5, -2.0])[:, None, None] + torch.tensor([1.0, 0.0])[:, None, None]
    torch.testing.assert_close(layer(x), expected)


def test_signals_keep_their_size_through_the_first_weights() -> None:
    logits = LeNet5(5)(torch.randn(64, 3, SIZE, SIZE))
    assert 0.1 < float(logits.detach().std()) < 2


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Layers this small wait longer for a second thread than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_it_learns_and_every_parameter_has_a_gradient() -> None:
    labels = torch.arange(32) % 4
    images = torch.randn(32, 3, SIZE, SIZE) * 0.3
    images[:, 0] += labels[:, None, None]  # how red a photo is tells its class
    model = LeNet5(4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    first = 0.0
    for step in range(40):
        loss = nn.functional.cross_entropy(model(images), labels)
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        assert step or all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        optimizer.step()
    assert float(loss.detach()) < first / 4
