"""A network replayed as CUDA graphs: two copies and one launch, no wait for the GPU."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, cuda

# Batches that have a graph of their own. Others are padded to the next one: with the images of a call before.
SMALL = (1, 2, 4, 8, 16, 32)
STEP, MOST = 32, 1024
# Graphs kept, each with memory for images and answers; the one that was not used for longest goes.
KEPT = 16

Run = Callable[[Tensor], Tensor]


# CUDA takes concurrent captures only where each thread keeps to what the others' allow: one at a time.
_capture = threading.Lock()


@dataclass(eq=False)
class Graph:
    """One captured batch: `replay` reads `x` and fills `y`, in memory of `pool`."""

    replay: Callable[[], object]
    x: Tensor
    y: Tensor
    pool: Any = None


@dataclass(eq=False)
class Lane:
    """What all graphs of one stream share, whoever captured them.

    They never run at once, so that one set of activations serves them all: memory that one capture has freed
    is another one's. A replay then writes into what others left behind. Nothing of that is read again: inputs
    are not of the pool, and an answer is cloned before the next replay, for which the calls of a stream hold
    `lock`. Captures are on one `stream`, or torch would not give one the memory of another.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    graphs: weakref.WeakSet[Graph] = field(default_factory=weakref.WeakSet)
    stream: cuda.Stream | None = None


_lanes: dict[Hashable, Lane] = {}


def bucket(n: int) -> int:
    """The batch of the graph that serves n images, at most MOST of them."""
    return next((size for size in SMALL if size >= n), -(-n // STEP) * STEP)


def capture(run: Run, x: Tensor, lane: Lane) -> Graph:
    """Record `run` on x. Kernels are compiled and weights packed before that, by a call of their own."""
    with _capture, cuda.device(x.device):
        before, stream = cuda.current_stream(), lane.stream or cuda.Stream()
        lane.stream = stream
        try:
            stream.wait_stream(before)
            try:
                with cuda.stream(stream):
                    run(x)
            finally:
                before.wait_stream(stream)  # which may still read x
            # A pool ends with its last graph: one of them is held until this one is there.
            others = list(lane.graphs)
            graph, pool = cuda.CUDAGraph(), others[0].pool if others else cuda.graph_pool_handle()
            # Other threads may go on with what a capture may not have, such as new memory.
            with cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                y = run(x)
        finally:
            cuda.set_stream(before)  # torch leaves the capture's where that fails
        captured = Graph(graph.replay, x, y, pool)
        lane.graphs.add(captured)
    return captured


def place(x: Tensor) -> Hashable:
    """What graphs are of: the device and the stream of a call."""
    return x.device.index, cuda.current_stream(x.device).cuda_stream


def lane_of(where: Hashable) -> Lane:
    """What the graphs of a `place` share."""
    return _lanes.get(where) or _lanes.setdefault(where, Lane())


def capturing(device: torch.device) -> bool:
    """Whether the surrounding code records a graph of its own on a device, where our launches then go."""
    with cuda.device(device):
        return cuda.is_current_stream_capturing()


class Replayed:
    """`run`, from images [N, ...] to [N, classes], by graphs that are captured when a batch first comes.

    Graphs are of one batch size, image shape, type and stream. Several threads may call at once.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._ran: set[Hashable] = set()  # batches whose kernels are compiled and weights packed
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        """The answer, in memory of its own; no gradients.

        Raises:
            MemoryError: the batch needs more memory than the GPU has; later calls are served.
            RuntimeError: the caller captures a graph, and no such batch has been run before.
        """
        # Memory made in inference mode could not be written outside of it, in a later call.
        with torch.inference_mode(False), torch.no_grad():
            if capturing(x.device):
                return _joined([self._launch(part) for part in x.split(MOST)])
            for _ in range(2):
                try:
                    return _joined([self._part(part) for part in x.split(MOST)] if len(x) else [self._run(x)])
                except cuda.OutOfMemoryError:
                    with self._lock:
                        self._graphs.clear()  # whose memory may be all that the call lacks
        n, *size = x.shape
        raise MemoryError(
            f"{n} images of {size} need more memory than the GPU has: use smaller batches or images"
        )

    def _launch(self, x: Tensor) -> Tensor:
        """The launches of a graph, into the caller's: what must not be captured has been done before.

        Memory is allowed, for torch takes it from the pool of the caller's graph.
        """
        batch = _batch(x)
        if batch not in self._ran:
            n, *size = x.shape
            raise RuntimeError(
                "kernels cannot be compiled while a CUDA graph is captured: "
                f"call once with {n} images of {size} before the capture"
            )
        static = _static(x)
        static[: len(x)].copy_(x)
        return self._run(static)[: len(x)]

    def _part(self, x: Tensor) -> Tensor:
        where = place(x)
        graph = self._graph(x, where)
        with lane_of(where).lock:
            graph.x[: len(x)].copy_(x)
            graph.replay()
            return graph.y[: len(x)].clone()

    def _graph(self, x: Tensor, where: Hashable) -> Graph:
        batch = _batch(x)
        key = where, batch
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._graphs[key] = capture(self._run, _static(x).zero_(), lane_of(where))
                self._ran.add(batch)
                while len(self._graphs) > KEPT:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
        return graph


def _batch(x: Tensor) -> Hashable:
    """What launches depend on: of one batch all are the same."""
    return bucket(len(x)), x.shape[1:], x.dtype, _layout(x)


def _layout(x: Tensor) -> torch.memory_format:
    dense = x.is_contiguous() or x.dim() != 4
    return torch.contiguous_format if dense else torch.channels_last


def _static(x: Tensor) -> Tensor:
    """Memory for x and the images that fill its bucket."""
    shape = bucket(len(x)), *x.shape[1:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
