"""Probes of a training step's kernels: inputs at random, the float64 answers, torch's way, what must move.

As `gpu_forms` has them for inference, but the kernels make their results themselves, several at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gpu_forms
from bench.gpu_forms import Judged, Maker, StepProbe
from kernels import (
    norm,
    train_depthwise,
    train_pointwise,
    train_pointwise_gradient,
    train_reference,
    train_stem,
)
from kernels.common import device_of
from kernels.norm import Applied, RawGradient
from kernels.parts import number_of_parts
from mnv2_fast import arch

F32 = torch.finfo(torch.float32).eps
EPS = 1e-5
# Pixels of a part of a norm's sums.
PART = 64


@dataclasses.dataclass(frozen=True)
class Run:
    """A layer as a step runs it.

    `reads`: what is applied to its input, a norm with ReLU6 ("relu6") or without ("linear"); "" for an
    activation or an image. `last`: of its node, whose output is activated. `residual`: that adds its input.
    """

    layer: arch.Layer
    reads: str
    last: bool
    residual: bool

    @property
    def facts(self) -> tuple[str, int]:
        """Its channels, stride and what it reads, in words; its input's size."""
        spec = self.layer.spec
        of = "" if self.reads == "relu6" or spec.kind == "stem" else f", {self.reads or 'activated'}"
        return f"{spec.cin} to {spec.cout} s{spec.stride}{of}", self.layer.h

    @property
    def masks(self) -> bool:
        """Whether a ReLU6 is yet to be applied to the gradient that comes."""
        return self.last and self.layer.spec.relu6

    @property
    def adds(self) -> bool:
        """Whether the gradient of what the node's residual adds is added to that of its input."""
        return self.residual and not self.reads

    def variant(self, of: str) -> str:
        """What a kernel has branches for: `of` "forward", or the gradient that it makes, "input" or "weight",
        or "gradients" of a depthwise layer.
        """
        facts = {"masked": self.masks and of != "forward", "added to": self.adds and of == "input"}
        words = (word for word, is_so in facts.items() if is_so)
        return ", ".join((f"reads {self.reads or 'as it is'}", *words))


class Material:
    """Random tensors of a layer in a step, on the device, others at every run; all [N, H, W, C]."""

    def __init__(self, run: Run, n: int, kind: str) -> None:
        self.run, self.spec = run, run.layer.spec
        self.n, self.of_kind = n, Maker(kind)
        self.dtype, self.tf32 = self.of_kind.dtype, self.of_kind.tf32

    def map(self, c: int, h: int, w: int, scale: float = 1.0) -> Tensor:
        return self.of_kind.random(self.n, h, w, c, scale=scale)

    def output(self) -> Tensor:
        """Of the shape of the raw output."""
        return self.map(self.spec.cout, self.run.layer.ho, self.run.layer.wo)

    def values(self, c: int) -> Tensor:
        """A norm [3, C] float32 whose ReLU6 is flat for a part of random values, below and above."""
        rows = torch.randn(c) * 0.3, 1 + 3 * torch.rand(c), torch.rand(c) * 3
        return torch.stack(rows).to(gpu_forms.DEVICE)

    def input(self) -> tuple[Tensor, Applied | None, Tensor]:
        """x, the norm that is applied to it, and the weight."""
        layer, spec = self.run.layer, self.spec
        shape, depth = spec.weight_shape, math.prod(spec.weight_shape[1:])
        weight = self.of_kind.random(*shape, scale=depth**-0.5)
        weight = weight if spec.kind == "pointwise" else weight.float()
        x = self.map(spec.cin, layer.h, layer.w, 2.0)
        if spec.kind == "stem":
            return x.float().permute(0, 3, 1, 2).contiguous(), None, weight
        if not self.run.reads:
            return x, None, weight
        applied = Applied(self.values(spec.cin), self.run.reads == "relu6")
        return away(x, applied.values) if applied.relu6 else x, applied, weight

    def torchs_image(self, x: Tensor) -> Tensor:
        """A stem's NCHW image in channels_last, as torch's step has it beside a channels_last dz; else x."""
        return x.contiguous(memory_format=torch.channels_last) if self.spec.kind == "stem" else x

    def gradient(self, x: Tensor, applied: Applied | None, weight: Tensor) -> RawGradient:
        """Of the raw output; that of an expansion, which may be made again, must be its own."""
        values, mask = self.values(self.spec.cout), self.run.masks
        if self.remade:
            a = train_reference.applied(x, applied).to(x.dtype).float()
            z = (a @ weight.flatten(1).float().T).to(x.dtype)
        else:
            z = self.output()
        z = away(z, values) if mask and not self.remade else z
        coefficients = torch.randn((3, self.spec.cout), device=z.device)
        return RawGradient(self.output(), z, values, coefficients, mask, True)

    @property
    def remade(self) -> bool:
        """Whether z need not be read: a 1x1 layer's that is twice as wide as x, or wider."""
        return self.spec.kind == "pointwise" and self.spec.cout >= 2 * self.spec.cin and not self.run.masks

    @property
    def rounding(self) -> float:
        """Largest relative error that a factor of a product of matrices takes."""
        if self.spec.kind == "depthwise":
            return 0.0
        if self.dtype != torch.float32:
            return torch.finfo(self.dtype).eps / 2
        return 2.0**-10 if self.tf32 else 0.0

    def allowed(self, want: Tensor, size: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
        """How far a sum of so many terms may be off: by the roundings of two factors, of the norm or the
        gradient's terms before that, of the sums; then by one of the result.
        """
        own, relative = torch.finfo(dtype), 2 * self.rounding + (terms + 8) * F32
        return relative * size.nan_to_num(0, 0) + own.eps / 2 * want.abs().nan_to_num(0, 0) + own.tiny


def away(z: Tensor, values: Tensor) -> Tensor:
    """z moved where a norm of these values, rounded, could come out on the other side of 0 or 6."""
    mean, scale, shift = values
    y = (z.float() - mean) * scale + shift
    near = torch.minimum(y.abs(), (y - 6).abs()) < 1e-3
    return torch.where(near, z + 0.2 * z.abs().clamp(min=1), z)


def forward(of: Material) -> StepProbe:
    x, applied, weight = of.input()
    spec, image = of.spec, of.torchs_image(x)

    def call() -> Sequence[Tensor | None]:
        if spec.kind == "stem":
            return train_stem.forward(x, weight, of.dtype, moments=True, tf32=of.tf32)
        if spec.kind == "depthwise":
            return train_depthwise.forward(x, applied, weight, spec.stride, moments=True)
        return train_pointwise.forward(x, applied, weight, moments=True, tf32=of.tf32)

    def judge(found: Sequence[Tensor | None]) -> Iterator[Judged]:
        z, parts = found
        assert z is not None
        assert parts is not None
        want = train_reference.forward(x, applied, weight, spec.stride)
        size = train_reference.forward(*_sizes(x, applied), weight.abs(), spec.stride)
        yield "raw output", z, want, of.allowed(want, size, weight[0].numel(), of.dtype)
        got, want = norm.normalize(parts, None, None, EPS)[0], train_reference.moments(z)
        off = 8 * F32 * z.double().flatten(0, 2).abs().amax(0)  # of a center of one tile
        yield "moments", got, want, torch.stack((off, off**2 + 64 * F32 * want[1]))

    def eager() -> object:
        a = image.to(of.dtype) if spec.kind == "stem" else _torchs_applied(x, applied).permute(0, 3, 1, 2)
        z = F.conv2d(a, weight.to(of.dtype), None, spec.stride, weight.shape[2] // 2, 1, _groups(spec))
        return z, *torch.var_mean(z, (0, 2, 3), correction=0)

    moved = _bytes(x, weight) + _count(of) * of.dtype.itemsize
    return StepProbe(call, judge, x, eager, moved)


def gradients(of: Material, only: str = "") -> StepProbe:
    """Both gradients of a layer; `only` "input" or "weight"; a stem has that of its weight."""
    x, applied, weight = of.input()
    given, spec, image = of.gradient(x, applied, weight), of.spec, of.torchs_image(x)
    for_x, for_weight = spec.kind != "stem" and only != "weight", only != "input"
    residual = torch.randn_like(x) if of.run.adds and for_x else None

    def call() -> Sequence[Tensor | None]:
        if spec.kind == "stem":
            return None, None, train_stem.weight_gradient(given, x, tf32=of.tf32)
        if spec.kind == "depthwise":
            return train_depthwise.gradients(given, weight, x, applied, spec.stride)
        return train_pointwise_gradient.gradients(
            given, weight, x, applied, residual, for_x=for_x, for_weight=for_weight, tf32=of.tf32
        )

    def judge(found: Sequence[Tensor | None]) -> Iterator[Judged]:
        return _judged_gradients(of, given, (weight, x, applied, residual), found)

    def eager() -> object:
        dz = _torchs_raw_gradient(given).permute(0, 3, 1, 2)
        a = image.to(of.dtype) if spec.kind == "stem" else _torchs_applied(x, applied).permute(0, 3, 1, 2)
        padding, strides = [weight.shape[2] // 2] * 2, [spec.stride] * 2
        fixed: tuple[Any, ...] = (None, strides, padding, [1, 1], False, [0, 0], _groups(spec))
        own = weight.to(of.dtype)
        mask = [for_x, for_weight, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(dz, a, own, *fixed, mask)
        if residual is not None:
            dx = dx.permute(0, 2, 3, 1) + residual
        elif for_x and applied is not None and applied.relu6:
            dx = torch.ops.aten.hardtanh_backward(dx, a, 0.0, 6.0)
        return dx, dw

    z = () if of.remade else (given.z,)
    written = (x, *(() if residual is None else (residual,))) if for_x else ()
    moved = _bytes(given.g, *z, x, weight, *written)
    moved += 4 * weight.numel() if for_weight else 0
    return StepProbe(call, judge, given.g, eager, moved)


def _judged_gradients(
    of: Material,
    given: RawGradient,
    read: tuple[Tensor, Tensor, Applied | None, Tensor | None],
    found: Sequence[Tensor | None],
) -> Iterator[Judged]:
    """`read`: weight, x, its norm, residual."""
    weight, x, applied, residual = read
    dx, sums, dw = found
    twin = train_reference.gradients(given, *read, stride=of.spec.stride)
    largest = train_reference.gradients(
        _gradient_size(given),
        weight.abs(),
        *_sizes(x, applied),
        None if residual is None else residual.abs(),
        stride=of.spec.stride,
    )
    if dx is not None:
        terms = weight[:, 0].numel()
        yield "gradient of x", dx, twin.x, of.allowed(twin.x, largest.x.abs(), terms, x.dtype)
    if dx is not None and applied is not None:
        assert sums is not None
        # Of what was stored, which is masked.
        yield "sums", *_judged_sums(sums, dx, x, Applied(applied.values, False))
    if dw is not None:
        terms = given.g.numel() // given.g.shape[-1]
        want = twin.weight
        yield "gradient of the weight", dw, want, of.allowed(want, largest.weight, terms, torch.float32)


def _judged_sums(sums: Tensor, g: Tensor, z: Tensor, applied: Applied) -> tuple[Tensor, Tensor, Tensor]:
    """A norm's sums, beside those of the float64 twin, and what they may be off."""
    kept, want = train_reference.masked(g, z, applied)
    mean = applied.values[0].double()
    pixels = z.numel() // z.shape[-1]
    size = (kept.abs().sum((0, 1, 2)), (kept * (z.double() - mean)).abs().sum((0, 1, 2)))
    return sums.double().sum(0), want, (pixels + 8) * F32 * torch.stack(size).nan_to_num(0, 0)


def activate(of: Material) -> StepProbe:
    relu6 = of.spec.relu6
    z, applied = of.output(), Applied(of.values(of.spec.cout), relu6)
    residual = of.output() if of.run.residual else None
    added = () if residual is None else (residual,)

    def judge(found: Sequence[Tensor | None]) -> Iterator[Judged]:
        (out,) = found
        assert out is not None
        want, size = train_reference.applied(z, applied), _sizes(z, applied)[0]
        for t in added:
            want, size = want + t.double(), size + t.double().abs()
        own = torch.finfo(z.dtype)
        allowed = 8 * F32 * size + own.eps / 2 * want.abs() + own.tiny
        yield "activation", out, want, allowed.nan_to_num(0, 0)

    def eager() -> object:
        y = _torchs_applied(z, applied)
        return y if residual is None else y + residual

    def call() -> Sequence[Tensor | None]:
        return (norm.activate(z, applied.values, relu6, residual),)

    return StepProbe(call, judge, z, eager, _bytes(z, z, *added))


def sums(of: Material) -> StepProbe:
    relu6, values = of.spec.relu6, of.values(of.spec.cout)
    g, z = of.output(), of.output()
    z = away(z, values) if relu6 else z

    def judge(found: Sequence[Tensor | None]) -> Iterator[Judged]:
        (sums,) = found
        assert sums is not None
        yield "sums", *_judged_sums(sums, g, z, Applied(values, relu6))

    def eager() -> object:
        kept = torch.ops.aten.hardtanh_backward(g, _torchs_applied(z, Applied(values, False)), 0.0, 6.0)
        kept = kept if relu6 else g
        return kept.sum((0, 1, 2)), (kept * (z - values[0].to(z.dtype))).sum((0, 1, 2))

    return StepProbe(lambda: (norm.sums(g, z, values, relu6),), judge, g, eager, _bytes(g, z))


def _parts(of: Material, rows: int) -> Tensor:
    """Random sums [P, rows, C] of so many parts as a step's kernels leave, about."""
    pixels, units = of.n * of.run.layer.ho * of.run.layer.wo, device_of(torch.device(gpu_forms.DEVICE))[1]
    number = number_of_parts(-(-pixels // PART), 1, units)
    return torch.randn((number, rows, of.spec.cout), device=gpu_forms.DEVICE)


def normalize(of: Material) -> StepProbe:
    parts, c = _parts(of, 3), of.spec.cout
    parts[:, 0], parts[:, 2] = PART, parts[:, 2].abs() * PART
    gamma, beta = of.values(c)[1:].clone()
    # Moved by nothing: a second call finds what the first one did.
    running = torch.randn_like(gamma), torch.rand_like(gamma)

    def judge(found: Sequence[Tensor | None]) -> Iterator[Judged]:
        moments, values = found
        assert moments is not None
        assert values is not None
        count, means, spreads = parts.double().unbind(1)
        mean = (count * means).sum(0) / count.sum(0)
        variance = (spreads + count * (means - mean) ** 2).sum(0) / count.sum(0)
        want = torch.stack((mean, variance))
        yield "moments", moments, want, F32**2 * len(parts) * (want.abs() + 1)
        scale = gamma.double() / (variance + EPS).sqrt()
        want = torch.stack((mean, scale, beta.double()))
        yield "norm", values, want, F32 * (want.abs() + F32)

    def eager() -> object:
        count, means, spreads = parts.unbind(1)
        mean = (count * means).sum(0) / count.sum(0)
        variance = (spreads + count * (means - mean) ** 2).sum(0) / count.sum(0)
        return mean, variance, gamma * (variance + EPS).rsqrt()

    def call() -> Sequence[Tensor | None]:
        return norm.normalize(parts, gamma, beta, EPS, running=running, share=0.0)

    return StepProbe(call, judge, parts, eager, _bytes(parts))


def norm_gradient(of: Material) -> StepProbe:
    parts, pixels = _parts(of, 2), of.n * of.run.layer.ho * of.run.layer.wo
    gamma, variance, mean = of.values(of.spec.cout).clone()
    moments = torch.stack((mean, variance.abs())).double()

    def judge(found: Sequence[Tensor | None]) -> Iterator[Judged]:
        coefficients, affine = found
        assert coefficients is not None
        assert affine is not None
        total, product = parts.double().sum(0)
        inverse = (moments[1] + EPS).rsqrt()
        of_g = gamma.double() * inverse
        want = torch.stack((of_g, -of_g * inverse**2 * product / pixels, -of_g * total / pixels))
        yield "coefficients", coefficients, want, F32 * want.abs() + F32**2
        want = torch.stack((product * inverse, total))
        yield "gradients of gamma and beta", affine, want, F32 * want.abs() + F32**2

    def call() -> Sequence[Tensor | None]:
        return norm.norm_gradient(parts, moments, gamma, pixels, EPS)

    def eager() -> object:
        total, product = parts.sum(0)
        inverse = (moments[1].float() + EPS).rsqrt()
        of_g = gamma * inverse
        of_z = -of_g * inverse * inverse * product / pixels
        return of_g, of_z, -of_g * total / pixels, product * inverse, total

    return StepProbe(call, judge, parts, eager, _bytes(parts))


def _sizes(x: Tensor, applied: Applied | None) -> tuple[Tensor, None]:
    """What a convolution multiplies, as large as its roundings are: with the terms of the norm's sum."""
    if applied is None:
        return x.double().abs(), None
    mean, scale, shift = applied.values.double()
    return (x.double() - mean).abs() * scale.abs() + shift.abs(), None


def _gradient_size(of: RawGradient) -> RawGradient:
    """A gradient whose terms are all positive, as large as its roundings are."""
    mean = of.values[0].double()
    distance = of.z.double().abs() + mean.abs()  # z may be made again, unrounded
    g = of.g.abs().nan_to_num(0)  # what the mask drops adds to nothing
    return RawGradient(g, distance + mean, of.values.double(), of.coefficients.abs(), False, of.batch)


def _torchs_applied(x: Tensor, applied: Applied | None) -> Tensor:
    if applied is None:
        return x
    mean, scale, shift = applied.values
    y = torch.addcmul((shift - mean * scale).to(x.dtype), x, scale.to(x.dtype))
    return F.relu6(y, inplace=True) if applied.relu6 else y


def _torchs_raw_gradient(of: RawGradient) -> Tensor:
    of_g, of_z, constant = of.coefficients.to(of.g.dtype)
    g = of.g
    if of.mask:
        g = torch.ops.aten.hardtanh_backward(g, _torchs_applied(of.z, Applied(of.values, False)), 0.0, 6.0)
    return of_g * g + of_z * (of.z - of.values[0].to(g.dtype)) + constant


def _groups(spec: arch.LayerSpec) -> int:
    return spec.cin if spec.kind == "depthwise" else 1


def _count(of: Material) -> int:
    return of.n * of.run.layer.ho * of.run.layer.wo * of.spec.cout


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
