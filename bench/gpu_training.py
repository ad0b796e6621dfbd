"""A training step that `bench.gpu` checks and times: on our kernels as modules run it, and in plain torch.

Batch statistics, under autocast. From a bare checkout: our step is that of `mnv2_fast.training`, given the
layers of a plain network, since the modules themselves need the extension.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from bench import gpu_forms, gpu_network
from bench.gpu_forms import DTYPES

# Loss -> gradients that float16 has room for.
SCALE = 1024.0
CHECK_BATCH = 8
BATCHES = (256, 64)
KINDS = ("fp16", "bf16", "tf32")
# A gradient matters where torch is nearer to float64 than this; one as far as that is wrong.
MATTERS, WRONG = 0.1, 0.4

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def our_step(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The loss of a plain network in train mode, whose gradients our kernels make."""
    # Under the name by which an installed package knows them.
    sys.modules.setdefault("mnv2_fast.kernels", kernels)
    from mnv2_fast import training, training_head

    layers, tensors = [], []
    for spec, layer in zip(model.specs, model.layers, strict=True):  # type: ignore[arg-type]
        if spec.kind != "linear":
            layers.append(training.TrainLayer(spec, layer[1]))
            tensors += [layer[0].weight, layer[1].weight, layer[1].bias]
    y = training.run_joined(images, training.TrainChain(tuple(layers), tuple(tensors), False))
    weight, bias = list(model.parameters())[-2:]
    return F.cross_entropy(training_head.run(y, weight, bias).float(), targets)


def torchs_step(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The same in plain torch."""
    return F.cross_entropy(model(images).float(), targets)


def _autocast(dtype: torch.dtype) -> torch.autocast:
    cast = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(gpu_forms.DEVICE, dtype if cast else torch.float16, enabled=cast)


def gradients(step: Step, model: nn.Module, photos: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Of all parameters of a copy of the model, float64, and its running statistics after the step."""
    model = deepcopy(model).train()
    if dtype == torch.float64:
        model.double()
    images = gpu_network.as_numbers(photos, torch.float64 if dtype == torch.float64 else torch.float32)
    targets = torch.arange(len(photos), device=photos.device)
    with _autocast(dtype):
        loss = step(model, images, targets)
    (loss * SCALE).backward()
    found = [p.grad.double() / SCALE for p in model.parameters() if p.grad is not None]
    return [*found, *(b.double() for b in model.buffers() if b.is_floating_point())]


def check_step(kind: str, step: Step = our_step) -> str:
    """What is wrong with a step's gradients and statistics beside float64: in the median of all tensors, of
    which twice torch's error is allowed, or in any one.
    """
    model = gpu_network.settled_network(CHECK_BATCH)
    photos = gpu_network.photos(CHECK_BATCH, 3)
    want = gradients(torchs_step, model, photos, torch.float64)
    errors = []
    for who in (step, torchs_step):
        found = gradients(who, model, photos, DTYPES[kind][0])
        if len(found) != len(want):
            return f"{len(found)} gradients and statistics, not {len(want)}"
        pairs = zip(found, want, strict=True)
        errors.append(torch.stack([(a - b).norm() / b.norm().clamp_min(1e-6) for a, b in pairs]))
    ours, torchs = errors
    if not ours.median() <= 2 * torchs.median():
        return f"median relative error {ours.median():.3g}, torch's {torchs.median():.3g}"
    # Some gradients are zero but for rounding, for torch, too.
    if not (worst := ours[torchs < MATTERS].max()) <= WRONG:
        return f"largest relative error {worst:.3g} where torch's is below {MATTERS}"
    return ""


@dataclass(frozen=True)
class Graphed:
    """The replay of a CUDA graph, which is kept with the call that it was made of: with what it reads."""

    graph: torch.cuda.CUDAGraph
    call: Callable[[], object]

    def __call__(self) -> None:
        self.graph.replay()


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """A call as one CUDA graph: what it launches, without what the host takes for it. Its results are written
    to memory of the graph's own.

    Raises:
        RuntimeError: no graph can be made of it, or it fails by itself.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture is on a stream of its own, which has memory of its own
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return Graphed(graph, call)


def time_step(batch: int, contender: str, *, graph: bool = False) -> dict[str, Any]:
    """Median and quantiles in ms of forward and backward in fp16, and the most memory, MB, over the model's.

    contender: "ours", "eager" (channels_last) or "compiled" (channels_last). graph: as one CUDA graph.
    """
    from bench.gpu_times import timed

    model = gpu_network.settled_network().train()
    some = gpu_network.as_numbers(gpu_network.photos(32, 0), torch.float32)
    images = some.repeat(-(-batch // len(some)), 1, 1, 1)[:batch]
    targets = torch.arange(batch, device=images.device)
    step: Step = our_step
    if contender != "ours":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
        step = torch.compile(torchs_step) if contender == "compiled" else torchs_step

    def call() -> None:
        with _autocast(torch.float16):
            loss = step(model, images, targets)
        (loss * SCALE).backward()
        model.zero_grad(set_to_none=True)

    held = torch.cuda.memory_allocated()
    for _ in range(3):
        call()
    torch.cuda.reset_peak_memory_stats()
    run = graphed(call) if graph else call
    run()
    peak = (torch.cuda.max_memory_allocated() - held) / 1e6
    return {"times": timed(run), "peak_mb": peak}


def checks() -> Sequence[tuple[str, Callable[[], str]]]:
    """(name, what says why it is wrong) of each dtype, that which is timed first."""
    return [(f"training step, {kind}", functools.partial(check_step, kind)) for kind in KINDS]
