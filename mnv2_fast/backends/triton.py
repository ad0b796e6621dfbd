"""The CUDA backend: the Triton kernels of `mnv2_fast.kernels` as operators, on sm_80 and newer.

Importing this module imports no triton, so that it costs nothing where no GPU is used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import types
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.backends import cudnn

from .. import arch, env
from ..arch import LayerSpec
from ..errors import UserError
from . import eager, replay

log = logging.getLogger("mnv2_fast")

# min.NaN, max.NaN and bfloat16 begin here.
CAPABILITY = (8, 0)
# How an engine of a dtype computes: type of weights and activations, whether float32 is multiplied as TF32.
DTYPES = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
}
# Of the tensors that the kernels take, and what a network of them is called.
TENSORS = {kind: name for name, (kind, tf32) in DTYPES.items() if not tf32}
# From here on Triton 3.6 and 3.7 make TF32 of a float32 product whose factor was computed, as are those of a
# training step.
NO_EXACT_DOT = (10, 0)
OPERATORS = ("stem", "depthwise", "pointwise", "head")
# Those of them, "block", "network" and "training" whose checks in `python -m bench.gpu` have passed on a GPU;
# the others are off by default.
PROVEN: frozenset[str] = frozenset()


@functools.cache
def unavailable_reason() -> str:
    """Why no call can be served here, in one line that names the cure; empty where calls can be served."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install torch's CUDA build, or triton>=3.6"
    if torch.version.cuda is None:
        return "torch is built without CUDA: install torch's CUDA build"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: check the driver with nvidia-smi"
    try:
        importlib.import_module("mnv2_fast.kernels.head")
    except ImportError as error:
        return f"the Triton kernels cannot be imported ({error}): install mnv2-fast with pip"
    return ""


def available() -> bool:
    """Whether calls can be served here."""
    return not unavailable_reason()


def declines(op: str, *args: object) -> str | None:
    """Why this backend does not serve one call, or None where it does.

    Args:
        op: the operator's name, such as "depthwise".
        args: the call's arguments, in the order of the operator's schema.
    """
    if op not in OPERATORS:
        return f"the triton backend has no {op} kernel"
    x, *others = (arg for arg in args if isinstance(arg, Tensor))
    if reason := _device_reason(x.device):
        return reason
    return _unproven(op) or _tensor_reason(op, x, others)


def network_declines(device: torch.device, asked: str = "auto") -> str | None:
    """Why this backend does not run whole networks on a device, or None where it does.

    Args:
        device: any.
        asked: the backend that a model asks for; `MNV2_BACKEND` says it, too.
    """
    return _device_reason(device) or _unproven("network", asked)


def training_declines(device: torch.device, asked: str = "auto") -> str | None:
    """Why the training kernels do not run on a device now, or None where they do; arguments likewise."""
    reason = _device_reason(device) or _unproven("training", asked)
    exact = not torch.is_autocast_enabled(device.type) and not multiplies_tf32()
    if reason is None and exact and torch.cuda.get_device_capability(device) >= NO_EXACT_DOT:
        return f"the training kernels multiply no float32 in full on {device}: allow TF32 or use autocast"
    return reason


def multiplies_tf32() -> bool:
    """Whether modules multiply float32 as TF32: torch's own switch for convolutions."""
    # Not cudnn.allow_tf32, which raises where convolutions and recurrent layers have switches of their own.
    return bool(cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def chain_declines(layers: Sequence[LayerSpec], pool: bool, device: torch.device) -> str | None:
    """Why a `Network` cannot be made of some layers now, or None where it can.

    Args:
        layers: first to last.
        pool: as for `Network`.
        device: likewise.
    """
    from mnv2_fast.kernels.network import refuses

    if replay.capturing(device):  # weights go by way of the host, for which a capture does not wait
        return "a CUDA graph is captured before the first call: call the model once before that"
    return refuses(layers, pool)


def _unproven(op: str, asked: str = "auto") -> str | None:
    if op in PROVEN or "triton" in (asked, env.backend()):
        return None
    return f"the {op} kernel has not run on a GPU yet: set {env.BACKEND.name}=triton to use it"


class OutOfMemoryError(MemoryError, torch.OutOfMemoryError):
    """A batch needs more memory than the GPU has. Both of the classes that callers look for."""


class Network:
    """A frozen network of folded layers on a GPU. May be run from several threads at once.

    One with a head is replayed as CUDA graphs; any other chain is launched layer by layer, into new memory.
    An operator whose kernel is off runs in plain torch, among the other ones' launches. A depthwise layer and
    its projection are one launch where the GPU's tile table has it.

    Args:
        layers: first to last.
        tensors: for each layer (weight, bias), batch norm folded in; copied.
        norm: [2, 3], what each uint8 is multiplied with for R, G and B, and what is added; for uint8 alone.
        dtype: of `DTYPES`.
        device: a CUDA device.
        fuse: whole blocks in one launch; by default where the GPU has them and they are proven.
        pool: average the last pointwise layer over H and W, as is always done before a linear layer.
        answer: dtype of the answer.
        asked: the backend that was asked for, as for `network_declines`.

    Raises:
        ValueError: `chain_declines` has a reason for it.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        tensors: Sequence[tuple[Tensor, Tensor]],
        *,
        norm: Tensor | None = None,
        dtype: str,
        device: torch.device,
        fuse: bool | None = None,
        pool: bool = False,
        answer: torch.dtype = torch.float32,
        asked: str = "auto",
    ) -> None:
        from mnv2_fast.kernels import inverted_residual, network

        kind, tf32 = DTYPES[dtype]
        graphs = pool or layers[-1].kind == "linear"
        if fuse is None:
            fuse = (
                graphs
                and kind in inverted_residual.DTYPES
                and torch.cuda.get_device_capability(device) == inverted_residual.CAPABILITY
                and _unproven("block", asked) is None
            )
        # Operator -> why it runs in plain torch; a kernel that does not fit on the GPU comes to it later.
        found = {op: why for op in OPERATORS if (why := _unproven(op, asked))}
        self.in_torch: Mapping[str, str] = types.MappingProxyType(found)
        self._network = network.Network(
            layers,
            tensors,
            kind,
            device,
            norm=norm,
            tf32=tf32,
            fuse=fuse,
            pool=pool,
            project=None,
            answer=answer,
            plain={op: functools.partial(_in_torch, op, tf32, found) for op in OPERATORS},
            off=found,
        )
        self._run = replay.Replayed(self._network) if graphs else torch.no_grad()(self._network)
        self._layers, self._item = tuple(layers), kind.itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights as the kernels read them; whole blocks' are packed at their first call."""
        return self._network.weight_bytes

    def run(self, x: Tensor, threads: int | None = None) -> Tensor:
        """The answer for [N, C, H, W], or for uint8 [N, H, W, 3]: as `mnv2_fast.kernels.network` has it.

        Raises:
            OutOfMemoryError: the batch needs more memory than the GPU has; later calls are served.
            UserError: a layer would run in plain torch, and MNV2_STRICT is 1.
        """
        try:
            # The current device may be another one, and a capture there is not ours.
            with torch.cuda.device_of(x):
                return self._run(x)
        except MemoryError as error:
            raise OutOfMemoryError(str(error)) from None

    def workspace_bytes(self, n: int, h: int, w: int, threads: int) -> int:
        """What its largest layer reads and writes for the batch whose graph serves n images."""
        largest = max(layer.elements for layer in arch.layers(size=(h, w), specs=self._layers))
        return self._item * replay.bucket(min(n, replay.MOST)) * largest


def _in_torch(op: str, tf32: bool, off: Mapping[str, str], x: Tensor, *rest: object) -> Tensor:
    """An operator in plain torch, as exact as its kernel: one that is off, or for an input past its limit.

    Raises:
        UserError: MNV2_STRICT is 1.
    """
    from mnv2_fast.kernels.depthwise import limit

    why = off.get(op) or limit(x.shape)
    if env.strict():
        raise UserError(f"{env.STRICT.name}=1, and a {op} layer would run in plain torch: {why}")
    log.debug("a %s layer runs in plain torch: %s", op, why)
    make: Callable[..., Tensor] = getattr(eager, op)
    exact = eager.float32_products(tf32) if x.is_cuda else contextlib.nullcontext()
    with exact, torch.autocast(x.device.type, enabled=False):
        return make(x, *rest)


def stem(x: Tensor, weight: Tensor, bias: Tensor, relu6: bool) -> Tensor:
    """act(3x3 convolution of x of stride 2, padding 1, + bias), as `mnv2_fast.kernels.stem.stem`.

    x [N, 3, H, W], weight [Cout, 3, 3, 3], bias [Cout]; returns [N, Cout, HO, WO], channels_last.

    Raises:
        ValueError: the arguments do not fit together, or x is too large for the kernel.
    """
    from mnv2_fast.kernels.stem import stem

    return stem(x, weight, bias, relu6)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu6: bool) -> Tensor:
    """act(1x1 convolution of x + bias) + residual, as `mnv2_fast.kernels.pointwise.pointwise`.

    x [N, Cin, H, W], weight [Cout, Cin, 1, 1], bias [Cout], residual [N, Cout, H, W]; returns
    [N, Cout, H, W], channels_last.

    Raises:
        ValueError: the arguments do not fit together.
    """
    from mnv2_fast.kernels.pointwise import pointwise

    return pointwise(x, weight, bias, residual, relu6)


def head(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The classifier of the mean of ReLU6(1x1 convolution of x + b1), as `mnv2_fast.kernels.head.head`.

    x [N, C, H, W], w1 [Cout, C, 1, 1], b1 [Cout], w2 [classes, Cout], b2 [classes]; returns [N, classes].

    Raises:
        ValueError: the arguments do not fit together.
    """
    from mnv2_fast.kernels.head import head

    return head(x, w1, b1, w2, b2)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int, relu6: bool) -> Tensor:
    """act(depthwise 3x3 convolution of x, padding 1, + bias), as `mnv2_fast.kernels.depthwise.depthwise`.

    x [N, C, H, W], weight [C, 1, 3, 3], bias [C]; returns [N, C, HO, WO], channels_last.

    Raises:
        ValueError: the arguments do not fit together, or x is too large for the kernel.
    """
    from mnv2_fast.kernels.depthwise import depthwise

    return depthwise(x, weight, bias, stride, relu6)


@functools.cache
def _device_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the triton backend serves CUDA tensors, not {device.type}"
    if reason := unavailable_reason():
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < CAPABILITY:
        return f"the triton backend needs sm_80 or newer, {device} is sm_{major}{minor}"
    return None


def _tensor_reason(op: str, x: Tensor, others: Sequence[Tensor]) -> str | None:
    from mnv2_fast.kernels.common import DTYPES
    from mnv2_fast.kernels.depthwise import limit

    if x.dtype not in DTYPES:
        return f"the triton backend has no {x.dtype} kernels"
    for other in others:
        if other.dtype != x.dtype or other.device != x.device:
            return f"x is {x.dtype} on {x.device}, another tensor is {other.dtype} on {other.device}"
    for tensor in (x, *others):
        if tensor.layout != torch.strided or tensor.is_neg():
            return f"a tensor is {tensor.layout} or a negative view: the kernels read plain memory"
    return limit(x.shape) if op in ("stem", "depthwise") else None
