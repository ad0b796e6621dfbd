"""From photos to class names: `Predictor("m.safetensors")("a.jpg")`."""

from __future__ import annotations

import json
import operator
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from . import data, engine, machine, weights
from .engine import Engine
from .errors import UserError
from .model import MobileNetV2, mobilenet_v2
from .recipe import DEFAULT_WEIGHTS
from .weights import BOXED, MissingWeightsError, Preprocessing

Prediction = dict[str, Any]
Outcome = list[Prediction] | UserError | OSError
Source = TypeVar("Source")


class Predictor:
    """Classifies photos.

    Args:
        model: the file of `Engine.save`; a weights file; a name of published weights, or `flowers`, which
            comes with the package; an Engine; or a model.
        top_k: classes per photo, best first; all of them where there are fewer.
        batch_size: photos per call of the network, where there are several.
        threads: that share one photo, or each take photos of many from file to answer; torch's number by
            default.
        dtype: arithmetic of the network; by default the engine's own, else "fp32".
        labels: one name per class, instead of those of the model; a class without a name has its number.
        preprocessing: instead of that of the model.
        progress: draw a bar while weights are downloaded.

    Raises:
        UserError: the model cannot be had or frozen, or an argument makes no sense.
        TypeError: model is none of these.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Engine | nn.Module,
        *,
        top_k: int = 5,
        batch_size: int = 8,
        threads: int | None = None,
        dtype: str | None = None,
        labels: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        progress: bool = True,
    ) -> None:
        self.top_k = _at_least_one(top_k, "top_k")
        self.batch_size = _at_least_one(batch_size, "batch_size")
        self.engine = _engine(model, dtype, engine.check_threads(threads), progress)
        self.preprocessing = preprocessing or self.engine.preprocessing
        classes = self.engine.num_classes
        names = self.engine.labels if labels is None else labels
        self.labels = list(map(str, range(classes) if names is None else names))
        if len(self.labels) != classes:
            raise UserError(f"{len(self.labels)} labels for {classes} classes: give one name per class")

    def __call__(self, source: Any, top_k: int | None = None) -> list[Any]:
        """The best classes of one photo or of several.

        Args:
            source: one photo (what `data.read_image` takes: path, PIL image, bytes, uint8 array [H, W, 3]);
                or several: a list, an array [N, H, W, 3], or the path of a folder or a pattern, in the order
                of `data.expand_inputs`.
            top_k: instead of the Predictor's.

        Returns:
            [{"label": name, "score": probability}, ...], best first; for several photos, a list of such
            lists.

        Raises:
            UserError: a photo cannot be used; `stream` goes on past one.
            TypeError: source is no photo.
        """
        k = self.top_k if top_k is None else _at_least_one(top_k, "top_k")
        if data.is_many(source):
            source = data.expand_inputs([source])
        elif isinstance(source, np.ndarray | Tensor) and source.ndim == 4:
            source = list(source)
        if not isinstance(source, list | tuple):
            return self._classify(self.engine, [self._see(source)], k)[0]
        results = []
        for _, result in self._stream(source, k):
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results

    def stream(self, sources: Iterable[Source], top_k: int | None = None) -> Iterator[tuple[Source, Outcome]]:
        """Each photo with its classes, or with the error where it cannot be used, in the order given.

        Two batches per thread are taken ahead at most: memory does not grow with the number of photos.

        Args:
            sources: photos, as for a call with one.
            top_k: instead of the Predictor's.
        """
        return self._stream(sources, self.top_k if top_k is None else _at_least_one(top_k, "top_k"))

    def _stream(self, sources: Iterable[Source], k: int) -> Iterator[tuple[Source, Outcome]]:
        # Each thread takes a batch from file to answer, its engine on one thread: none waits for another.
        threads = min(self.engine.threads or torch.get_num_threads(), machine.cores())
        network, size, stop = self.engine.with_threads(1), self.batch_size, threading.Event()
        if isinstance(sources, Sized):
            size = min(size, max(1, -(-len(sources) // threads)))  # something for everyone
        pool = ThreadPoolExecutor(threads, "mnv2-photos")
        waiting: deque[tuple[list[Source], Future[list[Outcome]]]] = deque()
        rest = iter(sources)
        try:
            while batch := list(islice(rest, size)):
                waiting.append((batch, pool.submit(self._work, network, batch, k, stop)))
                if len(waiting) == 2 * threads:
                    done, future = waiting.popleft()
                    yield from zip(done, future.result(), strict=True)
            while waiting:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _work(self, network: Engine, batch: list[Source], k: int, stop: threading.Event) -> list[Outcome]:
        errors: dict[int, UserError | OSError] = {}
        seen = []
        for i, source in enumerate(batch):
            if stop.is_set():  # nobody waits for the answer
                return []
            try:
                seen.append(self._see(source))
            except (UserError, OSError) as error:
                errors[i] = error
        results = iter(self._classify(network, seen, k))
        return [errors[i] if i in errors else next(results) for i in range(len(batch))]

    def _see(self, source: Any) -> np.ndarray:
        return data.resize_and_crop(data.read_image(source), self.preprocessing)

    def _classify(self, network: Engine, images: Sequence[np.ndarray], k: int) -> list[list[Prediction]]:
        if not images:
            return []
        x = torch.from_numpy(np.stack(images))
        own, folded = self.preprocessing, network.preprocessing
        if (own.mean, own.std) != (folded.mean, folded.std):
            x = data.normalize(x, own)
        scores = torch.softmax(network(x).double(), 1)
        if not scores.isfinite().all():
            raise UserError("the network gives NaN for this photo: its weights are damaged, fetch them again")
        best = scores.topk(min(k, scores.shape[1]), 1)
        return [
            [{"label": self.labels[i], "score": score} for i, score in zip(classes, values, strict=True)]
            for classes, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def _at_least_one(value: int, name: str) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise UserError(f"{name}={value!r}: give a whole number of at least 1")
    return number


def _engine(model: Any, dtype: str | None, threads: int | None, progress: bool) -> Engine:
    if dtype is not None:
        engine.check_dtype(dtype)
    if isinstance(model, Engine):
        if threads is not None and threads != model.threads:
            raise UserError(
                f"the engine has threads={model.threads}: give threads to compile or load instead"
            )
        found = model
    elif isinstance(model, nn.Module):
        return engine.compile(model, dtype or "fp32", threads)
    elif not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"a model is a path, a name of weights, an Engine or a module, not {type(model).__name__}"
        )
    elif is_engine(model):
        found = engine.load(model, threads)
    else:
        return engine.compile(load_model(model, progress), dtype or "fp32", threads)
    if dtype is not None and dtype != found.dtype:
        raise UserError(f"the engine is {found.dtype}, not {dtype}: compile its model with dtype={dtype!r}")
    return found


def default_model() -> str:
    """The name of what is taken where no model is named: published weights.

    Where these are neither here nor to be downloaded, it is the engine in the package, which a warning says.
    """
    try:
        weights.find_weights(DEFAULT_WEIGHTS)
    except MissingWeightsError as error:
        engine = BOXED[0]
        known = json.loads(weights.read_metadata(engine.path)["labels"])
        warnings.warn(
            f"{error}; until then {engine.name} answers, which is in the package and knows "
            f"{', '.join(known[:-1])} and {known[-1]}",
            stacklevel=2,
        )
        return engine.name
    return DEFAULT_WEIGHTS


def load_model(name_or_path: str | os.PathLike[str], progress: bool = True) -> MobileNetV2:
    """The network of a weights file or of published weights, in eval mode.

    Raises:
        UserError: there are no such weights, they are no MobileNetV2's, or the file is an engine.
    """
    if is_engine(name_or_path):
        raise UserError(f"{name_or_path} is an engine, which has no model: give the weights it was made of")
    return mobilenet_v2(weights=name_or_path, progress=progress).eval()


def is_engine(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this is an engine of the package, or a file that says that `Engine.save` wrote it."""
    if weights.row(name_or_path) is not None:
        return False
    if weights.boxed(name_or_path) is not None:
        return True
    metadata = weights.read_metadata(Path(name_or_path).expanduser())
    return metadata.get("format") == weights.ENGINE_FORMAT
