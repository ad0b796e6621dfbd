"""`mnv2 bench --blocks`: every form of every block timed, the one the kernels' table takes, and its gain."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import arch
from .backends import cpu
from .engine import Engine
from .errors import UserError

# As the networks' `block_forms` have them: of float32 and bf16, then of int8.
FUSED, PART_FUSED, PER_LAYER = "fused", "part-fused", "per-layer"
BY_ROWS, BY_CHANNELS = "by-rows", "by-channels"
_FORMS = (FUSED, PART_FUSED, PER_LAYER, BY_ROWS, BY_CHANNELS)
# What gains are over, and forms of blocks alone, in which every other step is as in the first form.
_PLAIN = (PER_LAYER, BY_ROWS)
_BLOCKS_ONLY = (PART_FUSED, BY_CHANNELS)
_WARM_UP = 5


@dataclass(frozen=True)
class Block:
    """The times of one step of a network in microseconds (medians), by the form it ran in.

    `taken` is the form that the kernels' table has for it. A step has only the forms that fit
    it: of the head, `fused` has the classifier in it.
    """

    name: str
    taken: str
    times: dict[str, float]

    @property
    def gain(self) -> float | None:
        """How many times as fast as the plain form the taken one is; None: the step has no such form."""
        plain = self.plain
        return None if plain is None else plain / self.times[self.taken]

    @property
    def plain(self) -> float | None:
        """The time layer by layer, or of int8 by rows."""
        return next((self.times[form] for form in _PLAIN if form in self.times), None)


def measure(engine: Engine, size: int, threads: int, rounds: int = 100) -> list[Block]:
    """Time one image in all forms. They take turns image by image, so that a slow moment meets all of them.

    Raises:
        UserError: the engine's network does not run on the CPU kernels.
    """
    network = engine.network
    if not isinstance(network, cpu.Network | cpu.Int8Network):
        raise UserError(f"--blocks times the forms of blocks on the CPU kernels, not {engine}: see mnv2 info")
    x = torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(0))
    seconds: dict[tuple[range, str], list[float]] = {}
    taken = {}
    for turn in range(_WARM_UP + rounds):
        for form in ("", *network.block_forms):
            _, steps = network.time_steps(x, threads, form)
            for step in steps:
                if not form:
                    taken[step.layers] = step.form
                elif turn >= _WARM_UP and step.form in (form, "") and (step.form or form not in _BLOCKS_ONLY):
                    seconds.setdefault((step.layers, form), []).append(step.seconds)
    layers = arch.layers(size=size, specs=engine.layers)
    forms = network.block_forms
    return [_block(layers, step, form or forms[0], forms, seconds) for step, form in taken.items()]


def _block(
    layers: Sequence[arch.Layer],
    step: range,
    taken: str,
    forms: Sequence[str],
    seconds: dict[tuple[range, str], list[float]],
) -> Block:
    first, last = layers[step[0]], layers[step[-1]]
    where = f"{first.spec.cin} -> {last.spec.cout}, {first.h} x {first.w}"
    name = f"{'.'.join(last.spec.conv.split('.')[:2])}: {where}"
    times = {}
    for each in forms:
        # Where the classifier is not part of the head, the two are steps of their own.
        parts = [
            found
            for (other, kind), found in seconds.items()
            if kind == each and other[0] in step and other[-1] in step
        ]
        if parts:
            times[each] = 1e6 * sum(statistics.median(part) for part in parts)
    return Block(name, taken, times)


def table(blocks: Sequence[Block]) -> str:
    """A line a block, the taken form's time marked, and the sum over all."""
    forms = [form for form in _FORMS if any(form in block.times for block in blocks)]
    lines = [f"  {'median us':36}" + "".join(f"{form:>13}" for form in forms) + f"{'gain':>8}"]
    for block in blocks:
        cells = "".join(_cell(block.times.get(form), "*" if form == block.taken else " ") for form in forms)
        lines.append(f"  {block.name:36}{cells}" + (f"{block.gain:7.2f}x" if block.gain else f"{'-':>7}"))
    total = sum(block.times[block.taken] for block in blocks)
    plain = next(form for form in _PLAIN if form in forms)
    plain_total = sum(block.plain or block.times[block.taken] for block in blocks)
    lines.append(
        f"  all: {total:.1f} us as the table has it, {plain_total:.1f} {plain}, {plain_total / total:.2f}x"
    )
    source = "csrc/forms.def" if plain == PER_LAYER else "csrc/int8_forms.def"
    lines.append(f"  * what the kernels' table ({source}) takes; gain: over {plain}")
    return "\n".join(lines)


def _cell(time: float | None, mark: str) -> str:
    return f"{'-':>12} " if time is None else f"{time:12.1f}{mark}"
