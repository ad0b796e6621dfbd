"""What `bench.gpu` times: a copy, the network by batch and every kernel, each beside torch's."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import gpu_forms, gpu_network, gpu_training
from bench.gpu_children import in_one_line
from bench.gpu_forms import DTYPES, TIMED, Form, forms, has_blocks, usable
from bench.gpu_training_forms import training_forms
from mnv2_fast import arch

# The two that must not be missing first.
BATCHES = (256, 1, 32, 1024, 8)
FORM_BATCH = 256
# Calls of a kernel are for so many ms: all the kernels share about a minute.
FORM_MS = 40
DEPTHWISE = ("depthwise", "depthwise input gradient", "depthwise weight gradient")
# Kernels of a step that are timed on three shapes of their 60: they make sums of parts, and one pass each.
SMALL = ("train normalize", "train norm gradient", "train activate", "train sums")
COPY_BYTES = 2**30
OURS, EAGER, COMPILED = "mnv2_fast", "torch eager channels_last", "torch.compile max-autotune"
TRAINING, GRAPH = "training step", ", CUDA graph"
NO_GRAPH = "no graph"
# Who makes it: name, `time_step`'s word.
STEPS = ((OURS, "ours"), (EAGER, "eager"), ("torch.compile channels_last", "compiled"))
# Our networks: their name, whether whole blocks are one launch.
FORMS_OF_OURS = (("fused", True), ("by layer", False))

Times = tuple[float, float, float]  # median, 20% and 80% quantile, ms


@dataclass(frozen=True)
class Work:
    """One measurement; `subject`: the check that it depends on, "" for none."""

    name: str
    contender: str
    subject: str
    batch: int
    run: Callable[[], Any]
    form: Form | None = None


def works() -> list[Work]:
    """All measurements but torch.compile's of networks, the copy first."""
    copy = Work("copy", "", "", 1, measure_copy)
    return [copy, *network_works(), *training_works(), *form_works()]


def training_works() -> list[Work]:
    """A training step on our kernels and in torch, by batch, and as one CUDA graph what is not eager."""
    found = []
    for batch in gpu_training.BATCHES:
        for graph, (name, contender) in itertools.product((False, True), STEPS):
            if not (graph and contender == "eager"):
                run = functools.partial(gpu_training.time_step, batch, contender, graph=graph)
                found.append(Work(TRAINING, name + GRAPH * graph, "training", batch, run))
    return found


def network_works() -> list[Work]:
    """The network on our kernels and in torch, by batch."""
    found = []
    for batch in BATCHES:
        for name, fuse in FORMS_OF_OURS:
            if not fuse or has_blocks():
                run = functools.partial(time_ours, batch, fuse)
                found.append(Work("network", f"{OURS} {name}", f"network {name}", batch, run))
        found.append(Work("network", EAGER, "", batch, functools.partial(time_torch, batch)))
    return found


def form_works() -> list[Work]:
    """Every kernel that this GPU has, and torch's way to make the same, what matters most first."""
    found = [form for form in (*forms(), *training_forms()) if usable(form) and TIMED in form.kinds()]
    return [
        Work(str(form), OURS, str(form), FORM_BATCH, functools.partial(time_form, form), form)
        for form in sorted(_few_of_small(found), key=_matters)
    ]


def _matters(form: Form) -> int:
    """The place of a kernel among those that are timed: depthwise first, where torch is weak, that of a step
    behind; products last, of which torch's are good, too, but for a step's, which fuse what is around them.
    """
    if form.name in DEPTHWISE:
        return 0
    if form.name.startswith("train"):
        return 1 if form.name.startswith("train depthwise") else 3
    return 4 if form.name.startswith("pointwise") else 2


def _few_of_small(found: Sequence[Form]) -> list[Form]:
    """All of these, but of each kernel of `SMALL` three shapes."""
    kept: list[Form] = []
    for name in dict.fromkeys(form.name for form in found):
        some = [form for form in found if form.name == name]
        kept += three(some) if name in SMALL else some
    return kept


def three(some: Sequence[Form]) -> list[Form]:
    """The first, the one in the middle and the last."""
    return [some[0], some[len(some) // 2], some[-1]] if len(some) > 3 else list(some)


def timed(call: Callable[[], object], rep: int = 100) -> Times:
    """Milliseconds on the GPU, its L2 flushed before each call; calls for `rep` ms."""
    from triton.testing import do_bench

    median, low, high = do_bench(call, warmup=min(25, rep), rep=rep, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def timed_launches(call: Callable[[], object], rep: int = FORM_MS) -> tuple[Times, str]:
    """Times of what a call launches, replayed as one CUDA graph; or of the call itself, and why no graph can
    be made of it.

    A training step's call makes several tensors and launches up to three kernels: on small maps the host
    takes longer for that than the GPU, and is what would be timed.
    """
    run, why = call, ""
    try:
        run = gpu_training.graphed(call)
    except RuntimeError as error:
        why = in_one_line(error)
    return timed(run, rep), why


def measure_copy() -> dict[str, Any]:
    """GB/s of a device-to-device copy, bytes read and bytes written both counted; and the bytes an image
    that each way to run the network must move.
    """
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=gpu_forms.DEVICE)
    target = torch.empty_like(source)
    gbs = 2 * COPY_BYTES / timed(lambda: target.copy_(source))[0] / 1e6
    return {"gbs": gbs, "floors": floors()}


def floors() -> dict[str, float]:
    """Bytes an image that a network of fp16 reads and writes, from photos of bytes, in a large batch.

    Layer by layer each activation once, weights left out; in whole blocks as the launchers count what theirs
    move, halo and weights included.
    """
    size = gpu_network.SIZE
    found = {"layer by layer": 2.0 * sum(layer.elements for layer in arch.layers(size=size))}
    if has_blocks():
        network = gpu_network.our_network(gpu_network.settled_network(), TIMED, True)
        found["whole blocks"] = network.traffic(FORM_BATCH, size, size, 1) / FORM_BATCH
    return found


@functools.cache
def _model() -> nn.Module:
    torch.backends.cudnn.benchmark = True
    return gpu_network.settled_network()


def _photos(batch: int) -> Tensor:
    """A batch of bytes, of which few are made: the GPU takes the same time for all."""
    some = gpu_network.photos(min(batch, 32), 0)
    return some.repeat(-(-batch // len(some)), 1, 1, 1)[:batch]


def time_ours(batch: int, fuse: bool) -> Times:
    """Of photos as bytes, from the call to the logits, as an engine serves them."""
    run = gpu_network.engine(_model(), TIMED, fuse)
    x = _photos(batch)
    return timed(lambda: run(x))


def time_torch(batch: int, compiled: bool = False) -> Times:
    """Of normalised fp16 photos in channels_last: eager, or compiled with its weights frozen."""
    dtype = DTYPES[TIMED][0]
    model = deepcopy(_model()).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = gpu_network.as_numbers(_photos(batch), dtype)
    call: Callable[[Tensor], object] = model
    if compiled:
        from torch._inductor import config

        config.freezing = True
        call = torch.compile(model, mode="max-autotune")
    with torch.no_grad():
        for _ in range(3):  # the CUDA graph is recorded in one of them
            call(x)
        return timed(lambda: call(x))


def time_form(form: Form) -> dict[str, Any]:
    """Times of our kernel and of torch's, which may be why there are none, the bytes that must move, and by
    contender why what is timed is no graph.
    """
    torch.backends.cudnn.benchmark = True
    probe = form.make(FORM_BATCH, TIMED)
    found: dict[str, Any] = {"bytes": probe.bytes, NO_GRAPH: {}}
    found[OURS], found[NO_GRAPH][OURS] = timed_launches(probe.run)
    try:
        found[EAGER], found[NO_GRAPH][EAGER] = timed_launches(probe.eager)
    except RuntimeError as error:
        found[EAGER] = in_one_line(error)
    return found
