"""Weights: where they are searched, how they are read and what images they expect.

A name (`IMAGENET1K_V1`, `IMAGENET1K_V2`, `DEFAULT`) is searched in the folder of `MNV2_WEIGHTS`, then in
torch hub's cache, then downloaded there. A file serves a name only if its own name or its own metadata says
so. `flowers` is an engine that comes with the package.
"""

from __future__ import annotations

import functools
import http.client
import importlib.resources
import json
import os
import pickle
import queue
import re
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import arch, env
from .errors import UserError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
ENGINE_FORMAT = "mnv2_fast.engine"  # metadata["format"] of a file that holds an Engine, not a model's weights


class MissingWeightsError(UserError, FileNotFoundError):
    """Weights that are not where they were looked for."""


@dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes the network's input, as torchvision's `ImageClassification` preset.

    The shorter side is resized to `resize`, the centre `crop` x `crop` is cut out, and each of R, G, B in
    0..1 becomes (value - mean) / std.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"preprocessing: {name}={value!r}, give a whole number of at least 1")
        for name in ("mean", "std"):
            try:
                values = tuple(float(v) for v in getattr(self, name))
            except (TypeError, ValueError):
                values = ()
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise UserError(f"preprocessing: {name}={getattr(self, name)!r}, give 3 numbers, std above 0")
            object.__setattr__(self, name, values)
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"preprocessing: interpolation={self.interpolation!r}, use one of {', '.join(INTERPOLATIONS)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`; absent fields have their defaults.

        Raises:
            UserError: an unknown field or a value that makes no sense.
        """
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise UserError(
                f"preprocessing: unknown {', '.join(unknown)}, use {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**fields)


@dataclass(frozen=True)
class Weights:
    """One published set of weights: its name, its file and where it is, what it expects and reaches.

    `top1` is torchvision's figure for ImageNet's validation set, in percent. Source:
    torchvision.models.mobilenetv2.
    """

    name: str
    file: str
    url: str
    preprocessing: Preprocessing
    top1: float
    num_classes: int = 1000

    @property
    def hash_prefix(self) -> str:
        """The first digits of the file's SHA-256, which its name carries."""
        return self.file.removesuffix(".pth").rpartition("-")[2]

    @property
    def stems(self) -> tuple[str, ...]:
        """File names, less the suffix, that say a file holds these weights."""
        return (f"mobilenet_v2-{self.name}", self.file.removesuffix(".pth"))


def _torchvision_row(version: str, digest: str, resize: int, top1: float) -> Weights:
    file = f"mobilenet_v2-{digest}.pth"
    url = f"https://download.pytorch.org/models/{file}"
    return Weights(f"IMAGENET1K_{version}", file, url, Preprocessing(resize=resize), top1)


WEIGHTS: tuple[Weights, ...] = (
    _torchvision_row("V1", "b0353104", 256, 71.878),
    _torchvision_row("V2", "7ebf99e0", 232, 72.154),
)
DEFAULT = "IMAGENET1K_V2"


@dataclass(frozen=True)
class Boxed:
    """An engine that comes with the package: its name, and its file among the assets."""

    name: str
    file: str

    @property
    def path(self) -> Path:
        """Of its file."""
        return Path(str(importlib.resources.files("mnv2_fast.assets").joinpath(self.file)))


BOXED: tuple[Boxed, ...] = (Boxed("flowers", "flowers-int8.safetensors"),)
SUFFIXES = (".safetensors", ".pth", ".pt")
HEAD = "classifier."

_PATIENCE = 10.0  # seconds that a server has for its first answer
# Those that people use first; the rest of the grid finds any other. All that fit give the same network.
_WIDTHS = (1.0, 0.5, 0.75, 1.4, 0.35, 0.25, 1.3, *(i / 100 for i in range(5, 401)))


def row(name: object) -> Weights | None:
    """The published weights called `name`, or None where that is no name of any.

    Args:
        name: `IMAGENET1K_V1`, `IMAGENET1K_V2` or `DEFAULT`, or a member of torchvision's
            `MobileNet_V2_Weights`.
    """
    text = str(getattr(name, "name", "") if not isinstance(name, str | Path) else name)
    text = text.removeprefix("MobileNet_V2_Weights.")
    text = DEFAULT if text == "DEFAULT" else text
    return next((weights for weights in WEIGHTS if weights.name == text), None)


def boxed(name: object) -> Boxed | None:
    """The engine in the package called `name`; None where that is no name of any, and for a `Path`.

    A file of that name is given as `./flowers`.
    """
    return next((engine for engine in BOXED if isinstance(name, str) and engine.name == name), None)


def names() -> str:
    """All names that weights and engines have, for messages."""
    return ", ".join([*(weights.name for weights in WEIGHTS), "DEFAULT", *(engine.name for engine in BOXED)])


@functools.cache
def imagenet_labels() -> list[str]:
    """The 1,000 ImageNet class names in the order of the logits (torchvision's spelling)."""
    asset = importlib.resources.files("mnv2_fast.assets").joinpath("imagenet_classes.txt")
    return asset.read_text(encoding="utf-8").splitlines()


def identify(path: Path, metadata: Mapping[str, str]) -> Weights | None:
    """Which published weights a file says it holds, in its metadata or else in its name, or None.

    The metadata says so with `weights` = the name, or with a `source` that starts
    "torchvision mobilenet_v2 NAME".
    """
    source = re.match(r"torchvision mobilenet_v2 (\w+)", metadata.get("source", ""))
    claim = metadata.get("weights") or (source.group(1) if source else "")
    if claim:
        return row(claim) if claim != "DEFAULT" else None
    return next((weights for weights in WEIGHTS if path.stem in weights.stems), None)


def find_weights(name_or_path: object, progress: bool = True) -> Path:
    """The file of some weights.

    Args:
        name_or_path: a name of `WEIGHTS` (or torchvision's enum member) or of `BOXED`, or the path of a file.
        progress: draw a bar while downloading.

    Raises:
        UserError: no such file, or a name that is nowhere and cannot be downloaded.
        TypeError: neither a name nor a path.
    """
    weights = row(name_or_path)
    if weights is not None:
        return find_local(weights) or _download(weights, progress)
    engine = boxed(name_or_path)
    if engine is not None:
        return engine.path
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"weights: a name ({names()}) or a path is wanted, not {type(name_or_path).__name__}")
    if not str(name_or_path).strip():
        raise UserError(f"weights: {str(name_or_path)!r} names nothing: give a file or one of {names()}")
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a weights file in it, or set {env.WEIGHTS.name} to it")
    if not path.exists():
        raise MissingWeightsError(f"no weights file {path}: give the path of a file or one of {names()}")
    return path


def find_local(weights: Weights) -> Path | None:
    """The file of `weights` in the folder of `MNV2_WEIGHTS` or in torch hub's cache; None: in neither."""
    folder = env.weights_folder()
    if folder is not None:
        files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
        # Files named after the weights first: only the others need opening.
        for path in sorted(files, key=lambda path: path.stem not in weights.stems):
            if identify(path, read_metadata(path)) is weights:
                return path
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.file
    return cached if cached.is_file() else None


def output_file(path: str | os.PathLike[str]) -> Path:
    """`path` if a file may be written there: its folder exists and it is no folder itself.

    Raises:
        UserError: it may not.
    """
    target = Path(path).expanduser()
    if not os.fspath(path) or target.is_dir():
        raise UserError(f"{os.fspath(path)!r} is a folder or empty: give the name of a file to write")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent} to save {target.name} in: make it first")
    return target


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; none of any other file and of one that cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _download(weights: Weights, progress: bool) -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / weights.file
    try:
        _check_server(weights.url)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(weights.url, str(target), weights.hash_prefix, progress)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        here = [other.name for other in WEIGHTS if other is not weights and find_local(other)]
        instead = f", or ask for {' or '.join(here)}, found here" if here else ""
        reason = getattr(error, "reason", None) or error
        raise MissingWeightsError(
            f"{weights.name} is not here and cannot be downloaded from {weights.url} ({_line(reason)}): "
            f"put {weights.file} in a folder and set {env.WEIGHTS.name} to it{instead}"
        ) from None
    return target


def _check_server(url: str) -> None:
    """See that a server answers at all.

    torch.hub has no time limit: a network that drops packets would hang for minutes. That of urllib is of
    each of a name's addresses, and not of looking the name up. So this one is of a thread that does it all.

    Raises:
        OSError: it says no, or nothing in time.
    """
    answers: queue.Queue[Exception | None] = queue.Queue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PATIENCE):
                answers.put(None)
        except Exception as error:  # whatever it is, it is for the thread that waits
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answers.get(timeout=_PATIENCE)
    except queue.Empty:
        raise TimeoutError(f"no answer in {_PATIENCE:g} s") from None
    if error is not None:
        raise error


def _line(error: object) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def load_state_dict(name_or_path: object, progress: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weights file and its metadata.

    Args:
        name_or_path: as for `find_weights`. A path may be safetensors, or a torch file of tensors only; a
            state dict under the key `state_dict` or `model`, or of a DataParallel model, is unwrapped.
        progress: draw a bar while downloading.

    Returns:
        The state dict on the CPU, and the metadata; it has `weights` where the file says which of `WEIGHTS`
        it holds.

    Raises:
        UserError: the file is missing, truncated, of another format, needs code to run, or is not what its
            name says.
    """
    path = find_weights(name_or_path, progress)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check its permissions") from error
    # A zip archive or a pickle; a safetensors header has its JSON from byte 8 on, whatever the first two are.
    if start[:1] in (b"P", b"\x80") and start[8:] != b"{":
        state, metadata = _read_torch(path), dict[str, str]()
    else:
        state, metadata = _read_safetensors(path)
    published = identify(path, metadata)
    asked = row(name_or_path)
    if asked is not None:
        check_state_dict(state, expected_shapes(asked.num_classes), f"{asked.name} in {path}")
    if published is not None:
        metadata["weights"] = published.name
    return state, metadata


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return state, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is truncated or not a weights file (as safetensors: {_line(error)}): fetch it again, "
            "or give a .safetensors or a torch state dict"
        ) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    damaged = f"{path} is truncated or not a torch file"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # it is refused with a reason below
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|global)\s+`?([\w.]+)", str(error))
        if name or "unsupported" in str(error).lower():
            what = f"wants to run code ({name.group(1)})" if name else "may run code"
            raise UserError(
                f"{path} is a pickle that {what}: refused; "
                "save the model's state_dict() with safetensors or torch.save instead"
            ) from None
        raise UserError(f"{damaged} ({_line(error)}): fetch it again") from None
    except Exception as error:  # a damaged archive fails in many ways, each with its own exception
        raise UserError(
            f"{path} is truncated or not a torch file ({_line(error)}): fetch it again"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds no state dict (names and tensors only): save the model's state_dict()")
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def expected_shapes(
    num_classes: int = 1000,
    width_mult: float = 1.0,
    setting: Sequence[Sequence[int]] | None = None,
    round_nearest: int = 8,
) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a MobileNetV2's state dict, in torchvision's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in arch.network(num_classes, width_mult, setting, round_nearest):
        shapes[f"{spec.conv}.weight"] = spec.weight_shape
        if not spec.bn:
            shapes[f"{spec.conv}.bias"] = (spec.cout,)
            continue
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{spec.bn}.{name}"] = (spec.cout,)
        shapes[f"{spec.bn}.num_batches_tracked"] = ()
    return shapes


def check_state_dict(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Refuse a state dict whose keys or shapes are not the expected ones.

    `num_batches_tracked` may be absent, as in old files.

    Raises:
        UserError: one line that names `source` and says which keys or shapes differ, or which class count it
            has.
    """
    missing = [key for key in expected if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    differ = [key for key in expected if key in state and tuple(state[key].shape) != tuple(expected[key])]
    if not missing and not unexpected and not differ:
        return
    if not missing and not unexpected and all(key.startswith(HEAD) for key in differ):
        have, want = len(state[differ[0]]), expected[differ[0]][0]
        if any(tuple(state[key].shape[1:]) != tuple(expected[key][1:]) for key in differ):
            have = want = 0
        if have != want:
            raise UserError(
                f"{source} has {have} classes, {want} are wanted: "
                f"{differ[0]} is {tuple(state[differ[0]].shape)}; use num_classes={have}"
            )
    shapes = [f"{key} is {tuple(state[key].shape)}, wanted {tuple(expected[key])}" for key in differ]
    parts = [
        f"{label}{', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for label, keys in (("no ", missing), ("unknown ", unexpected), ("", shapes))
        if keys
    ]
    raise UserError(
        f"{source} does not fit this network: {'; '.join(parts)}; give weights of its architecture"
    )


def num_classes(state: Mapping[str, Tensor]) -> int | None:
    """How many classes a state dict is for; None where it has no classifier."""
    bias = state.get(f"{HEAD}1.bias")
    return None if bias is None or bias.dim() != 1 else len(bias)


def trunk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without its classifier: what is kept where the class count differs."""
    return {key: value for key, value in state.items() if not key.startswith(HEAD)}


def infer_width(state: Mapping[str, Tensor], source: str) -> float:
    """The `width_mult` of the standard network that a state dict fits.

    Raises:
        UserError: it fits none; says where it differs from the network of width 1.
    """
    classes = num_classes(state)
    if classes is not None:
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        for width in _WIDTHS:
            expected = expected_shapes(classes, width)
            stem = next(iter(expected))
            if shapes.get(stem) == expected[stem] and all(shapes.get(k, v) == v for k, v in expected.items()):
                check_state_dict(state, expected, source)
                return width
    check_state_dict(state, expected_shapes(classes or 1000), source)
    raise AssertionError("the network of width 1 would have fitted")


def width_of(layers: Sequence[arch.LayerSpec]) -> float | None:
    """The `width_mult` of the standard network that has these layers; None: they are those of no such."""
    return next((w for w in _WIDTHS if arch.network(layers[-1].cout, w) == tuple(layers)), None)


def labels_of(metadata: Mapping[str, str], classes: int) -> list[str] | None:
    """The class names a file carries (`labels`, a JSON list), ImageNet's where it has 1,000 classes, or None.

    Raises:
        UserError: its list does not have one name per class.
    """
    if "labels" in metadata:
        try:
            labels = json.loads(metadata["labels"])
        except json.JSONDecodeError:
            labels = None
        if not isinstance(labels, list) or len(labels) != classes:
            raise UserError(f"the metadata's labels are not a list of {classes} names: write one per class")
        return [str(label) for label in labels]
    return list(imagenet_labels()) if classes == len(imagenet_labels()) else None


def preprocessing_of(metadata: Mapping[str, str]) -> Preprocessing:
    """What images a file's weights expect: its `preprocessing` (JSON), or its published weights'.

    Raises:
        UserError: `preprocessing` is not what `Preprocessing.to_dict` writes.
    """
    if "preprocessing" in metadata:
        try:
            fields = json.loads(metadata["preprocessing"])
        except json.JSONDecodeError:
            fields = None
        if not isinstance(fields, dict):
            raise UserError("the metadata's preprocessing is no JSON object: write Preprocessing.to_dict()")
        return Preprocessing.from_dict(fields)
    published = row(metadata.get("weights", ""))
    return published.preprocessing if published else Preprocessing()
