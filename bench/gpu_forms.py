"""Every kernel as a layer of the network launches it, one row each, for `bench.gpu` to check, time and tune.

A row makes a `Probe`: inputs, a poisoned result, the float64 answer with what it may be off, torch's way to
make the same, and the bytes that must move. Those of a training step are in `gpu_training_forms`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from kernels import (
    depthwise,
    depthwise_gradient,
    depthwise_project,
    head,
    inverted_residual,
    pointwise,
    pointwise_gradient,
    stem,
)
from kernels.common import Tile, arithmetic, device_of, tiles
from mnv2_fast import arch
from mnv2_fast.backends.triton import DTYPES

DEVICE = "cuda"
# The kind that is timed, which every form is checked in.
TIMED = "fp16"
NORM = ((0.0171, 0.0175, 0.0174), (-2.118, -2.036, -1.804))  # bytes to numbers, for ImageNet


@dataclasses.dataclass(frozen=True)
class Probe:
    """One call. `run` fills `out` from `x`, the images; `judge` gives the float64 answer and how far each
    element may be off.
    """

    call: Callable[[torch.Tensor, torch.Tensor], object]
    x: torch.Tensor
    out: torch.Tensor
    judge: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    eager: Callable[[], object]
    others: Sequence[torch.Tensor]

    def run(self) -> object:
        """One launch on the probe's own tensors."""
        return self.call(self.x, self.out)

    @property
    def bytes(self) -> int:
        """Of every tensor read and of the result, each once."""
        return sum(t.numel() * t.element_size() for t in (self.out, self.x, *self.others))


# What was made, its name first, the float64 answer, and how far each element may be off.
Judged = tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]
Found = Sequence[torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class StepProbe:
    """One call of a training step's kernels, which make several results in memory of their own.

    `judge` takes these. `planted`: what of the input a NaN is planted in. `bytes`: that must move.
    """

    call: Callable[[], Found]
    judge: Callable[[Found], Iterator[Judged]]
    planted: torch.Tensor
    eager: Callable[[], object]
    bytes: int

    def run(self) -> Found:
        """One call."""
        return self.call()


class Make(Protocol):
    """Makes a probe of a batch; kind: of `DTYPES`; tile: of the kernel's table, or None for its launcher's
    own choice.
    """

    def __call__(self, batch: int, kind: str, tile: Tile | None = None) -> Probe | StepProbe: ...


@dataclasses.dataclass(frozen=True)
class Form:
    """A kernel on a layer's shape, `count` times in the network.

    `table` and `rows` are of the tile table, "{}" being the arithmetic; `shape` names rows of this shape's
    own. `among`: the kinds that it is wanted in. `spreads`: NaN in an image is seen in that image alone.
    `variant`: what its kernel has branches for; None where other forms launch its kernels.
    """

    name: str
    layer: str
    size: int
    macs: int
    count: int
    make: Make
    table: str = ""
    rows: tuple[str, ...] = ("{}",)
    shape: str = ""
    multiplies: bool = True  # matrices, which TF32 is for
    whole_block: bool = False
    spreads: bool = True
    among: tuple[str, ...] = tuple(DTYPES)
    variant: str | None = ""

    def __str__(self) -> str:
        return f"{self.name} {self.layer} at {self.size}"

    def kinds(self) -> list[str]:
        """The kinds of `DTYPES` that the kernel has."""
        if self.whole_block:
            return ["fp16", "bf16"]
        return [kind for kind in self.among if kind != "tf32" or self.multiplies]

    def tiles(self, kind: str) -> dict[str, Tile | None]:
        """The tiles that its launcher chooses from on this GPU, each by its row of the table."""
        if not self.table:
            return {"as it is": None}
        table = tiles(device_of(torch.device(DEVICE))[0], self.table)
        found: dict[str, Tile | None] = {}
        for row in (row.format(arithmetic(*DTYPES[kind])) for row in self.rows):
            tile = table.get(f"{row}_{self.shape}", table[row])
            found[row] = {**tile, "used": 1} if "used" in tile else tile
            if tile.get("images", 1) > 1:
                found[f"{row}, one image"] = {**tile, "images": 1}
        return found


def forms(layers: Sequence[arch.Layer] | None = None) -> list[Form]:
    """Every kernel of every distinct layer, in the network's order."""
    return merged(_all(arch.layers() if layers is None else layers))


def merged(many: Iterable[Form]) -> list[Form]:
    """Each form once, with how often it occurs."""
    found: dict[str, Form] = {}
    for form in many:
        before = found.get(str(form))
        found[str(form)] = dataclasses.replace(form, count=before.count + 1) if before else form
    return list(found.values())


def has_blocks() -> bool:
    """Whether this GPU has whole blocks, which are for sm_90, and which no interpreter runs."""
    return DEVICE == "cuda" and torch.cuda.get_device_capability() == inverted_residual.CAPABILITY


def usable(form: Form) -> bool:
    """Whether this GPU has the kernel."""
    return not form.whole_block or has_blocks()


SIZES = ("large", "small")
OF_PRODUCTS = ("large_{}", "small_{}")


def _all(layers: Sequence[arch.Layer]) -> Iterator[Form]:
    for i, layer in enumerate(layers):
        spec, (cin, cout, stride) = layer.spec, (layer.spec.cin, layer.spec.cout, layer.spec.stride)
        facts = f"{cin} to {cout} s{stride}", layer.h, layer.macs, 1
        by_stride = tuple(f"{size}_s{stride}" for size in SIZES)
        if i + 1 < len(layers) and layers[i + 1].spec.kind == "linear":
            yield Form("features", *facts, _with(_features, layer), "head")
        elif spec.kind == "stem":
            yield Form("stem", *facts, _with(_stem, layer), "stem")
            yield Form("stem of bytes", *facts, _with(_stem, layer, True), "stem")
        elif spec.kind in ("pointwise", "linear"):
            name, made = "classifier" if spec.kind == "linear" else spec.kind, _with(_pointwise, layer)
            of = "relu6" if spec.relu6 else "residual" if spec.residual else ""
            yield Form(name, *facts, made, "pointwise", OF_PRODUCTS, f"{cin}x{cout}", variant=of)
        elif spec.kind == "depthwise":
            made = _with(_depthwise, layer)
            yield Form("depthwise", *facts, made, "depthwise", by_stride, multiplies=False)
        if spec.kind == "pointwise":
            made, shape = _with(_input_gradient, layer), f"{cout}x{cin}"
            yield Form("pointwise input gradient", *facts, made, "pointwise", OF_PRODUCTS, shape)
            made = _with(_weight_gradient, layer)
            yield Form("pointwise weight gradient", *facts, made, "pointwise_gradient", spreads=False)
        if spec.kind == "depthwise":
            made = _with(_input_gradient, layer)
            table, rows = ("depthwise", by_stride) if stride == 1 else ("depthwise_input_s2", SIZES)
            yield Form("depthwise input gradient", *facts, made, table, rows, multiplies=False)
            made, rows = _with(_weight_gradient, layer), (f"s{stride}",)
            named = "depthwise weight gradient"
            yield Form(named, *facts, made, "depthwise_weight", rows, multiplies=False, spreads=False)
        yield from _pair(layers[i : i + 2])
        yield from _whole(layers[i : i + 3])


def _pair(pair: Sequence[arch.Layer]) -> Iterator[Form]:
    """A depthwise layer and the linear one behind it: in one launch, and in the two that this replaces."""
    if [(layer.spec.kind, layer.spec.relu6) for layer in pair] != [("depthwise", True), ("pointwise", False)]:
        return
    a, b = pair
    words = f"{a.spec.cin} to {b.spec.cout} s{a.spec.stride}{', residual' if b.spec.residual else ''}"
    facts, shape = (words, a.h, a.macs + b.macs, 1), f"{a.spec.cin}x{b.spec.cout}"
    made, of = _with(_projected, pair), "residual" if b.spec.residual else ""
    table = "depthwise_project"
    yield Form("depthwise with project", *facts, made, table, OF_PRODUCTS, shape, variant=of)
    yield Form("depthwise, then project", *facts, _with(_projected, pair, True), variant=None)


def _whole(block: Sequence[arch.Layer]) -> Iterator[Form]:
    """The launch that makes three layers at once, where it has a geometry for them."""
    kinds = [layer.spec.kind for layer in block]
    if kinds[1:] != ["depthwise", "pointwise"] or not block[0].spec.relu6:
        return
    (a, b, c), stride = block, block[1].spec.stride
    row = "stem" if a.spec.kind == "stem" else f"{a.h}_s{stride}"
    if (b.h if row == "stem" else a.h, stride) not in _maps(row):
        return
    macs = sum(layer.macs for layer in block)
    facts = f"{a.spec.cin} to {c.spec.cin} to {c.spec.cout} s{stride}", a.h, macs, 1
    of = "residual" if c.spec.residual else ""
    yield Form("block", *facts, _with(_block, block), "block", (row,), whole_block=True, variant=of)
    if row == "stem":
        yield Form("block of bytes", *facts, _with(_block, block, True), "block", (row,), whole_block=True)


def _maps(row: str) -> Sequence[tuple[int, int]]:
    """Size and stride of the maps that whole blocks are made of."""
    stems = [(inverted_residual.STEM_SIZE, 1)]
    return stems if row == "stem" else list(inverted_residual.GEOMETRIES)


def _with(make: Callable[..., Probe], *what: object) -> Make:
    def probe(batch: int, kind: str, tile: Tile | None = None) -> Probe:
        return make(*what, n=batch, kind=kind, tile=tile)

    return probe


class Maker:
    """Random tensors of one kind on the device, others at every run; results that begin as NaN."""

    def __init__(self, kind: str) -> None:
        self.dtype, self.tf32 = DTYPES[kind]

    def random(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE).mul_(scale).add_(shift).to(self.dtype)

    def image(self, n: int, c: int, h: int, w: int, scale: float = 1.0) -> torch.Tensor:
        return self.random(n, h, w, c, scale=scale).permute(0, 3, 1, 2)

    def photos(self, n: int, h: int, w: int, from_bytes: bool) -> torch.Tensor:
        if not from_bytes:
            return self.image(n, 3, h, w)
        return torch.randint(0, 256, (n, h, w, 3), dtype=torch.uint8, device=DEVICE).permute(0, 3, 1, 2)

    def poisoned(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=self.dtype, device=DEVICE)

    def result(self, n: int, c: int, h: int, w: int) -> torch.Tensor:
        return self.poisoned(n, h, w, c).permute(0, 3, 1, 2)


def _stem(layer: arch.Layer, from_bytes: bool = False, *, n: int, kind: str, tile: Tile | None) -> Probe:
    make, cout = Maker(kind), layer.spec.cout
    x, weight = make.photos(n, layer.h, layer.w, from_bytes), make.random(cout, 3, 3, 3, scale=0.4)
    bias, out = make.random(cout, shift=2), make.result(n, cout, layer.ho, layer.wo)
    norm = torch.tensor(NORM, device=DEVICE) if from_bytes else None

    def call(x: torch.Tensor, out: torch.Tensor) -> object:
        return stem.stem(x, weight, bias, True, norm=norm, out=out, tf32=make.tf32, tile=tile)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = stem.reference(x, weight, bias, True, norm)
        return want, stem.tolerance(x, weight, bias, want, norm, make.tf32)

    def torchs() -> object:
        y = x if norm is None else (x * norm[0].view(3, 1, 1) + norm[1].view(3, 1, 1)).to(make.dtype)
        return F.relu6(F.conv2d(y, weight, bias, 2, 1), inplace=True)

    return Probe(call, x, out, judge, torchs, (weight, bias))


def _depthwise(layer: arch.Layer, *, n: int, kind: str, tile: Tile | None) -> Probe:
    make, c, stride = Maker(kind), layer.spec.cin, layer.spec.stride
    x, weight = make.image(n, c, layer.h, layer.w, 2.0), depthwise.pack_weight(make.random(c, 1, 3, 3))
    bias, out = make.random(c, shift=2), make.result(n, c, layer.ho, layer.wo)

    def call(x: torch.Tensor, out: torch.Tensor) -> object:
        return depthwise.depthwise(x, weight, bias, stride, True, out=out, tile=tile)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = depthwise.reference(x, weight, bias, stride, True)
        return want, depthwise.tolerance(x, weight, bias, stride, want)

    def torchs() -> object:
        return F.relu6(F.conv2d(x, weight, bias, stride, 1, groups=c), inplace=True)

    return Probe(call, x, out, judge, torchs, (weight, bias))


def _product(make: Maker, spec: arch.LayerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a 1x1 convolution."""
    weight = make.random(spec.cout, spec.cin, 1, 1, scale=spec.cin**-0.5)
    return weight, make.random(spec.cout, shift=2)


def _pointwise(layer: arch.Layer, *, n: int, kind: str, tile: Tile | None) -> Probe:
    make, spec = Maker(kind), layer.spec
    weight, bias = _product(make, spec)
    x = make.image(n, spec.cin, layer.ho, layer.wo, 2.0)
    residual = make.image(n, spec.cout, layer.ho, layer.wo) if spec.residual else None
    out = make.result(n, spec.cout, layer.ho, layer.wo)

    def call(x: torch.Tensor, out: torch.Tensor) -> object:
        return pointwise.pointwise(x, weight, bias, residual, spec.relu6, out=out, tf32=make.tf32, tile=tile)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = pointwise.reference(x, weight, bias, residual, spec.relu6)
        return want, pointwise.tolerance(x, weight, bias, residual, want, make.tf32)

    def torchs() -> object:
        y = F.conv2d(x, weight, bias)
        y = F.relu6(y, inplace=True) if spec.relu6 else y
        return y if residual is None else y.add_(residual)

    return Probe(call, x, out, judge, torchs, [weight, bias, *([] if residual is None else [residual])])


def _projected(
    pair: Sequence[arch.Layer], apart: bool = False, *, n: int, kind: str, tile: Tile | None
) -> Probe:
    """`apart`: in two launches, which a tile that is not `used` stands for, too."""
    make, (a, b) = Maker(kind), (layer.spec for layer in pair)
    (h, w), (ho, wo) = ((layer.h, layer.w) for layer in pair)
    spread = depthwise.pack_weight(make.random(a.cin, 1, 3, 3, scale=0.4)), make.random(a.cin, shift=2)
    project = _product(make, b)
    x, out = make.image(n, a.cin, h, w, 2.0), make.result(n, b.cout, ho, wo)
    residual = make.image(n, b.cout, ho, wo) if b.residual else None
    call_of = x, spread, project, a.stride, residual
    apart = apart or (tile is not None and not tile["used"])

    def call(x: torch.Tensor, out: torch.Tensor) -> object:
        if apart:
            y = depthwise.depthwise(x, *spread, a.stride, True)
            return pointwise.pointwise(y, *project, residual, out=out, tf32=make.tf32)
        return depthwise_project.depthwise_project(x, *call_of[1:], out=out, tf32=make.tf32, tile=tile)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = depthwise_project.reference(*call_of)
        return want, depthwise_project.tolerance(*call_of, want, make.tf32)

    def torchs() -> object:
        y = F.relu6(F.conv2d(x, *spread, a.stride, 1, groups=a.cin), inplace=True)
        y = F.conv2d(y, *project)
        return y if residual is None else y.add_(residual)

    return Probe(call, x, out, judge, torchs, [*spread, *project, *([] if residual is None else [residual])])


def _features(layer: arch.Layer, *, n: int, kind: str, tile: Tile | None) -> Probe:
    make, spec = Maker(kind), layer.spec
    weight, bias = _product(make, spec)
    x, out = make.image(n, spec.cin, layer.h, layer.w, 2.0), make.poisoned(n, spec.cout)

    def call(x: torch.Tensor, out: torch.Tensor) -> object:
        return head.features(x, weight, bias, out=out, tf32=make.tf32, tile=tile)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = head.reference(x, weight, bias)
        return want, head.tolerance(x, weight, bias, want, make.tf32)

    def torchs() -> object:
        return F.relu6(F.conv2d(x, weight, bias), inplace=True).mean((2, 3))

    return Probe(call, x, out, judge, torchs, (weight, bias))


def _gradient_inputs(
    layer: arch.Layer, n: int, make: Maker
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """x, weight, dy and groups of a layer."""
    spec = layer.spec
    groups = spec.cin if spec.kind == "depthwise" else 1
    weight = make.random(*spec.weight_shape, scale=spec.cin**-0.5 if groups == 1 else 0.4)
    weight = depthwise.pack_weight(weight) if groups > 1 else weight
    x, dy = make.image(n, spec.cin, layer.h, layer.w), make.image(n, spec.cout, layer.ho, layer.wo)
    return x, weight, dy, groups


def _torchs_gradient(  # noqa: PLR0917
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: int, groups: int, mask: list[bool]
) -> Callable[[], object]:
    padding = [(weight.shape[2] - 1) // 2] * 2
    fixed: tuple[Any, ...] = (None, [stride] * 2, padding, [1, 1], False, [0, 0], groups, mask)
    return lambda: torch.ops.aten.convolution_backward(dy, x, weight, *fixed)


def _input_gradient(layer: arch.Layer, *, n: int, kind: str, tile: Tile | None) -> Probe:
    make = Maker(kind)
    x, weight, dy, groups = _gradient_inputs(layer, n, make)
    size, stride, out = (layer.h, layer.w), layer.spec.stride, make.result(*x.shape)

    def call(dy: torch.Tensor, out: torch.Tensor) -> object:
        if groups == 1:
            return pointwise.input_gradient(dy, weight, out=out, tf32=make.tf32, tile=tile)
        return depthwise_gradient.input_gradient(dy, weight, size, stride, out=out, tile=tile)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        if groups == 1:
            want = pointwise.reference_gradient(dy, weight)
            return want, pointwise.tolerance(dy, weight.transpose(0, 1), None, None, want, make.tf32)
        want = depthwise_gradient.reference_input(dy, weight, size, stride)
        sizes = depthwise_gradient.reference_input(dy.abs(), weight.abs(), size, stride)
        return want, depthwise_gradient.tolerance(want, sizes, 9, make.dtype)

    torchs = _torchs_gradient(dy, x, weight, stride, groups, [True, False, False])
    return Probe(call, dy, out, judge, torchs, (weight,))


def _weight_gradient(layer: arch.Layer, *, n: int, kind: str, tile: Tile | None) -> Probe:
    make = Maker(kind)
    x, weight, dy, groups = _gradient_inputs(layer, n, make)
    stride = layer.spec.stride
    out = make.poisoned(*weight.shape) if groups == 1 else make.poisoned(3, 3, 1, groups).permute(3, 2, 0, 1)

    def call(dy: torch.Tensor, out: torch.Tensor) -> object:
        if groups == 1:
            return pointwise_gradient.weight_gradient(dy, x, out=out, tf32=make.tf32, tile=tile)
        return depthwise_gradient.weight_gradient(dy, x, stride, out=out, tile=tile)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        if groups == 1:
            want = pointwise_gradient.reference(dy, x)
            return want, pointwise_gradient.tolerance(dy, x, want, make.tf32)
        want = depthwise_gradient.reference_weight(dy, x, stride)
        sizes = depthwise_gradient.reference_weight(dy.abs(), x.abs(), stride)
        return want, depthwise_gradient.tolerance(want, sizes, math.prod(dy.shape) // groups, make.dtype)

    torchs = _torchs_gradient(dy, x, weight, stride, groups, [False, True, False])
    return Probe(call, dy, out, judge, torchs, (x,))


def _block_weights(layers: Sequence[arch.Layer], kind: str) -> dict[str, torch.Tensor]:
    """Of float32, that the kind's dtype holds, biases aside; about half of what is hidden is clamped."""
    make, (a, b, c) = Maker("fp32"), (layer.spec for layer in layers)
    weights = {
        "expand": make.random(*a.weight_shape, scale=math.prod(a.weight_shape[1:]) ** -0.5 * 3),
        "expand_bias": make.random(a.cout, scale=2),
        "depthwise": make.random(*b.weight_shape, scale=0.5),
        "depthwise_bias": make.random(b.cout),
        "project": make.random(*c.weight_shape, scale=c.cin**-0.5),
        "project_bias": make.random(c.cout),
    }
    return {name: t if "bias" in name else t.to(DTYPES[kind][0]).float() for name, t in weights.items()}


def _block(
    layers: Sequence[arch.Layer], from_bytes: bool = False, *, n: int, kind: str, tile: Tile | None
) -> Probe:
    make, (a, b, c) = Maker(kind), layers
    of_stem, stride, residual = a.spec.kind == "stem", b.spec.stride, c.spec.residual == 2
    weights = _block_weights(layers, kind)
    if tile is None:
        table = tiles(device_of(torch.device(DEVICE))[0], "block")
        tile = table["stem" if of_stem else f"{a.h}_s{stride}"]
    packed = inverted_residual.pack(weights, stride, residual, make.dtype, tile["slab"])
    out = make.result(n, c.spec.cout, c.ho, c.wo)
    x = make.photos(n, a.h, a.w, from_bytes) if of_stem else make.image(n, a.spec.cin, a.h, a.w)
    norm = torch.tensor(NORM, device=DEVICE) if from_bytes else None

    def seen() -> torch.Tensor:
        """What the expansion gets: photos as numbers."""
        return x if norm is None else x * norm[0].view(3, 1, 1) + norm[1].view(3, 1, 1)

    def call(x: torch.Tensor, out: torch.Tensor) -> object:
        if of_stem:
            return inverted_residual.stem_block(x, packed, norm=norm, out=out, tile=tile)
        return inverted_residual.block(x, packed, out=out, tile=tile)

    def judge() -> tuple[torch.Tensor, torch.Tensor]:
        want = inverted_residual.reference(seen(), weights, stride, residual)
        return want, inverted_residual.tolerance(seen(), weights, stride, residual, make.dtype)

    narrow: Mapping[str, torch.Tensor] = {name: t.to(make.dtype) for name, t in weights.items()}

    def torchs() -> object:
        w = narrow
        y = F.conv2d(
            seen().to(make.dtype), w["expand"], w["expand_bias"], 2 if of_stem else 1, 1 if of_stem else 0
        )
        y = F.conv2d(
            F.relu6(y, inplace=True), w["depthwise"], w["depthwise_bias"], stride, 1, groups=b.spec.cin
        )
        y = F.conv2d(F.relu6(y, inplace=True), w["project"], w["project_bias"])
        return y.add_(x) if residual else y

    read = (packed.expand, packed.depthwise, packed.shift, packed.project, packed.out_shift)
    return Probe(call, x, out, judge, torchs, read)
