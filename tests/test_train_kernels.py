"""The kernels of a training step against plain torch in float64, on every instruction set that runs here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from exactness import BF16, EPS, SIZES, distance
from torch import Tensor

from mnv2_fast.backends import cpu_train
from mnv2_fast.backends.cpu_train import Conv, Gradient, Norm, Step

pytestmark = pytest.mark.usefixtures("training_isa")

CHANNELS = (1, 3, 8, 17, 24, 33, 144, 64, 72)
KINDS = (("pointwise", 1), ("depthwise", 1), ("depthwise", 2), ("stem", 2))


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


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 460)])
def test_a_stems_image_of_any_strides(size: tuple[int, int]) -> None:
    """Colours apart, interleaved, or neither: the same bits. A row of 230 pixels is more than one piece."""
    case = make("stem", 2, 17, size)
    nhwc = case.given()
    z, total = cpu_train.forward(case.layer, nhwc, None, sums=True)
    assert distance(z, case.conv(case.x.double(), case.weight.double())) <= 4 * EPS
    g, coefficients = torch.randn(z.shape), torch.randn(3, 17)
    step = Step(case.layer, nhwc, None, z, Gradient(g, None, coefficients))
    _, _, dw = cpu_train.backward(step, for_x=False)
    assert dw is not None
    assert distance(dw, gradients(case, z.double(), g.double(), None, coefficients)[-1]) <= 16 * EPS
    for x in (nhwc.contiguous(), torch.stack((nhwc, nhwc), 4)[..., 0]):
        again, sums = cpu_train.forward(case.layer, x, None, sums=True)
        assert torch.equal(again, z)
        assert torch.equal(sums, total)
        _, _, found = cpu_train.backward(replace(step, x=x), for_x=False)
        assert found is not None
        assert torch.equal(found, dw)


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
