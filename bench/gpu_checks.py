"""What `bench.gpu` checks before it times: every kernel, far and odd shapes, whole networks, against float64.

A check is a name and a call that says what is wrong, in a line, or nothing. Inputs are random and others at
each run; results begin as NaN, and an image that holds a NaN must spoil no other.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from bench import gpu_forms, gpu_network, gpu_training
from bench.gpu_forms import DTYPES, TIMED, Form, Probe, StepProbe, forms, has_blocks, usable
from bench.gpu_training_forms import training_forms
from kernels import (
    block,
    depthwise,
    depthwise_gradient,
    depthwise_project,
    head,
    norm,
    parts,
    pointwise,
    pointwise_gradient,
    stem,
    train_depthwise,
    train_pointwise,
    train_pointwise_gradient,
    train_stem,
)
from kernels.common import DTYPES as TYPES
from kernels.common import Tile, device_of, tiles
from mnv2_fast import arch

CHECK_BATCH = 3
ODD_SHAPES = ((1, 1, 1, 1), (3, 17, 15, 2), (2, 33, 7, 8), (1, 24, 1, 15))
# Elements of an activation that 32-bit offsets cannot reach.
FAR = 2**31
# Name, kind, whole blocks in one launch, photos as bytes.
Row = tuple[str, str, bool, bool]
NETWORKS: tuple[Row, ...] = (
    ("fused", "fp16", True, True),
    ("fused", "fp16", True, False),
    ("by layer", "fp16", False, True),
    ("by layer", "fp16", False, False),
)
OTHER_NETWORKS: tuple[Row, ...] = (
    ("fused", "bf16", True, True),
    ("by layer", "bf16", False, True),
    ("by layer", "fp32", False, True),
    ("by layer", "fp32", False, False),
    ("by layer", "tf32", False, True),
)
# Images of two batches that a graph of 4 serves, the first one once more at the end.
PHOTO_SEEDS = (1, 2, 1)


@dataclass(frozen=True)
class Check:
    """`run` says what is wrong; `subject`: the form or network whose timing depends on it, "" for none."""

    name: str
    subject: str
    run: Callable[[], str]


def checks() -> list[Check]:
    """All of them, those first that decide what is timed."""
    of_forms, of_steps = [form for form in forms() if usable(form)], training_forms()
    timed = [check for form in of_forms for check in form_checks(form, TIMED)]
    of_training = [check for form in of_steps for check in form_checks(form, TIMED)]
    of_odd = [*forms(odd_layers()), *training_forms(odd_layers())]
    odd = [check for form in of_odd for check in form_checks(form, TIMED)]
    return [
        *timed,
        *network_checks(NETWORKS),
        *training_checks(),
        *of_training,
        *far_checks(of_forms),
        *depthwise_checks(),
        *other_kinds([*of_forms, *of_steps]),
        *network_checks(OTHER_NETWORKS),
        *odd,
    ]


def form_checks(form: Form, kind: str) -> Iterator[Check]:
    """One check a tile that the launcher may choose, of a kind that the form has."""
    for row, tile in form.tiles(kind).items() if kind in form.kinds() else ():
        subject = str(form) if kind == TIMED else ""
        yield Check(f"{form}, {kind}, {row}", subject, functools.partial(check_form, form, kind, tile))


def other_kinds(of_forms: Sequence[Form]) -> Iterator[Check]:
    """Every third form of each name in every other kind."""
    seen: collections.Counter[str] = collections.Counter()
    for form in of_forms:
        if seen[form.name] % 3 == 0:
            for kind in form.kinds():
                yield from form_checks(form, kind) if kind != TIMED else ()
        seen[form.name] += 1


def odd_layers() -> list[arch.Layer]:
    """A small network whose channels and sizes are no multiple of anything."""
    specs = [arch.LayerSpec("stem", "", "", 3, 17, 2, True), *arch.inverted_residual("", 17, 17, 1, 3)]
    specs += [*arch.inverted_residual("", 17, 9, 2, 5), arch.LayerSpec("pointwise", "", "", 9, 41, 1, True)]
    return arch.layers(size=(43, 38), specs=[*specs, arch.LayerSpec("linear", "", "", 41, 7)])


def check_form(form: Form, kind: str, tile: Tile | None) -> str:
    """What is wrong with a kernel on a layer's shape, with one tile; one of the images has a NaN."""
    probe = form.make(CHECK_BATCH, kind, tile)
    if isinstance(probe, StepProbe):
        return check_step_probe(probe)
    if form.spreads and probe.x.is_floating_point():
        _, c, h, w = probe.x.shape
        probe.x[0, c // 2, h // 2, w // 2] = torch.nan
    probe.run()
    if why := judged(probe.out, *probe.judge()):
        return why
    first = probe.out.clone()
    probe.out.fill_(torch.nan)
    probe.run()
    return changed(first, probe.out)


def check_step_probe(probe: StepProbe) -> str:
    """What is wrong with what kernels of a training step make, without and with a NaN in their input."""
    for planted in (False, True):
        if planted:
            probe.planted[tuple(size // 2 for size in probe.planted.shape)] = torch.nan
        with poisoned():
            found, again = probe.run(), probe.run()
        for name, out, want, allowed in probe.judge(found):
            if why := judged(out, want, allowed):
                return f"{name}{', NaN planted' if planted else ''}: {why}"
        for first, second in zip(found, again, strict=True):
            if first is not None and second is not None and (why := changed(first, second)):
                return why
    return ""


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it memory that torch gives begins as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def changed(first: torch.Tensor, second: torch.Tensor) -> str:
    """What is wrong with the answer to a second call: it has the same bits, or is NaN likewise."""
    same = (second == first) | (second.isnan() & first.isnan())
    return "" if same.all() else f"{int((~same).sum())} values are others at the second call"


def judged(out: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> str:
    """What is wrong with `out`: NaN where float64 has none or none where it has, or numbers too far off."""
    if (lost := out.isnan() != want.isnan()).any():
        return f"{int(lost.sum())} of {want.numel()} values not written, or NaN lost or made"
    beyond = ~(((out - want).abs() <= allowed) | (out == want) | want.isnan())
    return f"{int(beyond.sum())} of {want.numel()} values beyond tolerance" if beyond.any() else ""


def depthwise_checks(shapes: Sequence[tuple[int, int, int, int]] = ODD_SHAPES) -> Iterator[Check]:
    """The depthwise kernel on shapes that no network has, with NaN and infinity planted."""
    for shape, stride, dtype in itertools.product(shapes, (1, 2), TYPES):
        run = functools.partial(check_depthwise, shape, stride, dtype)
        yield Check(f"depthwise {shape} stride {stride} {str(dtype).removeprefix('torch.')}", "", run)


def check_depthwise(shape: tuple[int, int, int, int], stride: int, dtype: torch.dtype) -> str:
    """What is wrong with the first wrong answer of every tile, with and without what is planted."""
    table = tiles(device_of(torch.device(gpu_forms.DEVICE))[0], "depthwise")
    n, c, h, w = shape
    for size, planted in itertools.product(("large", "small"), (None, float("nan"), float("inf"))):
        row = f"{size}_s{stride}"
        make = functools.partial(torch.randn, device=gpu_forms.DEVICE)
        x = make((n, h, w, c)).mul_(2).to(dtype).permute(0, 3, 1, 2)
        weight, bias = depthwise.pack_weight(make((c, 1, 3, 3)).to(dtype)), make(c).add_(2).to(dtype)
        if planted is not None:
            x[n - 1, c // 2, h // 2, w // 2] = planted
        want = depthwise.reference(x, weight, bias, stride, True)
        out = torch.full_like(want, torch.nan, dtype=dtype, memory_format=torch.channels_last)
        depthwise.depthwise(x, weight, bias, stride, True, out=out, tile=table[row])
        if why := judged(out, want, depthwise.tolerance(x, weight, bias, stride, want)):
            return f"{row}, {planted} planted: {why}"
    return ""


def far_checks(of_forms: Sequence[Form]) -> Iterator[Check]:
    """Images past 2**31 elements: depthwise, pointwise, and a whole block, whose input and result are as
    large.
    """
    specs = [
        arch.LayerSpec("depthwise", "", "", 96, 96, 1, True),
        arch.LayerSpec("pointwise", "", "", 96, 96),
    ]
    wide = forms(arch.layers(size=112, specs=specs))
    blocks = [form for form in of_forms if (form.name, form.size, form.layer[-2:]) == ("block", 56, "s1")]
    near = ("gradient", "then")
    for form in (*(form for form in wide if not any(word in form.name for word in near)), *blocks[:1]):
        yield Check(f"{form}, past 2**31 elements", "", functools.partial(check_far, form))


def check_far(form: Form) -> str:
    """What is wrong with the last image of a batch whose last images begin past 2**31 elements."""
    tile = next(iter(form.tiles(TIMED).values()))
    probe = form.make(1, TIMED, tile)
    assert isinstance(probe, Probe)
    n = FAR // min(probe.x.numel(), probe.out.numel()) + 2
    needed = n * (probe.x.numel() + probe.out.numel()) * probe.out.element_size()
    if gpu_forms.DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 1.1 * needed:
        raise MemoryError(f"it needs {needed >> 30} GiB of free memory")

    def many(like: torch.Tensor, value: float) -> torch.Tensor:
        _, c, h, w = like.shape
        return torch.full((n, h, w, c), value, dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)

    x, out = many(probe.x, 0.0), many(probe.out, torch.nan)
    x[-1:] = probe.x
    probe.call(x, out)
    return judged(out[-1:], *probe.judge())


def training_checks() -> Iterator[Check]:
    """A training step in each dtype."""
    for name, run in gpu_training.checks():
        yield Check(name, "training" if name.endswith(TIMED) else "", run)


def network_checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Whole networks, each with photos as bytes or as numbers."""
    for name, kind, fuse, from_bytes in rows:
        if fuse and not has_blocks():
            continue
        subject = f"network {name}" if kind == TIMED else ""
        named = f"network {name}, {kind}, photos as {'bytes' if from_bytes else 'numbers'}"
        yield Check(named, subject, functools.partial(check_network, kind, fuse, from_bytes))


def check_network(kind: str, fuse: bool, from_bytes: bool) -> str:
    """What is wrong with an engine's logits of three photos in a graph of four, twice, beside torch's error.

    At most twice as far off as torch; in TF32, which cuts bits off where float16 rounds them, twice that of
    float16.
    """
    model = gpu_network.settled_network()
    dtype, tf32 = DTYPES[kind]
    run = gpu_network.engine(model, kind, fuse)
    for seed in PHOTO_SEEDS:
        photos = gpu_network.photos(CHECK_BATCH, seed)
        want = gpu_network.torchs_answer(model, photos, torch.float64)
        theirs = gpu_network.torchs_answer(model, photos, torch.float16 if tf32 else dtype)
        allowed = (4 if tf32 else 2) * (theirs - want).abs().max()
        if not (alike := (want[0] - want[1]).abs().max()) > 4 * allowed:
            return f"its photos differ by {alike:.3g} in float64, too little to tell"
        got = run(photos if from_bytes else gpu_network.as_numbers(photos, dtype).contiguous())
        if not (error := (got - want).abs().max()) <= allowed:
            return f"logits of photos {seed} off by {error:.3g}, {allowed:.3g} are allowed"
    return ""


def _functions() -> list[Any]:
    of_layers = (block, depthwise, depthwise_gradient, depthwise_project, head, parts, pointwise)
    of_steps = (norm, train_depthwise, train_pointwise, train_pointwise_gradient, train_stem)
    modules = (*of_layers, pointwise_gradient, stem, *of_steps)
    found = {id(f): f for m in modules for f in vars(m).values() if isinstance(f, triton.runtime.JITFunction)}
    return list(found.values())


def forget_kernels() -> None:
    """Have the next launches take their kernels from the disk again, for `spilled` to see them alone."""
    for function in _functions():
        function.device_caches.clear()


def spilled() -> int:
    """Registers that the kernels launched since `forget_kernels` keep in memory for want of room."""
    caches = [cache for function in _functions() for cache in function.device_caches.values()]
    return sum(kernel.n_spills or 0 for cache in caches for kernel in cache[0].values())
