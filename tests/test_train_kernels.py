"""The kernels of a training step against plain torch in float64, on every instruction set that runs here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnv2_fast.backends import cpu, cpu_train
from mnv2_fast.backends.cpu_train import Conv, Expansion, Gradient, Norm, Step

ISAS = cpu.isas() if cpu.available() else []
EPS = torch.finfo(torch.float32).eps
CHANNELS = (1, 3, 8, 17, 24, 33, 144)
SIZES = ((1, 1), (2, 7), (7, 2), (8, 15), (15, 16))
KINDS = (("pointwise", 1), ("depthwise", 1), ("depthwise", 2), ("stem", 2))


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn; new memory starts as NaN, so that what is not written shows."""
    before, empty = cpu.isa(), cpu_train.empty
    monkeypatch.setattr(cpu_train, "empty", lambda *shape, **of: empty(*shape, **of).fill_(torch.nan))
    cpu.extension().select_isa(request.param)
    yield request.param
    cpu.extension().select_isa(before)


@dataclass
class Case:
    """One layer with all that its kernels read."""

    kind: str
    stride: int
    x: Tensor
    norm: Norm | None
    weight: Tensor

    @property
    def layer(self) -> Conv:
        return Conv(self.kind, self.weight, self.stride)

    def conv(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of an activated x, both [N, H, W, C]."""
        groups = x.shape[3] if self.kind == "depthwise" else 1
        padding = 0 if self.kind == "pointwise" else 1
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, self.stride, padding, groups=groups)
        return y.permute(0, 2, 3, 1)

    def given(self) -> Tensor:
        """x as the kernels take it."""
        return self.x.permute(0, 3, 1, 2) if self.kind == "stem" else self.x


def values_of(channels: int) -> Tensor:
    return torch.stack((torch.randn(channels), torch.rand(channels) + 0.5, 2 + torch.randn(channels)))


def off_the_bends(z: Tensor, values: Tensor, step: float = 0.01) -> Tensor:
    """z moved where its activation is not differentiable, or so near that rounding decides."""
    u = z * values[1] + values[2]
    return torch.where((u.abs() < 1e-3) | ((u - 6).abs() < 1e-3), z + step, z)


def make(kind: str, stride: int, channels: int, size: tuple[int, int], *, batch: int = 3) -> Case:
    cin = 3 if kind == "stem" else channels
    cout = {"pointwise": CHANNELS[(CHANNELS.index(channels) + 1) % len(CHANNELS)]}.get(kind, channels)
    x = torch.randn(batch, *size, cin) * 2
    norm = None
    if kind != "stem":
        values = values_of(cin)
        moments = torch.stack((values[0].double(), torch.ones(cin).double()))
        norm, x = Norm(moments, values, 1e-5, channels % 2 == 0), off_the_bends(x, values)
    shape = {"pointwise": (cout, cin, 1, 1), "depthwise": (cout, 1, 3, 3), "stem": (cout, 3, 3, 3)}[kind]
    return Case(kind, stride, x, norm, torch.randn(shape))


def activated(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    u = x * norm.values[1].to(x.dtype) + norm.values[2].to(x.dtype)
    return u.clamp(0, 6) if norm.relu6 else u


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, in L2."""
    return float((a.double() - b).norm() / b.norm()) if b.any() else float(a.double().norm())


GRID = [(kind, stride, c, size) for kind, stride in KINDS for c in CHANNELS for size in SIZES]


@pytest.mark.parametrize(("kind", "stride", "channels", "size"), GRID)
def test_forward(kind: str, stride: int, channels: int, size: tuple[int, int]) -> None:
    case = make(kind, stride, channels, size)
    z, total = cpu_train.forward(case.layer, case.given(), case.norm, sums=True)
    a, w = activated(case.x.double(), case.norm), case.weight.double()
    # Roundings of an activated input, twice where no instruction fuses it, and of each step of the sum.
    x, norm = case.x.double().abs(), case.norm
    terms = x if norm is None else x * norm.values[1].double() + norm.values[2].double().abs()
    bound = 4 * EPS * case.conv(terms, w.abs()) + 1e-30
    assert ((z - case.conv(a, w)).abs() <= bound).all()
    # A chunk is summed 8 + 28 additions deep, whose roundings are as often up as down.
    wide = z.double().flatten(0, 2)
    spread = (wide - wide[0]).abs()
    for found, expected, size_of in (
        (total[0], wide.sum(0), spread.sum(0) + wide.abs().sum(0)),
        (total[1], (wide * wide).sum(0), (spread**2).sum(0) + (wide[0] * spread).abs().sum(0) * 2),
    ):
        assert ((found - expected).abs() <= 36**0.5 * EPS * size_of + 1e-12 * expected.abs()).all()


@pytest.mark.parametrize(("kind", "stride"), KINDS)
def test_variance_of_a_far_mean(kind: str, stride: int) -> None:
    """A mean of 3000 standard deviations: sums of float32 squares as they are would have no digit left."""
    case = make(kind, stride, 8, (15, 16))
    x, weight = torch.rand_like(case.x) * 0.01 + 10, case.weight.abs()
    if kind != "pointwise":  # only pixels without padding around them have a far mean with a small spread
        weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    given = x.permute(0, 3, 1, 2) if kind == "stem" else x
    z, total = cpu_train.forward(Conv(kind, weight, stride), given, None, sums=True)
    pixels = z.numel() // z.shape[3]
    norm = cpu_train.normalize(total, pixels, None, None, eps=0.0, relu6=False)
    expected = z.double().flatten(0, 2).var(0, unbiased=False)
    torch.testing.assert_close(norm.moments[1], expected, rtol=1e-5, atol=0)


def gradients(
    case: Case, z: Tensor, g: Tensor, mask: Norm | None, coefficients: Tensor
) -> tuple[Tensor, ...]:
    """What `backward` should give, by autograd in the dtype of z: dx, its sums, dw."""
    dtype = z.dtype
    of_g, of_z, constant = coefficients.to(dtype)
    if mask is not None:
        u = z * mask.values[1].to(dtype) + mask.values[2].to(dtype)
        g = torch.where((u > 0) & (u < 6), g, torch.zeros_like(g))
    dz = of_g * g + of_z * z + constant
    x, weight = case.x.to(dtype), case.weight.to(dtype).requires_grad_()
    u = x if case.norm is None else x * case.norm.values[1].to(dtype) + case.norm.values[2].to(dtype)
    u = u.detach().requires_grad_()
    a = u.clamp(0, 6) if case.norm is not None and case.norm.relu6 else u
    dx, dw = torch.autograd.grad(case.conv(a, weight), (u, weight), dz)
    center = x - (0 if case.norm is None else case.norm.values[0].to(dtype))
    return dx, torch.stack((dx.flatten(0, 2).sum(0), (dx * center).flatten(0, 2).sum(0))), dw


@pytest.mark.parametrize(("kind", "stride", "channels", "size"), GRID)
def test_backward(kind: str, stride: int, channels: int, size: tuple[int, int]) -> None:
    case = make(kind, stride, channels, size)
    z, _ = cpu_train.forward(case.layer, case.given(), case.norm, sums=False)
    values, coefficients = values_of(z.shape[3]), torch.randn(3, z.shape[3])
    z = off_the_bends(z, values)
    mask = Norm(torch.zeros(2, z.shape[3]).double(), values, 1e-5, True) if channels % 3 else None
    g = torch.randn(z.shape)
    gradient = Gradient(g, mask, coefficients)
    step = Step(case.layer, case.given(), case.norm, z, gradient)
    found = cpu_train.backward(step, for_x=kind != "stem")
    expected = gradients(case, z.double(), g.double(), mask, coefficients)
    torchs = gradients(case, z, g, mask, coefficients)
    if kind == "stem":
        assert found[0] is None
        found, expected, torchs = found[2:], expected[2:], torchs[2:]
    elif case.norm is None:
        found, expected, torchs = found[::2], expected[::2], torchs[::2]
    for ours, right, torch_ in zip(found, expected, torchs, strict=True):
        assert ours is not None
        assert distance(ours, right) <= 2 * distance(torch_, right) + 16 * EPS


def test_residual_and_what_is_not_asked_for() -> None:
    case = make("pointwise", 1, 24, (7, 5))
    case.norm = None
    z, _ = cpu_train.forward(case.layer, case.x, None, sums=False)
    g, coefficients = torch.randn(z.shape), torch.randn(3, z.shape[3])
    step = Step(case.layer, case.x, None, z, Gradient(g, None, coefficients))
    residual = torch.randn(case.x.shape)
    dx, _, dw = cpu_train.backward(step)
    added, _, none = cpu_train.backward(step, residual=residual, for_weight=False)
    assert dx is not None
    assert dw is not None
    assert added is not None
    assert none is None
    torch.testing.assert_close(
        added, dx + residual, rtol=0, atol=float(2 * EPS * (dx.abs() + residual.abs()).max())
    )
    none, _, alone = cpu_train.backward(step, for_x=False)
    assert none is None
    assert alone is not None
    assert torch.equal(alone, dw)


@pytest.mark.parametrize(("kind", "stride"), KINDS)
def test_same_bits_run_to_run(kind: str, stride: int) -> None:
    case = make(kind, stride, 24, (15, 16), batch=5)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 2, 3, 3):
            torch.set_num_threads(count)
            z, total = cpu_train.forward(case.layer, case.given(), case.norm, sums=True)
            gradient = Gradient(z, None, torch.ones(3, z.shape[3]))
            step = Step(case.layer, case.given(), case.norm, z, gradient)
            _, sums, dw = cpu_train.backward(step, for_x=kind != "stem")
            assert dw is not None
            results.append((z, total, dw, *((sums,) if kind != "stem" else ())))
    finally:
        torch.set_num_threads(threads)
    for one, again in zip(results[::2], results[1::2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    for one, other in zip(results[0], results[-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def narrowed(case: Case) -> Case:
    """The same with x in bf16, off the bends all the same, and the weight as a bf16 step has it."""
    x = case.x.bfloat16()
    if case.norm is not None:
        for _ in range(3):
            x = off_the_bends(x.float(), case.norm.values, 0.5).bfloat16()
    case.x = case.x if case.kind == "stem" else x
    case.weight = case.weight.bfloat16() if case.kind == "pointwise" else case.weight
    return case


BF16 = 2.0**-8  # a rounding is at most half of it; a tensor has two or three, of operands and of itself


@pytest.mark.parametrize(("kind", "stride", "channels", "size"), GRID)
def test_bf16(kind: str, stride: int, channels: int, size: tuple[int, int]) -> None:
    case = narrowed(make(kind, stride, channels, size))
    dtype = torch.bfloat16
    z, total = cpu_train.forward(case.layer, case.given(), case.norm, sums=True, dtype=dtype)
    assert z.dtype is dtype
    a, w = activated(case.x.double(), case.norm), case.weight.double()
    expected = case.conv(a, w).flatten(0, 2)
    assert distance(z.flatten(0, 2), expected) <= BF16
    sums = torch.stack((expected.sum(0), expected.square().sum(0)))
    terms = case.conv(a.abs(), w.abs()).flatten(0, 2)
    sizes = torch.stack((terms.sum(0), 2 * (terms * expected.abs()).sum(0)))
    assert ((total - sums).abs() <= BF16 * sizes + 1e-6).all()

    values, coefficients = values_of(z.shape[3]), torch.randn(3, z.shape[3])
    for _ in range(3):
        z = off_the_bends(z.float(), values, 0.5).bfloat16()
    mask = Norm(torch.zeros(2, z.shape[3]).double(), values, 1e-5, True) if channels % 3 else None
    g = torch.randn(z.shape).bfloat16()
    step = Step(case.layer, case.given(), case.norm, z, Gradient(g, mask, coefficients))
    dx, sums, dw = cpu_train.backward(step, for_x=kind != "stem")
    right = gradients(case, z.double(), g.double(), mask, coefficients)
    assert dw is not None
    assert dw.dtype is torch.float32
    assert distance(dw, right[2]) <= BF16
    if kind != "stem":
        assert dx is not None
        assert dx.dtype is dtype
        assert distance(dx, right[0]) <= BF16
        if case.norm is not None:
            assert distance(sums, right[1]) <= 4 * BF16 or channels * size[0] * size[1] < 64


@dataclass
class Pair:
    """An expansion and the depthwise layer after it, with norms of the batch's moments or of others."""

    x: Tensor
    weight: Tensor
    gamma: Tensor
    taps: Tensor
    stride: int
    batch: bool

    @property
    def remade(self) -> Expansion:
        return Expansion(self.x, self.weight, cpu_train.input_moments(self.x) if self.batch else None)

    def norm(self, sums: Tensor) -> tuple[Norm, int]:
        """Of the expansion, and the pixels that `norm_gradient` takes."""
        pixels = self.x.shape[:3].numel()
        norm = cpu_train.normalize(
            sums, pixels, self.gamma, torch.ones_like(self.gamma), eps=1e-5, relu6=True
        )
        return norm, pixels if self.batch else 0


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
    wide = [t.to(dtype).requires_grad_() for t in (of.x, of.weight, of.taps, of.gamma)]
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
    a = torch.where(through, u, u.detach().clamp(0, 6))
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
    exact = dtype is torch.float32
    of = pair(channels, size, dtype, stride, batch)
    first, second = Conv("pointwise", of.weight, 1), Conv("depthwise", of.taps, stride)
    kept, sums = cpu_train.forward(first, of.x, None, sums=True, dtype=dtype)
    norm, pixels = of.norm(sums)
    z, _ = cpu_train.forward(second, kept, norm, sums=True, dtype=dtype)
    again, of_again = cpu_train.forward(second, of.remade, norm, sums=True, dtype=dtype)
    assert distance(again, z.double()) <= (8 * EPS if exact else BF16)
    flat = again.double().flatten(0, 2)
    sizes = torch.stack((flat.abs().sum(0), 2 * flat.square().sum(0)))
    sums = torch.stack((flat.sum(0), flat.square().sum(0)))
    assert ((of_again - sums).abs() <= (36**0.5 * EPS if exact else BF16) * sizes + 1e-6).all()

    g, residual = torch.randn(z.shape).to(dtype), torch.randn(of.x.shape).to(dtype)
    coefficients = torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, channels[1]).contiguous()
    begun, dw = cpu_train.expansion_backward(
        Step(second, of.remade, norm, z, Gradient(g, None, coefficients))
    )
    coefficients, *affine = cpu_train.norm_gradient(begun.total, norm, of.gamma, pixels)
    whole = cpu_train.expansion_finish(of.remade, begun, norm, coefficients, residual)
    expected = pair_gradients(of, norm, g, residual, torch.float64)
    torchs = pair_gradients(of, norm, g, residual, torch.float32)
    for ours, right, torch_ in zip((*whole, dw, *affine), expected, torchs, strict=True):
        assert ours is not None
        assert distance(ours, right) <= (3 * distance(torch_, right) + 16 * EPS if exact else 2 * BF16)


def test_gradients_of_an_expansion_far_from_zero() -> None:
    """Means of 3000 standard deviations: sums that are zero must not be roundings times these."""
    of = pair((24, 40), (15, 16), torch.float32, 1, True)
    of.x = torch.rand(of.x.shape) * 0.01 + 10
    of.gamma /= 10  # no value is near ReLU6's bends, where roundings of that size would decide
    norm, pixels = of.norm(cpu_train.expansion_sums(of.remade))
    conv = Conv("depthwise", of.taps, 1)
    z, _ = cpu_train.forward(conv, of.remade, norm, sums=False)
    g, residual = torch.randn(z.shape), torch.zeros(of.x.shape)
    coefficients = torch.tensor([1.0, 0.0, 0.0])[:, None].expand(3, 40).contiguous()
    begun, _ = cpu_train.expansion_backward(Step(conv, of.remade, norm, z, Gradient(g, None, coefficients)))
    coefficients, *_ = cpu_train.norm_gradient(begun.total, norm, of.gamma, pixels)
    _, dw = cpu_train.expansion_finish(of.remade, begun, norm, coefficients)
    assert dw is not None
    # z in float32 is 3000 roundings off a standard deviation, as anybody's is.
    assert distance(dw, pair_gradients(of, norm, g, residual, torch.float64)[1]) <= 3000 * EPS


def test_what_is_not_asked_for_of_an_expansion() -> None:
    of = pair((16, 96), (7, 5), torch.float32, 1, True)
    norm, pixels = of.norm(cpu_train.expansion_sums(of.remade))
    conv = Conv("depthwise", of.taps, 1)
    z, _ = cpu_train.forward(conv, of.remade, norm, sums=False)
    gradient = Gradient(torch.randn(z.shape), None, torch.randn(3, 96))
    after = Step(conv, of.remade, norm, z, gradient)

    def found(**asked: bool) -> tuple[Tensor | None, ...]:
        begun, dw = cpu_train.expansion_backward(after, **asked)
        coefficients, *_ = cpu_train.norm_gradient(begun.total, norm, of.gamma, pixels)
        return (*cpu_train.expansion_finish(of.remade, begun, norm, coefficients), dw, begun.total)

    everything = found()
    for i, name in enumerate(("for_x", "for_weight", "for_after")):
        less = found(**{name: False})
        assert less[i] is None
        for j in {0, 1, 2, 3} - {i}:
            assert torch.equal(less[j], everything[j])  # type: ignore[arg-type]


def test_sums_and_activate() -> None:
    values = values_of(33)
    z, g, residual = (
        off_the_bends(torch.randn(2, 7, 5, 33), values),
        torch.randn(2, 7, 5, 33),
        torch.randn(2, 7, 5, 33),
    )
    norm = Norm(torch.zeros(2, 33).double(), values, 1e-5, True)
    expected = activated(z.double(), norm) + residual.double()
    torch.testing.assert_close(
        cpu_train.activate(z, norm, residual).double(), expected, rtol=0, atol=16 * EPS
    )
    u = z.double() * values[1].double() + values[2].double()
    masked = torch.where((u > 0) & (u < 6), g.double(), torch.zeros(()).double()).flatten(0, 2)
    center = z.double().flatten(0, 2) - values[0].double()
    bound = 4 * EPS * torch.stack((masked.abs().sum(0), (masked * center).abs().sum(0)))
    found = cpu_train.sums(g, z, norm)
    assert ((found - torch.stack((masked.sum(0), (masked * center).sum(0)))).abs() <= bound).all()
    assert ((found[0] - masked.sum(0)).abs() > 0).any()  # else the bound is no test


def test_nan_stays_in_its_channel() -> None:
    case = make("pointwise", 1, 24, (7, 5))
    case.x[1, 2, 3, 4] = torch.nan
    z, total = cpu_train.forward(case.layer, case.x, case.norm, sums=True)
    assert z[1, 2, 3].isnan().all()
    assert z.isnan().sum() == z.shape[3]
    assert total.isnan().all()
    case = make("depthwise", 1, 24, (7, 5))
    case.x[1, 2, 3, 4] = torch.nan
    z, total = cpu_train.forward(case.layer, case.x, case.norm, sums=True)
    assert z.isnan().sum() == 9
    assert total.isnan().any(0).sum() == 1
