"""Every kernel as a layer of the network launches it, one row each, for `bench.gpu` to check and to time.

A row makes a `Probe`: inputs, a poisoned result, the float64 answer with what it may be off, torch's way to
make the same, and the bytes that must move.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mnv2_fast import arch

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Probe:
    """One call. `run` fills `out`; `judge` gives the float64 answer and how far each element may be off."""

    run: Callable[[], object]
    out: torch.Tensor
    judge: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    eager: Callable[[], object]
    inputs: Sequence[torch.Tensor]

    @property
    def bytes(self) -> int:
        """Of every tensor read and of the result, each once."""
        return sum(t.numel() * t.element_size() for t in (self.out, *self.inputs))


@dataclasses.dataclass(frozen=True)
class Form:
    """A kernel on a layer's shape. `make(batch, dtype, device)`; `count`: how often the network has it."""

    name: str
    layer: str
    size: int
    macs: int
    count: int
    make: Callable[[int, torch.dtype, str], Probe]
    whole_block: bool = False


def forms(layers: Sequence[arch.Layer] | None = None) -> list[Form]:
    """Every kernel of every distinct layer, in the network's order."""
    layers = arch.layers() if layers is None else layers
    found: dict[tuple[str, str, int], Form] = {}
    for form in _all(layers):
        key = form.name, form.layer, form.size
        before = found.get(key)
        found[key] = dataclasses.replace(form, count=before.count + 1) if before else form
    return list(found.values())


def _all(layers: Sequence[arch.Layer]) -> Iterator[Form]:
    for i, layer in enumerate(layers):
        spec, name = layer.spec, f"{layer.spec.cin} to {layer.spec.cout} s{layer.spec.stride}"
        make = {"stem": _stem, "pointwise": _pointwise, "depthwise": _depthwise}.get(spec.kind)
        if i + 1 < len(layers) and layers[i + 1].spec.kind == "linear":
            yield Form("features", name, layer.h, layer.macs, 1, _with(_features, layer))
        elif make is not None:
            yield Form(spec.kind, name, layer.h, layer.macs, 1, _with(make, layer))
        if spec.kind in ("pointwise", "depthwise"):
            for what, gradient in (("input", _input_gradient), ("weight", _weight_gradient)):
                named = f"{spec.kind} {what} gradient"
                yield Form(named, name, layer.h, layer.macs, 1, _with(gradient, layer))
        block = list(layers[i : i + 3])
        kinds = [one.spec.kind for one in block]
        if (
            kinds in (["pointwise", "depthwise", "pointwise"], ["stem", "depthwise", "pointwise"])
            and spec.relu6
        ):
            macs, last = sum(one.macs for one in block), block[-1].spec
            name = f"{spec.cin} to {last.cin} to {last.cout} s{block[1].spec.stride}"
            yield Form("block", name, layer.h, macs, 1, _with(_block, block), whole_block=True)


def _with(make: Callable[..., Probe], what: object) -> Callable[[int, torch.dtype, str], Probe]:
    def probe(batch: int, dtype: torch.dtype, device: str) -> Probe:
        return make(what, batch, dtype, device)

    return probe


class _Maker:
    """Random tensors of one dtype on one device, others at every run; results that begin as NaN."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device

    def random(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        import torch

        return torch.randn(shape, device=self.device).mul_(scale).add_(shift).to(self.dtype)

    def image(self, n: int, c: int, h: int, w: int, scale: float = 1.0) -> torch.Tensor:
        return self.random(n, h, w, c, scale=scale).permute(0, 3, 1, 2)

    def poisoned(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)

    def result(self, n: int, c: int, h: int, w: int) -> torch.Tensor:
        return self.poisoned(n, h, w, c).permute(0, 3, 1, 2)


def _stem(layer: arch.Layer, n: int, dtype: torch.dtype, device: str) -> Probe:
    import torch.nn.functional as F

    from kernels import stem

    make, cout = _Maker(dtype, device), layer.spec.cout
    x, weight = make.image(n, 3, layer.h, layer.w), make.random(cout, 3, 3, 3, scale=0.4)
    bias, out = make.random(cout, shift=2), make.result(n, cout, layer.ho, layer.wo)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = stem.reference(x, weight, bias, True)
        return want, stem.tolerance(x, weight, bias, want)

    return Probe(
        lambda: stem.stem(x, weight, bias, True, out=out),
        out,
        judge,
        lambda: F.relu6(F.conv2d(x, weight, bias, 2, 1), inplace=True),
        (x, weight, bias),
    )


def _depthwise(layer: arch.Layer, n: int, dtype: torch.dtype, device: str) -> Probe:
    import torch.nn.functional as F

    from kernels import depthwise

    make, c, stride = _Maker(dtype, device), layer.spec.cin, layer.spec.stride
    x, weight = make.image(n, c, layer.h, layer.w, 2.0), depthwise.pack_weight(make.random(c, 1, 3, 3))
    bias, out = make.random(c, shift=2), make.result(n, c, layer.ho, layer.wo)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = depthwise.reference(x, weight, bias, stride, True)
        return want, depthwise.tolerance(x, weight, bias, stride, want)

    return Probe(
        lambda: depthwise.depthwise(x, weight, bias, stride, True, out=out),
        out,
        judge,
        lambda: F.relu6(F.conv2d(x, weight, bias, stride, 1, groups=c), inplace=True),
        (x, weight, bias),
    )


def _pointwise(layer: arch.Layer, n: int, dtype: torch.dtype, device: str) -> Probe:
    import torch.nn.functional as F

    from kernels import pointwise

    make, spec = _Maker(dtype, device), layer.spec
    x = make.image(n, spec.cin, layer.h, layer.w, 2.0)
    weight, bias = (
        make.random(spec.cout, spec.cin, 1, 1, scale=spec.cin**-0.5),
        make.random(spec.cout, shift=2),
    )
    residual = make.image(n, spec.cout, layer.h, layer.w) if spec.residual else None
    out = make.result(n, spec.cout, layer.h, layer.w)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = pointwise.reference(x, weight, bias, residual, spec.relu6)
        return want, pointwise.tolerance(x, weight, bias, residual, want)

    def torchs() -> object:
        y = F.conv2d(x, weight, bias)
        y = F.relu6(y, inplace=True) if spec.relu6 else y
        return y if residual is None else y.add_(residual)

    inputs = [x, weight, bias, *([] if residual is None else [residual])]
    return Probe(
        lambda: pointwise.pointwise(x, weight, bias, residual, spec.relu6, out=out),
        out,
        judge,
        torchs,
        inputs,
    )


def _features(layer: arch.Layer, n: int, dtype: torch.dtype, device: str) -> Probe:
    import torch.nn.functional as F

    from kernels import head

    make, spec = _Maker(dtype, device), layer.spec
    x = make.image(n, spec.cin, layer.h, layer.w, 2.0)
    weight, bias = (
        make.random(spec.cout, spec.cin, 1, 1, scale=spec.cin**-0.5),
        make.random(spec.cout, shift=2),
    )
    out = make.poisoned(n, spec.cout)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = head.reference(x, weight, bias)
        return want, head.tolerance(x, weight, bias, want)

    return Probe(
        lambda: head.features(x, weight, bias, out=out),
        out,
        judge,
        lambda: F.relu6(F.conv2d(x, weight, bias), inplace=True).mean((2, 3)),
        (x, weight, bias),
    )


def _gradient_inputs(
    layer: arch.Layer, n: int, dtype: torch.dtype, device: str
) -> tuple[_Maker, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """x, weight, dy and groups of a layer."""
    from kernels.depthwise import pack_weight

    make, spec = _Maker(dtype, device), layer.spec
    groups = spec.cin if spec.kind == "depthwise" else 1
    weight = make.random(*spec.weight_shape, scale=spec.cin**-0.5 if groups == 1 else 0.4)
    weight = pack_weight(weight) if groups > 1 else weight
    x, dy = make.image(n, spec.cin, layer.h, layer.w), make.image(n, spec.cout, layer.ho, layer.wo)
    return make, x, weight, dy, groups


def _torchs_gradient(  # noqa: PLR0917
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: int, groups: int, mask: list[bool]
) -> Callable[[], object]:
    import torch

    padding = [(weight.shape[2] - 1) // 2] * 2
    fixed: tuple[Any, ...] = (None, [stride] * 2, padding, [1, 1], False, [0, 0], groups, mask)
    return lambda: torch.ops.aten.convolution_backward(dy, x, weight, *fixed)


def _input_gradient(layer: arch.Layer, n: int, dtype: torch.dtype, device: str) -> Probe:
    from kernels import depthwise_gradient, pointwise

    make, x, weight, dy, groups = _gradient_inputs(layer, n, dtype, device)
    size, stride, out = (layer.h, layer.w), layer.spec.stride, make.result(*x.shape)

    def run() -> object:
        if groups == 1:
            return pointwise.input_gradient(dy, weight, out=out)
        return depthwise_gradient.input_gradient(dy, weight, size, stride, out=out)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        if groups == 1:
            want = pointwise.reference_gradient(dy, weight)
            return want, pointwise.tolerance(dy, weight.transpose(0, 1), None, None, want)
        want = depthwise_gradient.reference_input(dy, weight, size, stride)
        sizes = depthwise_gradient.reference_input(dy.abs(), weight.abs(), size, stride)
        return want, depthwise_gradient.tolerance(want, sizes, 9, dtype)

    torchs = _torchs_gradient(dy, x, weight, stride, groups, [True, False, False])
    return Probe(run, out, judge, torchs, (dy, weight))


def _weight_gradient(layer: arch.Layer, n: int, dtype: torch.dtype, device: str) -> Probe:
    from kernels import depthwise_gradient, pointwise_gradient

    make, x, weight, dy, groups = _gradient_inputs(layer, n, dtype, device)
    stride = layer.spec.stride
    out = make.poisoned(*weight.shape) if groups == 1 else make.poisoned(3, 3, 1, groups).permute(3, 2, 0, 1)

    def run() -> object:
        if groups == 1:
            return pointwise_gradient.weight_gradient(dy, x, out=out)
        return depthwise_gradient.weight_gradient(dy, x, stride, out=out)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        if groups == 1:
            want = pointwise_gradient.reference(dy, x)
            return want, pointwise_gradient.tolerance(dy, x, want)
        want = depthwise_gradient.reference_weight(dy, x, stride)
        sizes = depthwise_gradient.reference_weight(dy.abs(), x.abs(), stride)
        return want, depthwise_gradient.tolerance(want, sizes, math.prod(dy.shape) // groups, dtype)

    torchs = _torchs_gradient(dy, x, weight, stride, groups, [False, True, False])
    return Probe(run, out, judge, torchs, (dy, x))


def _block(layers: Sequence[arch.Layer], n: int, dtype: torch.dtype, device: str) -> Probe:
    import torch
    import torch.nn.functional as F

    from kernels import inverted_residual
    from kernels.common import device_of, tiles

    make = _Maker(torch.float32, device)
    a, b, c = layers
    stem, stride, residual = a.spec.kind == "stem", b.spec.stride, c.spec.residual == 2
    weights = {
        "expand": make.random(*a.spec.weight_shape, scale=math.prod(a.spec.weight_shape[1:]) ** -0.5 * 3),
        "expand_bias": make.random(a.spec.cout, scale=2),
        "depthwise": make.random(*b.spec.weight_shape, scale=0.5),
        "depthwise_bias": make.random(b.spec.cout),
        "project": make.random(*c.spec.weight_shape, scale=c.spec.cin**-0.5),
        "project_bias": make.random(c.spec.cout),
    }
    weights = {name: t if "bias" in name else t.to(dtype).float() for name, t in weights.items()}
    table = tiles(device_of(torch.device(device))[0] if device != "cpu" else "", "block")
    slab = table["stem" if stem else f"{a.h}_s{stride}"]["slab"]
    packed = inverted_residual.pack(weights, stride, residual, dtype, slab)
    x = _Maker(dtype, device).image(n, a.spec.cin, a.h, a.w)
    out = _Maker(dtype, device).result(n, c.spec.cout, c.ho, c.wo)
    launch = inverted_residual.stem_block if stem else inverted_residual.block

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = inverted_residual.reference(x, weights, stride, residual)
        return want, inverted_residual.tolerance(x, weights, stride, residual, dtype)

    narrow = {name: t.to(dtype) for name, t in weights.items()}

    def torchs() -> object:
        w = narrow
        y = F.conv2d(x, w["expand"], w["expand_bias"], 2 if stem else 1, 1 if stem else 0)
        y = F.conv2d(
            F.relu6(y, inplace=True), w["depthwise"], w["depthwise_bias"], stride, 1, groups=b.spec.cin
        )
        y = F.conv2d(F.relu6(y, inplace=True), w["project"], w["project_bias"])
        return y.add_(x) if residual else y

    read = (packed.expand, packed.depthwise, packed.shift, packed.project, packed.out_shift)
    return Probe(lambda: launch(x, packed, out=out), out, judge, torchs, (x, *read))
