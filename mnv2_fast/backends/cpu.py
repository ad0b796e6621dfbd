"""The operators on `_C`, our C++ kernels: float32 and bfloat16 tensors on the CPU.

Every function takes and returns what its operator in `ops` does; `declines` says which calls are not for it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import env, machine
from ..arch import LayerSpec
from ..chain import weight_dtype
from ..errors import UserError
from ..int8 import NOT_FINITE, QuantizedNetwork

OPERATORS = ("stem", "depthwise", "pointwise", "head")

log = logging.getLogger("mnv2_fast")
Served = TypeVar("Served")  # what a call of the extension gives

_MODULE = "mnv2_fast._C"

# Of the tensors that the operators take, and what a network of them is called.
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
DTYPE_NAMES = " or ".join(map(str, DTYPES))

# 32-bit sizes in the kernels' interface; a tensor past them is for eager.
_MAX_SIZE = 2**31 - 1


@functools.cache
def _load() -> tuple[types.ModuleType | None, str]:
    """The extension, or None and the reason why it is not there."""
    try:
        # After torch: whichever OpenMP runtime torch brought is the one the extension then finds.
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        return (
            None,
            f"the extension mnv2_fast._C cannot be loaded ({error}): reinstall mnv2-fast for this Python",
        )
    isa = env.force_isa()
    if isa is not None:
        try:
            module.select_isa(isa)
        except ValueError as error:
            raise UserError(f"{env.FORCE_ISA.name}={isa!r}: {error}") from None
    return module, ""


def extension() -> types.ModuleType:
    """The extension, once it is there.

    Raises:
        UserError: it is not.
    """
    module, reason = _load()
    if module is None:
        raise UserError(reason)
    return module


def available() -> bool:
    """Whether the extension is there."""
    return _load()[0] is not None


def loaded() -> bool:
    """Whether something has used the extension."""
    return _MODULE in sys.modules


def unavailable_reason() -> str:
    """Why `available()` is False, with the cure; empty where it is True."""
    return _load()[1]


def isa() -> str:
    """The instruction set in use."""
    return str(extension().isa())


def isas() -> list[str]:
    """The instruction sets that run here, best first."""
    return list(extension().isas())


def features() -> dict[str, bool]:
    """Features of this processor that its operating system lets programs use."""
    return dict(extension().cpu_features())


def build_info() -> dict[str, str]:
    """The compiler that built the extension and where the extension lies."""
    return {"compiler": str(extension().compiler()), "file": str(extension().__file__)}


def openmp() -> dict[str, object]:
    """OpenMP runtimes loaded in this process, by file, and the extension's version of OpenMP and threads."""
    runtimes: list[str] = []
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            files = {line.split()[-1] for line in maps if "omp" in line}
        runtimes = sorted(
            file for file in files if os.path.basename(file).startswith(("libgomp", "libomp", "libiomp"))
        )
    return {
        "runtimes": runtimes,
        "version": extension().openmp_version(),
        "threads": extension().default_threads(),
    }


def bf16_arithmetic() -> str:
    """How bf16 is computed with the instruction set in use."""
    if extension().dot2():
        return "bf16 weights and activations, fp32 sums"
    return "bf16 storage, fp32 arithmetic: no instruction for bf16 is faster here"


@functools.cache
def _say_of_bf16() -> None:
    log.info("%s", bf16_arithmetic())


def declines(op: str, *args: object) -> str | None:
    """Why this backend does not serve a call of the operator `op`, or None."""
    if op not in OPERATORS:
        return f"the CPU kernels have no operator {op}"
    if not available():
        return unavailable_reason()
    reasons = (_declines_tensor(value) for value in args if isinstance(value, Tensor))
    return next((reason for reason in reasons if reason), None)


def _declines_tensor(tensor: Tensor) -> str | None:
    have = {"device": tensor.device.type, "layout": tensor.layout}
    want = {"device": "cpu", "layout": torch.strided}
    for name, value in want.items():
        if have[name] != value:
            return f"a tensor's {name} is {have[name]}, the CPU kernels' is {value}"
    if tensor.dtype not in DTYPES:
        return f"a tensor's dtype is {tensor.dtype}, the CPU kernels' is {DTYPE_NAMES}"
    if max(tensor.shape, default=0) > _MAX_SIZE:
        return f"a tensor of {tuple(tensor.shape)} has a size over 2**31 - 1"
    return None


@dataclass(frozen=True)
class StepTime:
    """A step of a network: the layers that run as one, the form where they are a block, the time it took."""

    layers: range
    form: str
    seconds: float


class _Native:
    """What networks of the extension say of themselves."""

    in_torch: Mapping[str, str] = types.MappingProxyType({})  # no operator is
    _network: Any  # of the extension
    block_forms: tuple[str, ...]  # those that a block may run in

    @property
    def isa(self) -> str:
        """The instruction set whose kernels this network runs."""
        return str(self._network.isa)

    def workspace_bytes(self, n: int, h: int, w: int, threads: int) -> int:
        """Bytes of activations that a run on [n, 3, h, w] takes."""
        return int(self._network.workspace_bytes(n, h, w, threads))

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and biases as the kernels read them."""
        return int(self._network.weight_bytes)

    def _served(
        self,
        x: Tensor,
        size: tuple[int, int, int],
        threads: int,
        answer_bytes: int,
        call: Callable[[], Served],
    ) -> Served:
        """What `call` returns, once there is the memory for it; its refusals in the user's words.

        Raises:
            UserError: x does not fit the network or is larger than it can plan for.
            MemoryError: there is less memory than the call needs; nothing has been worked on.
        """
        need = 0
        try:
            need = self.workspace_bytes(*size, threads) + answer_bytes
            if not machine.fits_memory(need):
                raise MemoryError
            return call()
        except MemoryError:
            raise machine.no_memory(need, *size) from None
        except ValueError as error:
            raise UserError(f"{error} (input of shape {tuple(x.shape)})") from None

    def kept(self) -> tuple[int, int]:
        """What stays for later calls: plans of image sizes, bytes of workspaces. Both are bounded."""
        plans, workspaces = self._network.kept()
        return int(plans), int(workspaces)


class Network(_Native):
    """A frozen network of folded layers on the CPU. Immutable; may be run from several threads at once.

    Args:
        layers: first to last, as `arch.network` makes them. One `pointwise` layer alone may have residual -1:
            its residual is then passed to `run`.
        tensors: for each layer (weight, bias), float32, batch norm folded in; copied.
        pool: average the last pointwise layer over H and W, as is always done before a linear layer.
        table: [3, 256] float32, the value of each uint8 for R, G and B; needed for uint8 images only.
        isa: an instruction set of `isas()`, the one in use by default.
        dtype: "fp32" or "bf16"; weights that are not as `chain.weight_dtype` says are rounded.
        arithmetic: of bf16, "bf16" or "bf16_weights" as csrc/layer.h says; by default the faster one.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        tensors: Sequence[tuple[Tensor, Tensor]],
        pool: bool = True,
        table: Tensor | None = None,
        *,
        isa: str = "",
        dtype: str = "fp32",
        arithmetic: str | None = None,
    ) -> None:
        rows = []
        keep = []  # alive until the extension has copied them
        for spec, (weight, bias) in zip(layers, tensors, strict=True):
            if tuple(weight.shape) != spec.weight_shape or tuple(bias.shape) != (spec.cout,):
                raise UserError(
                    f"{spec.conv}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit "
                    f"{spec.weight_shape} and {(spec.cout,)}"
                )
            w, b = _dense(weight.to(weight_dtype(spec.kind, dtype))), _dense(bias)
            keep += [w, b]
            rows.append(
                (
                    spec.kind,
                    spec.cin,
                    spec.cout,
                    spec.stride,
                    spec.relu6,
                    spec.residual,
                    w.data_ptr(),
                    b.data_ptr(),
                )
            )
        lookup = None if table is None else _dense(table)
        c = extension()
        if dtype == "fp32":
            arithmetic = "float32"
        elif arithmetic is None:
            arithmetic = "bf16" if c.dot2(isa) else "bf16_weights"
            if arithmetic == "bf16_weights":
                _say_of_bf16()
        self.arithmetic = arithmetic
        self.block_forms = tuple(c.BLOCK_FORMS)
        self._activations = torch.bfloat16 if arithmetic == "bf16" else torch.float32
        self._elements = {
            torch.float32: c.Element.float32,
            torch.uint8: c.Element.uint8,
            torch.bfloat16: c.Element.bf16,
        }
        table_at = lookup.data_ptr() if lookup is not None else 0
        self._network = c.Network(rows, pool, table_at, isa, getattr(c.Arithmetic, arithmetic))
        self._first, self._last, self._pool = layers[0], layers[-1], pool
        self._strides = [spec.stride for spec in layers]

    def run(self, x: Tensor, threads: int | None = None, residual: Tensor | None = None) -> Tensor:
        """The network's answer.

        Args:
            x: float32 or bfloat16 [N, C, H, W] of any strides, or uint8 [N, H, W, 3].
            threads: at most this many; torch's number by default.
            residual: [N, Cout, H, W], for the one pointwise layer that asked for it.

        Returns:
            float32 [N, classes], or [N, C] pooled features; or [N, C, Ho, Wo] in channels_last, float32 or
            bfloat16 as the activations are, where the network ends in a convolution.

        Raises:
            UserError: x does not fit the network or is larger than it can plan for.
            MemoryError: there is less memory than the call needs; nothing has been worked on.
        """
        if threads is None:
            threads = torch.get_num_threads()
        x, strides, size = self._see(x, residual)
        given = None if residual is None else _nhwc(residual.to(self._activations))

        def call() -> Tensor:
            y = self._output(*size)
            self._network.run(
                x.data_ptr(),
                self._elements[x.dtype],
                strides,
                size,
                0 if given is None else given.data_ptr(),
                y.data_ptr(),
                threads,
            )
            return y

        return self._served(x, size, threads, 4 * math.prod(self._output_shape(*size)), call)

    def time_steps(self, x: Tensor, threads: int, form: str = "") -> tuple[Tensor, list[StepTime]]:
        """The answer for one image, and the time of each step that makes it.

        Args:
            x: one image, as for `run`.
            threads: as for `run`.
            form: one of `block_forms` for all blocks as far as it fits them; by default each its own.

        Raises:
            UserError: x does not fit the network, or there is no such form.
            MemoryError: as for `run`.
        """
        x, strides, size = self._see(x, None)

        def call() -> tuple[Tensor, list[StepTime]]:
            y = self._output(*size)
            rows = self._network.time_steps(
                x.data_ptr(), self._elements[x.dtype], strides, size, y.data_ptr(), threads, form
            )
            return y, _step_times(rows)

        return self._served(x, size, threads, 4 * math.prod(self._output_shape(*size)), call)

    def _see(
        self, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, tuple[int, int, int, int], tuple[int, int, int]]:
        """The input as the extension reads it, its strides (N, C, H, W) in elements, and (N, H, W)."""
        self._check(x, residual)
        if x.dtype == torch.uint8:
            n, h, w, _ = x.shape
            return x, (x.stride(0), x.stride(3), x.stride(1), x.stride(2)), (n, h, w)
        if self._first.kind != "stem":
            x = _nhwc(x.to(self._activations))
        n, _, h, w = x.shape
        return x, (x.stride(0), x.stride(1), x.stride(2), x.stride(3)), (n, h, w)

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        """Refuse what the extension would read past, since it sees addresses only."""
        channels = 0 if x.dim() != 4 else x.shape[3] if x.dtype == torch.uint8 else x.shape[1]
        if channels != self._first.cin:
            raise UserError(f"the network takes {self._first.cin} channels, got the shape {tuple(x.shape)}")
        if max(x.shape) > _MAX_SIZE:
            raise UserError(f"a size is over 2**31 - 1 in {tuple(x.shape)}: use smaller images or batches")
        wanted = (x.shape[0], self._last.cout, *x.shape[2:]) if self._last.residual == -1 else None
        got = None if residual is None else tuple(residual.shape)
        if wanted != got:
            raise UserError(f"a residual of shape {wanted} is wanted, got {got}")

    def _output_shape(self, n: int, h: int, w: int) -> tuple[int, ...]:
        if self._pool or self._last.kind == "linear":
            return n, self._last.cout
        for stride in self._strides:
            h, w = (h - 1) // stride + 1, (w - 1) // stride + 1
        return n, self._last.cout, h, w

    def _output(self, n: int, h: int, w: int) -> Tensor:
        shape = self._output_shape(n, h, w)
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        dtype = self._activations if len(shape) == 4 else torch.float32
        # Named type and device: torch's defaults may be others.
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=layout)


class Int8Network(_Native):
    """A quantized network on the CPU. Immutable; may be run from several threads at once.

    Its answer is `int8.reference`'s, bit for bit, on every instruction set.

    Args:
        network: its tensors are copied.
        table: [3, 256] uint8, what each value of R, G and B is on the network's grid; needed for uint8 images
            only.
        isa: an instruction set of `isas()`, the one in use by default.

    Raises:
        UserError: the layers are not a stem, inverted residuals, a 1x1 layer and a classifier.
    """

    def __init__(self, network: QuantizedNetwork, table: Tensor | None = None, isa: str = "") -> None:
        keep = []  # alive until the extension has copied them

        def address(tensor: Tensor | None) -> int:
            if tensor is None:
                return 0
            keep.append(tensor.detach().cpu().contiguous())
            return keep[-1].data_ptr()

        if table is not None and (table.dtype != torch.uint8 or tuple(table.shape) != (3, 256)):
            raise UserError(f"the table is {table.dtype} {tuple(table.shape)}, uint8 (3, 256) is wanted")
        rows = [
            (
                spec.kind,
                spec.cin,
                spec.cout,
                spec.stride,
                spec.relu6,
                spec.residual,
                address(layer.weight),
                address(layer.bias),
                address(layer.scale),
                address(layer.output_scale),
                address(layer.output_zero),
            )
            for spec, layer in zip(network.specs, network.layers, strict=True)
        ]
        try:
            self._network = extension().Int8Network(
                rows, address(network.input_scale), address(network.input_zero), address(table), isa
            )
        except ValueError as error:
            raise UserError(f"{error}: use dtype='fp32'") from None
        self.block_forms = tuple(extension().INT8_BLOCK_FORMS)
        self._classes = network.specs[-1].cout

    def run(self, x: Tensor, threads: int | None = None) -> Tensor:
        """The network's answer.

        Args:
            x: float32 [N, 3, H, W] of any strides, or uint8 [N, H, W, 3].
            threads: at most this many; torch's number by default.

        Returns:
            float32 [N, classes].

        Raises:
            UserError: x does not fit the network or is larger than it can plan for.
            ValueError: a value of x is NaN or infinite.
            MemoryError: there is less memory than the call needs; nothing has been worked on.
        """
        if threads is None:
            threads = torch.get_num_threads()
        bytes_, strides, size = self._see(x)

        def call() -> tuple[Tensor, bool]:
            y = self._output(size[0])
            return y, self._network.run(x.data_ptr(), bytes_, strides, size, y.data_ptr(), threads)

        y, finite = self._served(x, size, threads, 4 * size[0] * self._classes, call)
        if not finite:
            raise ValueError(NOT_FINITE)
        return y

    def time_steps(self, x: Tensor, threads: int, form: str = "") -> tuple[Tensor, list[StepTime]]:
        """The answer for one image, and the time of each step that makes it.

        Args:
            x: one image, as for `run`.
            threads: as for `run`.
            form: one of `block_forms` for all blocks as far as it fits them; by default each its own.

        Raises:
            UserError: x does not fit the network or has a NaN or infinite value, or there is no such form.
            MemoryError: as for `run`.
        """
        bytes_, strides, size = self._see(x)

        def call() -> tuple[Tensor, list[StepTime]]:
            y = self._output(size[0])
            rows = self._network.time_steps(x.data_ptr(), bytes_, strides, size, y.data_ptr(), threads, form)
            return y, _step_times(rows)

        return self._served(x, size, threads, 4 * size[0] * self._classes, call)

    def _output(self, n: int) -> Tensor:
        return torch.empty((n, self._classes), dtype=torch.float32, device="cpu")

    def _see(self, x: Tensor) -> tuple[bool, tuple[int, int, int, int], tuple[int, int, int]]:
        """Whether x is of bytes, its strides (N, C, H, W) in elements, and (N, H, W)."""
        bytes_ = x.dtype == torch.uint8
        if x.dtype not in (torch.uint8, torch.float32) or x.device.type != "cpu" or x.layout != torch.strided:
            raise UserError(f"int8 takes float32 or uint8 images on the CPU, got {x.dtype} on {x.device}")
        if x.dim() != 4 or x.shape[3 if bytes_ else 1] != 3:
            raise UserError(
                f"int8 takes float32 [N, 3, H, W] or uint8 [N, H, W, 3], got the shape {tuple(x.shape)}"
            )
        if max(x.shape) > _MAX_SIZE:
            raise UserError(f"a size is over 2**31 - 1 in {tuple(x.shape)}: use smaller images or batches")
        n, c, h, w = (0, 3, 1, 2) if bytes_ else (0, 1, 2, 3)
        strides = (x.stride(n), x.stride(c), x.stride(h), x.stride(w))
        return bytes_, strides, (x.shape[n], x.shape[h], x.shape[w])


def _step_times(rows: list[tuple[int, int, str, float]]) -> list[StepTime]:
    return [StepTime(range(first, last + 1), form, seconds) for first, last, form, seconds in rows]


def _dense(t: Tensor) -> Tensor:
    return t.detach().to(torch.float32).contiguous()


def _nhwc(x: Tensor) -> Tensor:
    """`x` with channels dense, then W, H, N: also where a size of 1 lets torch leave a stride open."""
    n, c, h, w = x.shape
    if x.stride() == (h * w * c, 1, w * c, c):
        return x
    dense = torch.empty((n, h, w, c), dtype=x.dtype, device="cpu").permute(0, 3, 1, 2)
    return dense.copy_(x)


def stem(x: Tensor, weight: Tensor, bias: Tensor, relu6: bool) -> Tensor:
    """3x3 convolution of stride 2 from 3 channels: [N, 3, H, W] -> [N, Cout, Ho, Wo]."""
    spec = LayerSpec("stem", "stem", "", 3, weight.shape[0], 2, relu6)
    return Network([spec], [(weight, bias)], pool=False, dtype=DTYPES[x.dtype]).run(x).to(x.dtype)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int, relu6: bool) -> Tensor:
    """3x3 depthwise convolution: [N, C, H, W] -> [N, C, Ho, Wo]."""
    channels = weight.shape[0]
    spec = LayerSpec("depthwise", "depthwise", "", channels, channels, stride, relu6)
    return Network([spec], [(weight, bias)], pool=False, dtype=DTYPES[x.dtype]).run(x).to(x.dtype)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu6: bool) -> Tensor:
    """1x1 convolution: [N, Cin, H, W] -> [N, Cout, H, W], the residual added after ReLU6."""
    spec = LayerSpec(
        "pointwise",
        "pointwise",
        "",
        weight.shape[1],
        weight.shape[0],
        1,
        relu6,
        0 if residual is None else -1,
    )
    network = Network([spec], [(weight, bias)], pool=False, dtype=DTYPES[x.dtype])
    return network.run(x, residual=residual).to(x.dtype)


def head(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """ReLU6 of a 1x1 convolution, its mean over H and W, a linear layer: [N, C, H, W] -> [N, classes]."""
    specs = [
        LayerSpec("pointwise", "head", "", w1.shape[1], w1.shape[0], 1, True),
        LayerSpec("linear", "classifier", "", w2.shape[1], w2.shape[0]),
    ]
    return Network(specs, [(w1, b1), (w2, b2)], dtype=DTYPES[x.dtype]).run(x).to(x.dtype)
