"""The kernels of a training step, rows like those of `gpu_forms`: on each layer, in the form that a step has.

Layers that add nothing and stand in a row are one node of autograd: within it a layer reads a raw output with
its norm, the first one what the node before has activated.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from torch import Tensor

from bench import gpu_training_probes as probes
from bench.gpu_forms import DTYPES, TIMED, Form, Make, StepProbe, merged
from bench.gpu_training_probes import Run
from kernels import norm, train_depthwise, train_pointwise, train_pointwise_gradient, train_stem
from kernels.common import Tile, arithmetic, tiles
from mnv2_fast import arch


def runs(layers: Sequence[arch.Layer]) -> list[Run]:
    """The layers of a step but the classifier, in order."""
    convolutions = [layer for layer in layers if layer.spec.kind != "linear"]
    begins, adding = {0, len(convolutions)}, set()
    for i, layer in enumerate(convolutions):
        if back := layer.spec.residual:
            begins |= {i - back, i + 1}
            adding |= set(range(i - back, i + 1))
    found = []
    for i, layer in enumerate(convolutions):
        before = "relu6" if i and convolutions[i - 1].spec.relu6 else "linear"
        found.append(Run(layer, "" if i in begins else before, i + 1 in begins, i in adding))
    return found


def training_forms(layers: Sequence[arch.Layer] | None = None, *, all_apart: bool = False) -> list[Form]:
    """Every kernel of every distinct layer, in the network's order.

    `all_apart`: a kernel for each gradient of every 1x1 layer, not only where the default table has them.
    """
    found = runs(arch.layers() if layers is None else layers)
    return merged(form for run in found for form in _all(run, all_apart))


def _all(run: Run, all_apart: bool) -> Iterator[Form]:
    if run.layer.spec.kind == "stem":
        yield from _of_stem(run)
    elif run.layer.spec.kind == "depthwise":
        yield from _of_depthwise(run)
    else:
        yield from _of_pointwise(run)
        yield from _apart(run, all_apart)
    yield from _of_norms(run)


def _of_stem(run: Run) -> Iterator[Form]:
    facts = *run.facts, run.layer.macs, 1
    for name, make in (("train stem", probes.forward), ("train stem gradient", probes.gradients)):
        yield Form(name, *facts, _Making(make, run, train_stem, "train_stem", "{}"), "train_stem")


def _of_depthwise(run: Run) -> Iterator[Form]:
    table, (words, size), macs = "train_depthwise", run.facts, run.layer.macs
    for name, what, make, count in (
        ("train depthwise", "forward", probes.forward, 1),
        ("train depthwise gradients", "gradients", probes.gradients, 2),
    ):
        row = f"{what}_s{run.layer.spec.stride}"
        made = _Making(make, run, train_depthwise, table, row)
        facts = name, words, size, count * macs, 1, made, table, (row,)
        yield Form(*facts, multiplies=False, variant=run.variant(what))


def _of_pointwise(run: Run) -> Iterator[Form]:
    spec, table, (words, size), macs = run.layer.spec, "train_pointwise", run.facts, run.layer.macs
    shape = f"{spec.cin}x{spec.cout}"
    row = _wide("forward", spec.cout)
    made = _Making(probes.forward, run, train_pointwise, table, row, shape)
    facts = "train pointwise", words, size, macs, 1, made, table, (row,), shape
    yield Form(*facts, variant=run.variant("forward"))
    words, both = words + ", residual" * run.adds, "train_pointwise_both"
    made = _Making(probes.gradients, run, train_pointwise_gradient, both, "{}", shape)
    facts = "train pointwise gradients", words, size, 2 * macs, 1, made, both, ("{}",), shape
    yield Form(*facts, variant=None if goes_apart(run, TIMED) else run.variant("input"))


def _apart(run: Run, all_apart: bool) -> Iterator[Form]:
    """The kernels of one gradient of a 1x1 layer; that of its weight knows no residual."""
    spec, module, table = run.layer.spec, train_pointwise_gradient, "train_pointwise"
    (words, size), macs, shape = run.facts, run.layer.macs, f"{spec.cin}x{spec.cout}"
    among = tuple(kind for kind in DTYPES if all_apart or goes_apart(run, kind))
    for of, row in (("input", _wide("input", spec.cin)), ("weight", "weight_{}")):
        added = ", residual" * (run.adds and of == "input")
        made = _Making(probes.gradients, run, module, table, row, shape, of)
        if among:
            facts = f"train pointwise {of} gradient", words + added, size, macs, 1, made, table, (row,), shape
            yield Form(*facts, among=among, variant=run.variant(of))


def _of_norms(run: Run) -> Iterator[Form]:
    spec, ho = run.layer.spec, run.layer.ho
    words = f"{spec.cout}{' relu6' if spec.relu6 else ''}{', residual' if run.residual else ''}"
    if run.last:
        residual = "residual" if run.residual else ""
        for name, make, added in (("activate", probes.activate, residual), ("sums", probes.sums, "")):
            made = _Making(make, run, norm, "norm", name)
            facts = f"train {name}", words, ho, 0, 1, made, "norm", (name,)
            yield Form(*facts, multiplies=False, variant="relu6" if spec.relu6 else added)
    # Of float32 whatever a step's dtype is.
    for name, make in (("train normalize", probes.normalize), ("train norm gradient", probes.norm_gradient)):
        made = _Making(make, run, norm, "", "")
        yield Form(name, f"{spec.cout}", ho, 0, 1, made, multiplies=False, among=("fp16",))


def _wide(what: str, channels: int) -> str:
    """The row of the table for a result of so many channels, "{}" being the arithmetic."""
    narrow = tiles("", "train_pointwise")[f"{what}_half"]["n"]
    return f"{what}_wide_{{}}" if channels > narrow else f"{what}_{{}}"


def goes_apart(run: Run, kind: str) -> bool:
    """Whether the default table has a kernel for each gradient of a 1x1 layer."""
    spec = run.layer.spec
    chosen = train_pointwise_gradient.choose_tiles(
        "", arithmetic(*DTYPES[kind]), spec.cin, spec.cout, may_remake=not run.masks
    )
    return chosen.both is None


@contextlib.contextmanager
def given(module: ModuleType, table: str, row: str, tile: Tile | None) -> Iterator[None]:
    """Within it the launchers of a module find `tile` in a row of a table; None changes nothing."""
    found = module.tiles

    def changed(device_name: str, kernel: str) -> dict[str, Tile]:
        rows = found(device_name, kernel)
        return {**rows, row: tile} if kernel == table and tile is not None else rows

    setattr(module, "tiles", changed)  # noqa: B010 (a module's type declares none)
    try:
        yield
    finally:
        setattr(module, "tiles", found)  # noqa: B010


class _Making(Make):
    """Makes the probe of a launcher of `module`, whose tile is looked up in a row of a table.

    `only`: which of two gradients it makes, "input" or "weight"; "" for both.
    """

    def __init__(  # noqa: PLR0917
        self,
        make: Callable[..., StepProbe],
        run: Run,
        module: ModuleType,
        table: str,
        row: str,
        shape: str = "",
        only: str = "",
    ) -> None:
        self._make, self._run, self._module, self._table = make, run, module, table
        self._row, self._shape, self._only = row, shape, only

    def __call__(self, batch: int, kind: str, tile: Tile | None = None) -> StepProbe:
        row = self._row.format(arithmetic(*DTYPES[kind]))
        row = f"{row}_{self._shape}" if self._shape else row
        chosen = {"only": self._only} if self._only else {}
        probe = self._make(probes.Material(self._run, batch, kind), **chosen)

        def call() -> Sequence[Tensor | None]:
            with given(self._module, self._table, row, tile):
                return probe.call()

        return dataclasses.replace(probe, call=call)
