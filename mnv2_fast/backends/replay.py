"""A network replayed as CUDA graphs: two copies and one launch, no wait for the GPU."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

# Batches that have a graph of their own. Others are padded to the next one: with the images of a call before.
SMALL = (1, 2, 4, 8, 16, 32)
STEP, MOST = 32, 1024
# Graphs kept, each with the memory of its activations; the one that was not used for longest goes.
KEPT = 16

Run = Callable[[Tensor], Tensor]


@dataclass
class Graph:
    """One captured batch: `replay` reads `x` and fills `y`. `lock`: a call's three launches stay together."""

    replay: Callable[[], object]
    x: Tensor
    y: Tensor
    lock: threading.Lock


def bucket(n: int) -> int:
    """The batch of the graph that serves n images, at most MOST of them."""
    return next((size for size in SMALL if size >= n), -(-n // STEP) * STEP)


def capture(run: Run, x: Tensor) -> Graph:
    """Record `run` on x. Kernels are compiled before that, by a call of their own."""
    with torch.cuda.device(x.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what a capture may not have, such as new memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = run(x)
    return Graph(graph.replay, x, y, threading.Lock())


def place(x: Tensor) -> Hashable:
    """What a graph's memory may be shared by: the calls of one stream."""
    return torch.cuda.current_stream(x.device).cuda_stream


def capturing() -> bool:
    """Whether the surrounding code records a graph of its own, into which our launches then go."""
    return torch.cuda.is_current_stream_capturing()


class Replayed:
    """`run`, from images [N, ...] to [N, classes], by graphs that are captured when a batch first comes.

    Graphs are of one batch size, image shape, type and stream. Several threads may call at once.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        """The answer, in memory of its own.

        Raises:
            MemoryError: the batch needs more memory than the GPU has; later calls are served.
        """
        if capturing():
            return self._run(x)
        try:
            return self._parts(x)
        except torch.cuda.OutOfMemoryError:
            with self._lock:
                self._graphs.clear()  # whose memory may be all that the call lacks
        try:
            return self._parts(x)
        except torch.cuda.OutOfMemoryError:
            with self._lock:
                self._graphs.clear()
        n, *size = x.shape
        raise MemoryError(
            f"{n} images of {size} need more memory than the GPU has: use smaller batches or images"
        )

    def _parts(self, x: Tensor) -> Tensor:
        # Memory made in inference mode could not be written outside of it, in a later call.
        with torch.inference_mode(False), torch.no_grad():
            parts = [self._part(part) for part in x.split(MOST)] if len(x) else [self._run(x)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, x: Tensor) -> Tensor:
        graph = self._graph(x)
        with graph.lock:
            graph.x[: len(x)].copy_(x)
            graph.replay()
            return graph.y[: len(x)].clone()

    def _graph(self, x: Tensor) -> Graph:
        size = bucket(len(x))
        dense = x.is_contiguous() or x.dim() != 4
        key = (place(x), size, x.shape[1:], x.dtype, dense)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                layout = torch.contiguous_format if dense else torch.channels_last
                static = torch.zeros((size, *x.shape[1:]), dtype=x.dtype, device=x.device)
                graph = self._graphs[key] = capture(self._run, static.contiguous(memory_format=layout))
                while len(self._graphs) > KEPT:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
        return graph
