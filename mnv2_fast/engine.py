"""The frozen network: batch norm folded, weights packed once, one call for everything.

`compile` makes an Engine of a model, `Engine.save` and `load` keep it in one safetensors file with its labels
and its preprocessing. An Engine is immutable and may be called from several threads at once.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import operator
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

import torch
from torch import Tensor, nn

from . import env, int8, machine, weights
from .arch import KINDS, LayerSpec
from .backends import cpu, triton
from .chain import Chain, weight_dtype
from .eager_network import EagerInt8Network, EagerNetwork, Folded
from .errors import UserError
from .images import CPU, check_images
from .int8 import QuantizedNetwork
from .model import MobileNetV2, accelerate
from .nn import Declined
from .weights import Preprocessing

if TYPE_CHECKING:
    from .quant import Progress

log = logging.getLogger("mnv2_fast")

DTYPES = ("fp32", "bf16", "int8")
GPU_DTYPES = tuple(triton.DTYPES)

VERSION = "1"

_NO_CALIBRATION = (
    "dtype='int8' needs calibration images: give calibration= (`mnv2 predict` and `bench`: --calibration), "
    "a folder of photos, a tensor or a loader, about 100 images, or use a file of `mnv2 quantize`"
)


class _Network(Protocol):
    @property
    def weight_bytes(self) -> int: ...
    def run(self, x: Tensor, threads: int | None = None) -> Tensor: ...
    def workspace_bytes(self, n: int, h: int, w: int, threads: int) -> int: ...


class Engine:
    """A frozen MobileNetV2: float32 logits from images.

    `compile` and `load` make one. Calls take float32 [N, 3, H, W] of any strides, normalized as
    `preprocessing` says, or uint8 [N, H, W, 3] RGB, normalized inside; any N >= 0, H and W >= 1; on the
    engine's `device`, where the answer is, too.
    Each call has memory of its own, so that calls from several threads run side by side. The tensors given
    are kept, not copied.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        tensors: Folded | QuantizedNetwork,
        *,
        dtype: str = "fp32",
        threads: int | None = None,
        labels: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        backend: str = "auto",
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self.dtype = check_dtype(dtype, device)
        self.threads = check_threads(threads)
        self.layers = tuple(layers)
        self.labels = None if labels is None else list(labels)
        self.preprocessing = preprocessing or Preprocessing()
        if self.labels is not None and len(self.labels) != self.num_classes:
            raise UserError(f"{len(self.labels)} labels for {self.num_classes} classes: give one per class")
        self._asked = backend
        self._tensors: Folded | QuantizedNetwork = tensors
        if not isinstance(tensors, QuantizedNetwork):
            self._tensors = [(weight.detach(), bias.detach()) for weight, bias in tensors]
        self._build()

    def _build(self) -> None:
        table = byte_table(self.preprocessing)
        reason = _why_eager(self._asked, self.device, self.layers)
        self.backend = "eager" if reason else "cpu" if self.device.type == "cpu" else "triton"
        wanted = self._asked == "auto" and env.backend() != "eager"
        _tell("in plain torch", reason, wanted=wanted)
        self._network: _Network
        if isinstance(self._tensors, QuantizedNetwork):
            grid = int8.byte_grid(self._tensors, table)
            self._network = (EagerInt8Network if reason else cpu.Int8Network)(self._tensors, grid)
        elif reason:
            kind, tf32 = triton.DTYPES[self.dtype] if self.device.type == "cuda" else (torch.float32, False)
            self._network = EagerNetwork(self.layers, self._tensors, table, self.device, kind, tf32=tf32)
        elif self.device.type == "cuda":
            self._network = triton.Network(
                self.layers,
                self._tensors,
                norm=byte_norm(self.preprocessing),
                dtype=self.dtype,
                device=self.device,
                asked=self._asked,
            )
        else:
            self._network = cpu.Network(self.layers, self._tensors, table=table, dtype=self.dtype)
        _tell("partly in plain torch", "; ".join(self.in_torch.values()), wanted=True)

    @property
    def in_torch(self) -> Mapping[str, str]:
        """Operators in plain torch among kernels of ours, and why; empty where all are, as `backend` says."""
        found: Mapping[str, str] = getattr(self._network, "in_torch", {})
        return found

    @property
    def num_classes(self) -> int:
        """Logits per image."""
        return self.layers[-1].cout

    @property
    def isa(self) -> str:
        """The instruction set of its kernels; empty in plain torch."""
        return self._network.isa if isinstance(self._network, cpu.Network | cpu.Int8Network) else ""

    @property
    def packed_bytes(self) -> int:
        """Bytes of weights as the kernels read them, beside those kept for `save`; 0 in plain torch."""
        return self._network.weight_bytes

    @property
    def tensors(self) -> Folded | QuantizedNetwork:
        """(weight, bias) of each layer, batch norm folded in; of int8 the quantized network."""
        return self._tensors

    @property
    def network(self) -> object:
        """What runs it: `backends.cpu.Network` on the kernels."""
        return self._network

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of a batch of images.

        Args:
            x: float32 [N, 3, H, W], contiguous, channels_last or strided in any way, or uint8 [N, H, W, 3].

        Returns:
            float32 [N, num_classes], without gradient.

        Raises:
            ValueError, RuntimeError: x is no such batch (the error is both, and names the cure).
            ValueError: a value is NaN or infinite, and the dtype int8, which has neither.
            TypeError: x is no tensor.
            MemoryError: the batch needs more memory than there is; nothing has been worked on.
        """
        check_images(x, self.device)
        return self._network.run(x.detach().resolve_neg(), self.threads)

    def workspace_bytes(self, n: int = 1, h: int = 224, w: int = 224) -> int:
        """Bytes of activations that a call on [n, 3, h, w] takes; in plain torch, about."""
        return self._network.workspace_bytes(n, h, w, self.threads or torch.get_num_threads())

    def with_threads(self, threads: int | None) -> Engine:
        """The same network for at most this many threads (None: torch's number): weights shared, not copied.

        Raises:
            UserError: it is no number of threads.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, threads=check_threads(threads))
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, architecture, labels and preprocessing into one safetensors file, or nothing.

        Raises:
            UserError: the folder is not there, or path is a folder itself.
            OSError: the file cannot be written.
        """
        from safetensors.torch import save

        target = weights.output_file(path)
        metadata = {
            "format": weights.ENGINE_FORMAT,
            "version": VERSION,
            "dtype": self.dtype,
            "architecture": json.dumps([asdict(spec) for spec in self.layers]),
            "preprocessing": json.dumps(self.preprocessing.to_dict()),
        }
        if self.labels is not None:
            metadata["labels"] = json.dumps(self.labels)
        if isinstance(self._tensors, QuantizedNetwork):
            tensors = int8.state_dict(self._tensors)
        else:
            tensors = {}
            for spec, (weight, bias) in zip(self.layers, self._tensors, strict=True):
                tensors[f"{spec.conv}.weight"], tensors[f"{spec.conv}.bias"] = weight, bias
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            beside = Path(folder) / target.name
            beside.write_bytes(save(tensors, metadata))  # save_file would leave it to its owner alone
            os.replace(beside, target)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_network"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()

    def __repr__(self) -> str:
        where = (
            f"{self.backend} {self.isa}".strip() if self.device == CPU else f"{self.backend} {self.device}"
        )
        where += f" with {' and '.join(self.in_torch)} in torch" if self.in_torch else ""
        return f"Engine({self.num_classes} classes, {self.dtype}, {where}, threads={self.threads or 'auto'})"


def compile(
    model: nn.Module,
    dtype: str = "fp32",
    threads: int | None = None,
    calibration: object = None,
    progress: Progress | None = None,
) -> Engine:
    """Freeze a model into an Engine; the model itself is untouched and later changes to it are not seen.

    Args:
        model: a MobileNetV2 of this package, of torchvision or of timm, on the CPU or on one GPU, where the
            engine is then, too.
        dtype: arithmetic of the network: "fp32"; "bf16", whose sums are float32 (on a processor without
            instructions for it the weights alone are bf16); or "int8". On a GPU "fp32", which is exact,
            "tf32", "fp16" or "bf16".
        threads: at most this many; by default torch's number at each call.
        calibration: images to quantize by, about 100, for "int8" alone: a tensor, batches of a loader, a
            folder of photos or a list of them, as `calibration.read` takes them. Labels are not looked at.
        progress: called with (steps done, steps) while "int8" is being made.

    Raises:
        UserError: the model is not a plain MobileNetV2 (the message says where), is on another device, or an
            argument makes no sense.
        TypeError: model is no module.
    """
    check_dtype(dtype, _device_of(model))
    check_threads(threads)
    if calibration is not None and dtype != "int8":
        raise UserError(f"calibration is for dtype='int8': leave it out with dtype={dtype!r}")
    if calibration is None and dtype == "int8":
        raise UserError(_NO_CALIBRATION)
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile takes a model, not {type(model).__name__}: use load for a file")
    if not isinstance(model, MobileNetV2):
        model = accelerate(model)
    if any(module.training for module in model.modules()):
        model = copy.deepcopy(model).eval()  # frozen is eval; the model itself stays in train mode
    try:
        model.decline_wrapped()
        reading = model.read()
    except Declined as reason:
        raise UserError(f"cannot compile this model: {reason}") from None
    if reading.rest is not None:
        raise UserError("cannot compile this model: its classifier is not (Dropout, Linear) with classes")
    chain, preprocessing = reading.chain, getattr(model, "preprocessing", None)
    tensors_here = [tensor.cpu() for tensor in reading.tensors]
    tensors: Folded | QuantizedNetwork
    if dtype == "int8":
        tensors = _quantize(chain, tensors_here, calibration, preprocessing or Preprocessing(), progress)
    else:
        tensors = chain.fold(tensors_here, dtype)
    classes = chain.specs[-1].cout
    labels = getattr(model, "labels", None)
    if labels is None and classes == len(weights.imagenet_labels()):
        labels = weights.imagenet_labels()
    return Engine(
        chain.specs,
        tensors,
        dtype=dtype,
        threads=threads,
        labels=labels,
        preprocessing=preprocessing,
        backend=model.backend,
        device=_device_of(model),
    )


def _quantize(
    chain: Chain,
    tensors: Sequence[Tensor],
    calibration: object,
    images: Preprocessing,
    progress: Progress | None,
) -> QuantizedNetwork:
    """The int8 network of a chain; arguments as `compile` has them."""
    int8.check_specs(chain.specs)  # before photos are read
    from . import quant  # with Pillow, which no other dtype needs: 80 ms of a start
    from .calibration import read

    batches = read(calibration, images)
    return quant.quantize(chain.specs, chain.fold(tensors), batches, images, progress)


def _device_of(model: object) -> torch.device:
    """Where a model is.

    Raises:
        UserError: in several places, or where no engine is.
    """
    if not isinstance(model, nn.Module):
        return CPU
    places = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())} or {CPU}
    if len(places) > 1:
        names = " and ".join(sorted(map(str, places)))
        raise UserError(
            f"cannot compile a model on {names}: move it with model.to({str(min(places, key=str))!r})"
        )
    (place,) = places
    if place.type not in ("cpu", "cuda"):
        raise UserError(f"cannot compile a model on {place}: move it with model.cpu()")
    return place


def load(
    path: str | os.PathLike[str], threads: int | None = None, device: str | torch.device = CPU
) -> Engine:
    """The Engine that `Engine.save` wrote, or one that comes with the package.

    Args:
        path: of the file; or `flowers`.
        threads: at most this many; by default torch's number at each call.
        device: to run on.

    Raises:
        UserError: no such file, truncated, no engine, of another version, its tensors do not fit its
            architecture, or its dtype is none of the device.
    """
    place = machine.device(device)
    if place.type not in ("cpu", "cuda"):
        raise UserError(f"device={str(device)!r} runs no engine: use cpu or cuda")
    state, metadata = weights.load_state_dict(path if weights.boxed(path) else Path(path))
    if metadata.get("format") != weights.ENGINE_FORMAT:
        raise UserError(
            f"{path} holds weights, not an engine: use compile(mobilenet_v2(weights={str(path)!r}))"
        )
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{path} is an engine of version {metadata.get('version')!r}, this package reads {VERSION}: "
            "save it again"
        )
    layers = _architecture(metadata.get("architecture", ""), path)
    try:
        dtype = check_dtype(metadata.get("dtype", "fp32"), place)
        return Engine(
            layers,
            _tensors_of(layers, state, dtype, path),
            dtype=dtype,
            threads=threads,
            labels=weights.labels_of(metadata, layers[-1].cout),
            preprocessing=weights.preprocessing_of(metadata),
            device=place,
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _tensors_of(
    layers: Sequence[LayerSpec], state: Mapping[str, Tensor], dtype: str, path: object
) -> Folded | QuantizedNetwork:
    """A file's tensors as the Engine takes them."""
    # Memory of the file itself would change with the file.
    own = {key: tensor.clone() for key, tensor in state.items()}
    if dtype == "int8":
        weights.check_state_dict(own, int8.expected_shapes(layers), str(path))
        return int8.from_state_dict(layers, own)
    expected: dict[str, tuple[int, ...]] = {}
    for spec in layers:
        expected[f"{spec.conv}.weight"], expected[f"{spec.conv}.bias"] = spec.weight_shape, (spec.cout,)
    weights.check_state_dict(own, expected, str(path))
    for spec in layers:
        wanted = {"weight": weight_dtype(spec.kind, dtype), "bias": torch.float32}
        for name, kept in wanted.items():
            found = own[f"{spec.conv}.{name}"].dtype
            if found != kept:
                raise UserError(
                    f"{spec.conv}.{name} is {found}, in an engine of {dtype} it is {kept}: save it again"
                )
    return [(own[f"{spec.conv}.weight"], own[f"{spec.conv}.bias"]) for spec in layers]


def check_dtype(dtype: str, device: torch.device = CPU) -> str:
    """`dtype` if an engine on `device` has it.

    Raises:
        UserError: it does not; lists those there are.
    """
    if device.type != "cpu":
        if dtype not in GPU_DTYPES:
            raise UserError(f"dtype={dtype!r} is not offered on a GPU: use one of {', '.join(GPU_DTYPES)}")
    elif dtype in GPU_DTYPES and dtype not in DTYPES:
        raise UserError(
            f"dtype={dtype!r} has no arithmetic on a CPU: use one of {', '.join(DTYPES)}, or a GPU for it"
        )
    elif dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not offered: use one of {', '.join(DTYPES)}")
    return dtype


def check_threads(threads: int | None) -> int | None:
    """`threads` if it is a number of threads or None; more than the cores are warned of, once.

    Raises:
        UserError: it is neither.
    """
    if threads is None:
        return None
    try:
        number = -1 if isinstance(threads, bool) else operator.index(threads)
    except TypeError:
        number = -1
    if not 1 <= number <= machine.MAX_THREADS:
        raise UserError(
            f"threads={threads!r}: give a whole number from 1 to {machine.MAX_THREADS}, or None for torch's "
            "number"
        )
    machine.warn_of_threads(number)
    return number


def byte_table(preprocessing: Preprocessing) -> Tensor:
    """[3, 256]: what ToTensor and Normalize make of each uint8 in R, G and B, by their own operations."""
    values = torch.arange(256, dtype=torch.uint8, device="cpu").to(torch.float32).div(255)
    mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device="cpu")[:, None]
    std = torch.tensor(preprocessing.std, dtype=torch.float32, device="cpu")[:, None]
    return values.expand(3, 256).sub(mean).div(std)


def byte_norm(preprocessing: Preprocessing) -> Tensor:
    """[2, 3]: what each uint8 is multiplied with in R, G and B, and what is added, as `byte_table` has it."""
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    return torch.stack([1 / (255 * std), -mean / std]).float()


def _why_eager(backend: str, device: torch.device, layers: Sequence[LayerSpec]) -> str:
    """Why an engine runs in plain torch; empty where it need not."""
    name = env.backend() if backend == "auto" else backend
    if name == "eager":
        return "the backend asked for is eager"
    if device.type == "cuda":
        if name == "cpu":
            return f"the backend asked for is cpu, the engine is on {device}"
        why = triton.network_declines(device, backend)
        return why or triton.chain_declines(layers, pool=False, device=device) or ""
    if name == "triton":
        return "the Triton backend has no engine on a CPU"
    return cpu.unavailable_reason()


def _tell(where: str, reason: str, *, wanted: bool) -> None:
    """Say in the log that an engine runs in plain torch for a reason, if there is one.

    Raises:
        UserError: MNV2_STRICT is 1, and kernels were `wanted`.
    """
    if env.strict() and reason and wanted:
        raise UserError(f"{env.STRICT.name}=1, and the engine would run {where}: {reason}")
    if reason:
        log.debug("engine %s: %s", where, reason)


def _architecture(text: str, path: object) -> list[LayerSpec]:
    """The layers that a file's metadata lists, each field of its own type."""
    try:
        layers = [LayerSpec(**fields) for fields in json.loads(text)]
        kinds = get_type_hints(LayerSpec)
        typed = all(type(getattr(spec, name)) is kind for spec in layers for name, kind in kinds.items())
        if not typed or not layers or any(spec.kind not in KINDS for spec in layers):
            raise ValueError
        small = all(
            abs(value) < 2**20 for spec in layers for value in vars(spec).values() if type(value) is int
        )
        if not small or (layers[0].kind, layers[0].cin, layers[-1].kind) != ("stem", 3, "linear"):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: its architecture cannot be read: save the engine again") from None
    return layers
