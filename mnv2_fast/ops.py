"""OPS: one row per operator of the `mnv2` namespace. Registration, tests and benchmarks iterate the rows.

A row says what an operator takes (schema), the shape of its answer (fake), what it should answer (the float64
reference), on what to try it (samples) and what it costs (flops, bytes). Weights have batch norm folded in
and x's dtype; x is [N, C, H, W] of any strides; images in answers are channels_last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import env, packs
from .arch import LayerSpec, inverted_residual
from .backends import chains, cpu, eager, triton
from .chain import Chain, Link
from .errors import UserError

Args = tuple[Any, ...]
Shape = tuple[int, ...]

# Channels, sizes and batches around every tile's edge.
CHANNELS = (1, 3, 8, 15, 16, 17, 24, 33, 144)
SIZES = (1, 2, 7, 8, 15)
BATCHES = (0, 1, 3)


class ShapeError(UserError, RuntimeError):
    """Tensors that do not fit each other. Both of the classes that torch raises for them."""


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeError(message)


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor, shape: Sequence[int]) -> None:
    """Refuse tensors that kernels would read past."""
    _need(x.dim() == 4, f"mnv2::{name}: x has {x.dim()} dimensions, not 4 [N, C, H, W]")
    _need(
        tuple(weight.shape) == tuple(shape),
        f"mnv2::{name}: weight {list(weight.shape)} does not fit x {list(x.shape)}: expected {list(shape)}",
    )
    _need(bias.shape == weight.shape[:1], f"mnv2::{name}: bias {list(bias.shape)}, not [{weight.shape[0]}]")
    _need(
        x.shape[2] > 0 and x.shape[3] > 0, f"mnv2::{name}: H and W must be at least 1, x is {list(x.shape)}"
    )
    _need(
        x.dtype == weight.dtype == bias.dtype,
        f"mnv2::{name}: x, weight and bias are {x.dtype}, {weight.dtype} and {bias.dtype}, not one dtype",
    )


def _image(x: Tensor, channels: int, stride: int) -> Shape:
    n, _, h, w = x.shape
    return n, channels, (h - 1) // stride + 1, (w - 1) // stride + 1


def _stem_shape(x: Tensor, weight: Tensor, bias: Tensor, relu6: bool) -> Shape:
    _check("stem", x, weight, bias, (weight.shape[0], 3, 3, 3))
    _need(x.shape[1] == 3, f"mnv2::stem: x has {x.shape[1]} channels, not 3")
    return _image(x, weight.shape[0], 2)


def _depthwise_shape(x: Tensor, weight: Tensor, bias: Tensor, stride: int, relu6: bool) -> Shape:
    _need(x.dim() == 4, f"mnv2::depthwise: x has {x.dim()} dimensions, not 4 [N, C, H, W]")
    _check("depthwise", x, weight, bias, (x.shape[1], 1, 3, 3))
    _need(stride in (1, 2), f"mnv2::depthwise: stride is {stride}, not 1 or 2")
    return _image(x, x.shape[1], stride)


def _pointwise_shape(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu6: bool) -> Shape:
    _need(x.dim() == 4, f"mnv2::pointwise: x has {x.dim()} dimensions, not 4 [N, C, H, W]")
    _check("pointwise", x, weight, bias, (weight.shape[0], x.shape[1], 1, 1))
    y = _image(x, weight.shape[0], 1)
    if residual is not None:
        _need(
            tuple(residual.shape) == y and residual.dtype == x.dtype,
            f"mnv2::pointwise: residual is {list(residual.shape)} {residual.dtype}, not {list(y)} {x.dtype}",
        )
    return y


def _head_shape(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Shape:
    _need(x.dim() == 4, f"mnv2::head: x has {x.dim()} dimensions, not 4 [N, C, H, W]")
    _check("head", x, w1, b1, (w1.shape[0], x.shape[1], 1, 1))
    _need(
        w2.shape == (w2.shape[0], w1.shape[0]) and b2.shape == w2.shape[:1],
        f"mnv2::head: {list(w2.shape)} and {list(b2.shape)} do not fit {w1.shape[0]} features",
    )
    _need(
        x.dtype == w2.dtype == b2.dtype,
        f"mnv2::head: x, w2 and b2 are {x.dtype}, {w2.dtype} and {b2.dtype}, not one dtype",
    )
    return x.shape[0], w2.shape[0]


def _network_shape(x: Tensor, tensors: Sequence[Tensor], spec: str) -> Shape:
    chain = Chain.decode(spec)
    _need(x.dim() == 4, f"mnv2::network: x has {x.dim()} dimensions, not 4 [N, C, H, W]")
    _need(len(tensors) == chain.count, f"mnv2::network: {len(tensors)} tensors, the spec names {chain.count}")
    _need(
        x.shape[1] == chain.links[0].spec.cin,
        f"mnv2::network: expected {chain.links[0].spec.cin} channels, but got {x.shape[1]} channels instead",
    )
    _need(
        x.shape[2] > 0 and x.shape[3] > 0, f"mnv2::network: H and W must be at least 1, x is {list(x.shape)}"
    )
    return chain.output_shape(x.shape)


@dataclass(frozen=True)
class Op:
    """One operator.

    `schema`: its arguments and result as torch.library writes them. `shape(*args)`: of the result; refuses
    what does not fit. `samples(channels, sizes, batches)`: float32 arguments to try it on. `macs(*args)`:
    multiply-accumulates.
    """

    name: str
    schema: str
    shape: Callable[..., Shape]
    samples: Callable[..., Iterator[Args]]
    macs: Callable[..., int]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each argument is: "tensor", "tensors" or "" for any other."""
        kinds = {"Tensor": "tensor", "Tensor?": "tensor", "Tensor[]": "tensors"}
        return tuple(
            kinds.get(argument.split()[0], "") for argument in self.schema[1:].split(")")[0].split(", ")
        )

    def fake(self, *args: Any) -> Tensor:
        """An empty result."""
        x, shape = args[0], self.shape(*args)
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    def eager(self, *args: Any) -> Tensor:
        """The answer in plain torch."""
        result: Tensor = getattr(eager, self.name)(*args)
        return result

    def reference(self, *args: Any) -> Tensor:
        """The answer in float64, contiguous."""
        return self.eager(*map_tensors(lambda t: t.double(), args)).contiguous()

    def flops(self, *args: Any) -> int:
        """Floating-point operations of the products and sums."""
        return 2 * self.macs(*args)

    def bytes(self, *args: Any) -> int:
        """Bytes of every tensor read and of the result, each counted once."""
        tensors: list[Tensor] = [self.fake(*args)]
        map_tensors(lambda t: tensors.append(t) or t, args)  # type: ignore[func-returns-value]
        return sum(t.numel() * t.element_size() for t in tensors)

    def tolerance(self, *args: Any) -> Tensor:
        """Largest error allowed at each element of the result, float64.

        Twice the largest error that torch itself makes in the arguments' dtype, in the worse of its two
        layouts, plus 4 eps (|x| conv |w| + |b|), without which tiny shapes would fail kernels that are right.
        """
        expected = self.reference(*args)
        torch_error = 0.0
        for layout in (torch.contiguous_format, torch.channels_last):
            y = self.eager(args[0].contiguous(memory_format=layout), *args[1:]).double()
            finite = torch.isfinite(expected) & torch.isfinite(y)
            torch_error = max(torch_error, float((y - expected).abs()[finite].max()) if finite.any() else 0.0)
        size = self.reference(*map_tensors(lambda t: t.abs(), _without_relu6(self, args))).abs()
        return 2 * torch_error + 4 * torch.finfo(args[0].dtype).eps * size


def map_tensors(function: Callable[[Tensor], Tensor], args: Args) -> Args:
    """`args` with every tensor, also those in lists, replaced by `function` of it."""
    return tuple(
        function(a) if isinstance(a, Tensor) else [function(t) for t in a] if isinstance(a, list) else a
        for a in args
    )


def _without_relu6(op: Op, args: Args) -> Args:
    names = [argument.name for argument in getattr(torch.ops.mnv2, op.name).default._schema.arguments]
    return tuple(False if name == "relu6" else a for name, a in zip(names, args, strict=False))


def _tensor(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator) * scale


def _sizes(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Every size square, and each once beside its neighbour."""
    for h, w in zip(sizes, [*sizes[1:], sizes[0]], strict=True):
        yield h, h
        if h != w:
            yield h, w


Grid = tuple[Sequence[int], Sequence[int], Sequence[int]]


def _images(channels: Sequence[int], sizes: Sequence[int], batches: Sequence[int]) -> Iterator[Tensor]:
    """Inputs over the grid, in turn contiguous, channels_last and cut out of a larger tensor."""
    for i, (c, (h, w), n) in enumerate(itertools.product(channels, _sizes(sizes), batches)):
        x = _tensor(n, c, h, w, scale=2.0, seed=i)
        if i % 3 == 1:
            x = x.contiguous(memory_format=torch.channels_last)
        elif i % 3 == 2:
            wide = _tensor(n, c + 1, h + 2, 2 * w + 1, scale=2.0, seed=i)
            x = wide[:, 1:, 1 : h + 1, 1::2]
        yield x


def _other(c: int) -> int:
    """An output channel count for an input channel count: the next one of the list."""
    return CHANNELS[(CHANNELS.index(c) + 1) % len(CHANNELS)] if c in CHANNELS else c + 1


def _stem_samples(*grid: Any) -> Iterator[Args]:
    channels, sizes, batches = grid or (CHANNELS, SIZES, BATCHES)
    for i, (x, c) in enumerate(itertools.product(_images((3,), sizes, batches), channels)):
        yield x, _tensor(c, 3, 3, 3, scale=0.5), _tensor(c), i % 2 == 0


def _depthwise_samples(*grid: Any) -> Iterator[Args]:
    for i, (x, stride) in enumerate(
        itertools.product(_images(*(grid or (CHANNELS, SIZES, BATCHES))), (1, 2))
    ):
        c = x.shape[1]
        yield x, _tensor(c, 1, 3, 3), _tensor(c), stride, i // 2 % 2 == 0


def _pointwise_samples(*grid: Any) -> Iterator[Args]:
    for i, x in enumerate(_images(*(grid or (CHANNELS, SIZES, BATCHES)))):
        n, c, h, w = x.shape
        cout = _other(c)
        residual = _tensor(n, cout, h, w, seed=1) if i % 2 else None
        yield x, _tensor(cout, c, 1, 1, scale=c**-0.5), _tensor(cout), residual, i % 4 < 2


def _head_samples(*grid: Any) -> Iterator[Args]:
    for x in _images(*(grid or (CHANNELS, SIZES, BATCHES))):
        c = x.shape[1]
        mid, classes = _other(c), _other(_other(c))
        w1, w2 = _tensor(mid, c, 1, 1, scale=c**-0.5), _tensor(classes, mid, scale=mid**-0.5)
        yield x, w1, _tensor(mid), w2, _tensor(classes)


def chain_tensors(chain: Chain) -> list[Tensor]:
    """Plausible tensors for a chain: weights, batch norms away from the identity."""
    shapes = {"weight": lambda spec: spec.weight_shape}
    tensors = []
    for seed, link in enumerate(chain.links):
        for name in link.names:
            shape = shapes.get(name, lambda spec: (spec.cout,))(link.spec)
            fan = link.spec.cin if link.spec.kind in ("pointwise", "linear") else 9
            t = _tensor(*shape, scale=(2 / fan) ** 0.5 if name == "weight" else 0.2, seed=seed)
            tensors.append(t.abs() + 0.5 if name in ("running_var", "norm_weight") else t)
    return tensors


def small_network(channels: int = 8, classes: int = 5) -> Chain:
    """A network with every kind of layer and a residual, small enough to try."""
    specs = [LayerSpec("stem", "stem", "", 3, channels, 2, True)]
    specs += inverted_residual("block1", channels, channels, 1, 1)
    specs += inverted_residual("block2", channels, 2 * channels + 1, 2, 3)
    specs += inverted_residual("block3", 2 * channels + 1, 2 * channels + 1, 1, 2)
    specs.append(LayerSpec("pointwise", "last", "", 2 * channels + 1, 3 * channels, 1, True))
    links = [Link(spec) for spec in specs]
    linear = LayerSpec("linear", "classifier", "", 3 * channels, classes)
    return Chain((*links, Link(linear, bias=True, norm=False, affine=False)))


def _network_samples(*grid: Any) -> Iterator[Args]:
    channels, sizes, batches = grid or ((3, 8, 17), SIZES, BATCHES)
    for i, (c, x) in enumerate(itertools.product(channels, _images((3,), sizes, batches))):
        chain = small_network(c, classes=5 if i % 2 else 1)
        if i % 4 == 3:
            chain = Chain(chain.links[:-1], pool=True)
        yield x, chain_tensors(chain), chain.encode()


def _network_macs(x: Tensor, tensors: Sequence[Tensor], spec: str) -> int:
    macs, (n, _, h, w) = 0, x.shape
    for link in Chain.decode(spec).links:
        h, w = (h - 1) // link.spec.stride + 1, (w - 1) // link.spec.stride + 1
        weights = link.spec.weight_shape
        macs += n * (1 if link.spec.kind == "linear" else h * w) * int(torch.Size(weights).numel())
    return macs


def _conv_macs(shape: Callable[..., Shape]) -> Callable[..., int]:
    def macs(x: Tensor, weight: Tensor, *rest: Any) -> int:
        n, _, h, w = shape(x, weight, *rest)
        return n * h * w * weight.numel()

    return macs


def _head_macs(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> int:
    n, _, h, w = x.shape
    return n * h * w * w1.numel() + n * w2.numel()


OPS: tuple[Op, ...] = (
    Op(
        "stem",
        "(Tensor x, Tensor weight, Tensor bias, bool relu6) -> Tensor",
        _stem_shape,
        _stem_samples,
        _conv_macs(_stem_shape),
    ),
    Op(
        "depthwise",
        "(Tensor x, Tensor weight, Tensor bias, int stride, bool relu6) -> Tensor",
        _depthwise_shape,
        _depthwise_samples,
        _conv_macs(_depthwise_shape),
    ),
    Op(
        "pointwise",
        "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, bool relu6) -> Tensor",
        _pointwise_shape,
        _pointwise_samples,
        _conv_macs(_pointwise_shape),
    ),
    Op(
        "head",
        "(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor",
        _head_shape,
        _head_samples,
        _head_macs,
    ),
    Op(
        "network",
        "(Tensor x, Tensor[] tensors, str spec) -> Tensor",
        _network_shape,
        _network_samples,
        _network_macs,
    ),
)


def backend_of(op: str, *args: Any) -> tuple[Any, str]:
    """The backend that serves a call, and why the kernels decline it ("" where they serve)."""
    kernels = triton if args[0].device.type == "cuda" else cpu
    reason = kernels.declines(op, *args)
    return (kernels, "") if reason is None else (eager, reason)


def _serve(op: Op) -> Callable[..., Tensor]:
    def impl(*args: Any) -> Tensor:
        op.shape(*args)
        result: Tensor = getattr(backend_of(op.name, *args)[0], op.name)(*args)
        return result

    return impl


def _serve_network(x: Tensor, tensors: list[Tensor], spec: str) -> Tensor:
    shape = _network_shape(x, tensors, spec)
    if network_declines(x, tensors, spec) is None:
        return packs.lookup(spec, tensors).run(x)
    result = eager.network(x, tensors, spec)
    return result if len(shape) == 2 else eager.channels_last(result)


def network_declines(x: Tensor, tensors: Sequence[Tensor], spec: str) -> str | None:
    """Why the kernels do not serve a whole network's call, or None."""
    kernels = chains.KERNELS.get(x.device.type)
    if kernels is None:
        return f"the input is on {x.device}, the kernels are on {' and '.join(chains.KERNELS)}"
    if reason := kernels.unavailable() or kernels.declines(x.device, env.backend()):
        return reason
    for t in (x, *tensors):
        if t.dtype not in kernels.dtypes or t.layout != torch.strided or t.is_neg():
            return f"a tensor is {t.dtype}, {t.layout}: the kernels take {kernels.names}"
        if t.dtype != x.dtype or t.device != x.device:
            return f"the input is {x.dtype} on {x.device}, a tensor {t.dtype} on {t.device}"
    if not kernels.samples and any(t.is_inference() for t in tensors):
        return chains.UNSEEN
    return kernels.declines_chain(Chain.decode(spec), x.device)


library = torch.library.Library("mnv2", "DEF")


def _register() -> None:
    for op in OPS:
        library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        impl = _serve_network if op.name == "network" else _serve(op)
        for key in ("CPU", "CUDA"):
            library.impl(op.name, impl, key)
        torch.library.register_fake(f"mnv2::{op.name}", op.fake, lib=library)


_register()
