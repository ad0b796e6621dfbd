"""The CUDA backend: the Triton kernels of `mnv2_fast.kernels` as operators, on sm_80 and newer.

Importing this module imports no triton, so that it costs nothing where no GPU is used.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import arch, env
from ..arch import LayerSpec
from . import replay

# min.NaN, max.NaN and bfloat16 begin here.
CAPABILITY = (8, 0)
# How an engine of a dtype computes: type of weights and activations, whether float32 is multiplied as TF32.
DTYPES = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
}
OPERATORS = ("stem", "depthwise", "pointwise", "head")
# Those of them, "block" and "network" whose checks in `python -m bench.gpu` have passed on a GPU; the others
# are off by default.
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


def network_declines(device: torch.device) -> str | None:
    """Why this backend does not run whole networks on a device, or None where it does."""
    return _device_reason(device) or _unproven("network")


def _unproven(op: str) -> str | None:
    if op in PROVEN or env.backend() == "triton":
        return None
    return f"the {op} kernel has not run on a GPU yet: set {env.BACKEND.name}=triton to use it"


class Network:
    """A frozen network of folded layers on a GPU, replayed as CUDA graphs. Immutable.

    Args:
        layers: first to last, from the stem to the classifier.
        tensors: for each layer (weight, bias), batch norm folded in; copied.
        norm: [2, 3], what each uint8 is multiplied with for R, G and B, and what is added.
        dtype: of `DTYPES`.
        device: a CUDA device.
        fuse: whole blocks in one launch; by default where the GPU has them and they are proven.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        tensors: Sequence[tuple[Tensor, Tensor]],
        *,
        norm: Tensor,
        dtype: str,
        device: torch.device,
        fuse: bool | None = None,
    ) -> None:
        from mnv2_fast.kernels import inverted_residual, network

        kind, tf32 = DTYPES[dtype]
        if fuse is None:
            fuse = (
                kind in inverted_residual.DTYPES
                and torch.cuda.get_device_capability(device) == inverted_residual.CAPABILITY
                and _unproven("block") is None
            )
        self._network = network.Network(layers, tensors, kind, device, norm=norm, tf32=tf32, fuse=fuse)
        self._replayed = replay.Replayed(self._network)
        self._layers, self._item = tuple(layers), kind.itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights as the kernels read them; whole blocks' are packed at their first call."""
        return self._network.weight_bytes

    def run(self, x: Tensor, threads: int | None = None) -> Tensor:
        """Logits [N, classes], float32, of float32 [N, 3, H, W] or uint8 [N, H, W, 3].

        Raises:
            MemoryError: the batch needs more memory than the GPU has.
        """
        return self._replayed(x)

    def workspace_bytes(self, n: int, h: int, w: int, threads: int) -> int:
        """What its largest layer reads and writes for the batch whose graph serves n images."""
        largest = max(layer.elements for layer in arch.layers(size=(h, w), specs=self._layers))
        return self._item * replay.bucket(min(n, replay.MOST)) * largest


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
