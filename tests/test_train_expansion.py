"""An expansion that nobody keeps: its sums and its gradients, on every instruction set that runs here."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from exactness import BF16, EPS, SIZES, distance
from torch import Tensor

from mnv2_fast.backends import cpu_train
from mnv2_fast.backends.cpu_train import Conv, Expansion, Gradient, Norm, Step

pytestmark = pytest.mark.usefixtures("training_isa")


@dataclass
class Pair:
    """An expansion and the depthwise layer after it, with norms of the batch's moments or of others."""

    x: Tensor
    weight: Tensor
    gamma: Tensor | None
    taps: Tensor
    stride: int
    batch: bool
    relu6: bool = True

    @property
    def remade(self) -> Expansion:
        return Expansion(self.x, self.weight, cpu_train.input_moments(self.x) if self.batch else None)

    def norm(self, sums: Tensor) -> Norm:
        """Of the expansion."""
        pixels = self.x.shape[:3].numel()
        beta = torch.ones(sums.shape[1])
        return cpu_train.normalize(sums, pixels, self.gamma, beta, eps=1e-5, relu6=self.relu6)

    def gradients(
        self, after: Step, residual: Tensor | None = None, **asked: bool
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """Of the expansion's input and weight and the depthwise weight; of gamma and beta, and the sums."""
        assert isinstance(after.x, Expansion)
        assert after.norm is not None
        pixels = self.x.shape[:3].numel() if self.batch else 0
        begun, dw = cpu_train.expansion_backward(after, **asked)
        coefficients, *affine = cpu_train.norm_gradient(begun.total, after.norm, self.gamma, pixels)
        whole = cpu_train.expansion_finish(after.x, begun, after.norm, coefficients, residual)
        return [*whole, dw], [*affine, begun.total]


def pair(
    channels: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, stride: int, batch: bool
) -> Pair:
    cin, hidden = channels
    batch_size = 2 + 128 // math.prod(size)  # of few pixels all of a batch norm's gradient is rounding
    x = 2 + torch.randn(batch_size, *size, cin) @ torch.randn(cin, cin)  # channels that go together
    weight = torch.randn(hidden, cin, 1, 1)
    return Pair(
        x.to(dtype), weight.to(dtype), 1 + torch.rand(hidden), torch.randn(hidden, 1, 3, 3), stride, batch
    )


def as_it_is(channels: int) -> Tensor:
    """Coefficients of a gradient that is the raw output's already."""
    return torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, channels).contiguous()


PAIRS = [(3, 17), (16, 96), (24, 40), (33, 33)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", PAIRS)
def test_sums_of_an_expansion_that_nobody_makes(
    channels: tuple[int, int], size: tuple[int, int], dtype: torch.dtype
) -> None:
    of = pair(channels, size, dtype, 1, True)
    flat = of.x.double().flatten(0, 2)
    mean = flat.mean(0)
    moments, center = cpu_train.input_moments(of.x), flat - mean
    torch.testing.assert_close(moments[0], mean, rtol=1e-6, atol=0)
    # A chunk's products are added one after another, 224 deep, with roundings as often up as down.
    bound = 224**0.5 * EPS * center.abs().T @ center.abs() + 1e-6 * len(flat) * EPS
    assert ((moments[1:] - center.T @ center).abs() <= bound).all()
    weight = of.weight.double().flatten(1).T
    z, reach = flat @ weight, (center.abs() @ weight.abs()).square().mean(0)
    norm = cpu_train.normalize(cpu_train.expansion_sums(of.remade), len(z), None, None, eps=0.0, relu6=True)
    assert ((norm.moments[0] - z.mean(0)).abs() <= 2 * EPS * (flat.abs() @ weight.abs()).mean(0)).all()
    # The mean is float64 here, but its square is taken from the sum of squares again.
    rounded = 1e-14 * z.square().mean(0)
    assert ((norm.moments[1] - z.var(0, unbiased=False)).abs() <= 224**0.5 * EPS * reach + rounded).all()


def test_sums_of_an_expansion_far_from_zero() -> None:
    """A mean of 3000 standard deviations, as `test_variance_of_a_far_mean`."""
    x, weight = torch.rand(3, 15, 16, 24) * 0.01 + 10, torch.rand(33, 24, 1, 1)
    sums = cpu_train.expansion_sums(Expansion(x, weight, cpu_train.input_moments(x)))
    norm = cpu_train.normalize(sums, 720, None, None, eps=0.0, relu6=False)
    z = x.double().flatten(0, 2) @ weight.double().flatten(1).T
    torch.testing.assert_close(norm.moments[1], z.var(0, unbiased=False), rtol=1e-5, atol=0)


def pair_gradients(of: Pair, norm: Norm, g: Tensor, residual: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """By autograd: of x, the expansion's weight, the depthwise one, gamma and beta."""
    scale = torch.ones(len(of.taps)) if of.gamma is None else of.gamma
    wide = [t.to(dtype).requires_grad_() for t in (of.x, of.weight, of.taps, scale)]
    x, weight, taps, gamma = wide
    beta = torch.ones_like(gamma).requires_grad_()
    z = F.conv2d(x.permute(0, 3, 1, 2), weight)
    mean, variance = norm.moments.to(dtype)
    if of.batch:
        u = F.batch_norm(z, None, None, gamma, beta, True, 0.0, norm.eps)
    else:
        u = F.batch_norm(z, mean, variance, gamma, beta, False, 0.0, norm.eps)
    # Where ReLU6 lets a gradient through, the kernels' own rounding decides.
    kept, _ = cpu_train.forward(Conv("pointwise", of.weight.float(), 1), of.x.float(), None, sums=False)
    at = kept * norm.values[1] + norm.values[2]
    through = ((at > 0) & (at < 6)).permute(0, 3, 1, 2)
    a = torch.where(through, u, u.detach().clamp(0, 6)) if of.relu6 else u
    y = F.conv2d(a, taps, None, of.stride, 1, groups=len(gamma)).permute(0, 2, 3, 1)
    dx, *others = torch.autograd.grad(y, (*wide, beta), g.to(dtype))
    return [dx + residual.to(dtype), *others]


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", PAIRS)
def test_expansion_that_is_made_again(
    channels: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, stride: int, batch: bool
) -> None:
    """Forward it gives what a kept one gives but for roundings; on the way back it is held to autograd."""
    judge(pair(channels, size, dtype, stride, batch))


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("relu6", [True, False])
@pytest.mark.parametrize("gamma", ["negative", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_of_an_expansion(dtype: torch.dtype, gamma: str | None, relu6: bool, batch: bool) -> None:
    of = pair((24, 40), (8, 15), dtype, 1, batch)
    assert of.gamma is not None
    of.gamma, of.relu6 = None if gamma is None else -of.gamma, relu6
    judge(of)


def judge(of: Pair) -> None:
    """Forward and backward, the expansion made again, beside a kept one and autograd."""
    dtype = of.x.dtype
    exact = dtype is torch.float32
    first, second = Conv("pointwise", of.weight, 1), Conv("depthwise", of.taps, of.stride)
    kept, sums = cpu_train.forward(first, of.x, None, sums=True, dtype=dtype)
    norm = of.norm(sums)
    z, _ = cpu_train.forward(second, kept, norm, sums=True, dtype=dtype)
    again, of_again = cpu_train.forward(second, of.remade, norm, sums=True, dtype=dtype)
    assert distance(again, z.double()) <= (8 * EPS if exact else BF16)
    flat = again.double().flatten(0, 2)
    sizes = torch.stack((flat.abs().sum(0), 2 * flat.square().sum(0)))
    sums = torch.stack((flat.sum(0), flat.square().sum(0)))
    assert ((of_again - sums).abs() <= (36**0.5 * EPS if exact else BF16) * sizes + 1e-6).all()

    g, residual = torch.randn(z.shape).to(dtype), torch.randn(of.x.shape).to(dtype)
    after = Step(second, of.remade, norm, z, Gradient(g, None, as_it_is(len(of.taps))))
    weights, (*affine, _) = of.gradients(after, residual)
    expected = pair_gradients(of, norm, g, residual, torch.float64)
    torchs = pair_gradients(of, norm, g, residual, torch.float32)
    for ours, right, torch_ in zip((*weights, *affine), expected, torchs, strict=True):
        assert ours is not None
        assert distance(ours, right) <= (3 * distance(torch_, right) + 16 * EPS if exact else 2 * BF16)


def test_gradients_of_an_expansion_far_from_zero() -> None:
    """Means of 3000 standard deviations: sums that are zero must not be roundings times these."""
    of = pair((24, 40), (15, 16), torch.float32, 1, True)
    of.x = torch.rand(of.x.shape) * 0.01 + 10
    of.gamma /= 10  # no value is near ReLU6's bends, where roundings of that size would decide
    norm = of.norm(cpu_train.expansion_sums(of.remade))
    conv = Conv("depthwise", of.taps, 1)
    z, _ = cpu_train.forward(conv, of.remade, norm, sums=False)
    g, residual = torch.randn(z.shape), torch.zeros(of.x.shape)
    (_, dw, _), _ = of.gradients(Step(conv, of.remade, norm, z, Gradient(g, None, as_it_is(40))))
    assert dw is not None
    # z in float32 is 3000 roundings off a standard deviation, as anybody's is.
    assert distance(dw, pair_gradients(of, norm, g, residual, torch.float64)[1]) <= 3000 * EPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_asked_for_of_an_expansion(dtype: torch.dtype) -> None:
    of = pair((16, 96), (7, 5), dtype, 1, True)
    norm = of.norm(cpu_train.expansion_sums(of.remade))
    conv = Conv("depthwise", of.taps, 1)
    z, _ = cpu_train.forward(conv, of.remade, norm, sums=False, dtype=dtype)
    gradient = Gradient(torch.randn(z.shape).to(dtype), None, torch.randn(3, 96))
    after = Step(conv, of.remade, norm, z, gradient)

    def found(**asked: bool) -> tuple[Tensor | None, ...]:
        weights, (*_, total) = of.gradients(after, **asked)
        return (*weights, total)

    everything = found()
    for i, name in enumerate(("for_x", "for_weight", "for_after")):
        less = found(**{name: False})
        assert less[i] is None
        for j in {0, 1, 2, 3} - {i}:
            assert torch.equal(less[j], everything[j])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_yet_to_be_masked(dtype: torch.dtype) -> None:
    of = pair((16, 96), (7, 5), dtype, 1, True)
    norm = of.norm(cpu_train.expansion_sums(of.remade))
    conv = Conv("depthwise", of.taps, 1)
    z, sums = cpu_train.forward(conv, of.remade, norm, sums=True, dtype=dtype)
    after = cpu_train.normalize(sums, of.x.shape[:3].numel(), None, None, eps=1e-5, relu6=True)
    g, coefficients = torch.randn(z.shape).to(dtype), torch.randn(3, 96)
    at = torch.addcmul(after.values[2], z.float(), after.values[1])
    masked = torch.where((at > 0) & (at < 6), g, torch.zeros((), dtype=dtype))
    assert not torch.equal(masked, g)
    results = []
    for gradient in (Gradient(g, after, coefficients), Gradient(masked, None, coefficients)):
        begun, dw = cpu_train.expansion_backward(Step(conv, of.remade, norm, z, gradient))
        results.append((begun.dx, begun.dw, begun.total, dw))
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_run_to_run(dtype: torch.dtype) -> None:
    """With more threads than there are rows, too."""
    of = pair((16, 96), (5, 16), dtype, 1, True)
    conv, g = Conv("depthwise", of.taps, 1), torch.randn(of.x.shape[0], 5, 16, 96).to(dtype)
    coefficients = torch.randn(3, 96)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 2, 23, 23):
            torch.set_num_threads(count)
            remade = of.remade
            norm = of.norm(cpu_train.expansion_sums(remade))
            z, sums = cpu_train.forward(conv, remade, norm, sums=True, dtype=dtype)
            weights, _ = of.gradients(Step(conv, remade, norm, z, Gradient(g, None, coefficients)))
            results.append((remade.moments, sums, *weights))
    finally:
        torch.set_num_threads(threads)
    for one, again in zip(results[::2], results[1::2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))  # type: ignore[arg-type]
    for one, other in itertools.combinations(results[::2], 2):
        for a, b in zip(one, other, strict=True):
            assert a is not None
            assert b is not None
            assert distance(a, b.double()) <= (1e-4 if dtype is torch.float32 else 2 * BF16)
