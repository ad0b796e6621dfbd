"""`python -m bench.kernels`: every operator row at the network's own shapes, ours against torch's.

Our weights are packed beforehand; tensors stay in cache between calls as far as they fit, so a share of the
copy bandwidth, which is memory's, may pass 100%. Each side has a process of its own (bench.workers) and they
take turns.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnv2_fast import arch, ops
from mnv2_fast.arch import Layer, LayerSpec
from mnv2_fast.backends import cpu
from mnv2_fast.chain import Chain, Link

from . import limits, results, timing
from .workers import Worker, alone

OUTPUT = results.FOLDER / "kernels.csv"
OURS = "mnv2_fast"
TORCH = "torch eager"
ROUNDS = 3


@dataclass(frozen=True)
class Shape:
    """An operator at one shape. `layers`: what it stands for; `count`: how often the network has it."""

    op: str
    layers: tuple[Layer, ...]
    count: int = 1

    @property
    def name(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        text = f"{self.op} {first.spec.cin}->{last.spec.cout} {first.h}x{first.w}"
        return text + (" s2" if first.spec.stride == 2 else "") + (" +x" if last.spec.residual else "")


def shapes() -> list[Shape]:
    """Every operator at every shape that the network has, first to last.

    Raises:
        RuntimeError: `ops.OPS` has a row that stands here for no layer.
    """
    layers = arch.layers()
    found: dict[tuple[object, ...], Shape] = {}

    def add(op: str, *parts: Layer) -> None:
        first = parts[0]
        key = (
            op,
            first.h,
            first.w,
            *((p.spec.cin, p.spec.cout, p.spec.stride, bool(p.spec.residual)) for p in parts),
        )
        found[key] = Shape(op, parts, found[key].count + 1 if key in found else 1)

    for layer in layers[:-2]:
        add(layer.spec.kind, layer)
    add("head", *layers[-2:])
    add("network", *layers)
    if left := {op.name for op in ops.OPS} - {shape.op for shape in found.values()}:
        raise RuntimeError(
            f"no shapes for the operators {', '.join(sorted(left))}: add them to bench.kernels.shapes"
        )
    return list(found.values())


def row(name: str) -> ops.Op:
    """The operator's row."""
    return next(op for op in ops.OPS if op.name == name)


def arguments(shape: Shape, batch: int) -> tuple[Any, ...]:
    """Random arguments of the operator, x in channels_last."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int) -> Tensor:
        t = torch.randn(size, generator=generator)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    first, spec = shape.layers[0], shape.layers[0].spec
    x = tensor(batch, spec.cin, first.h, first.w)
    pairs = [(tensor(*layer.spec.weight_shape) * 0.1, tensor(layer.spec.cout)) for layer in shape.layers]
    if shape.op == "network":
        chain = _chain([layer.spec for layer in shape.layers])
        return x, ops.chain_tensors(chain), chain.encode()
    if shape.op == "head":
        return x, *pairs[0], *pairs[1]
    if shape.op == "depthwise":
        return x, *pairs[0], spec.stride, spec.relu6
    if shape.op == "pointwise":
        return (
            x,
            *pairs[0],
            tensor(batch, spec.cout, first.ho, first.wo) if spec.residual else None,
            spec.relu6,
        )
    return x, *pairs[0], spec.relu6


def _chain(specs: Sequence[LayerSpec]) -> Chain:
    links = [Link(spec) for spec in specs[:-1]]
    return Chain((*links, Link(specs[-1], bias=True, norm=False, affine=False)))


def ours(shape: Shape, args: tuple[Any, ...]) -> Callable[[], object]:
    """The call on our kernels, weights packed."""
    x, threads = args[0], torch.get_num_threads()
    specs = [layer.spec for layer in shape.layers]
    residual = None
    if shape.op == "network":
        pairs = _chain(specs).fold(args[1])
    else:
        tensors = [a for a in args[1:] if isinstance(a, Tensor)]
        pairs = list(zip(tensors[0::2], tensors[1::2], strict=False))
        if shape.op == "pointwise" and args[3] is not None:
            residual = args[3]
        specs = [_single(spec) for spec in specs]
    network = cpu.Network(specs, pairs[: len(specs)], pool=shape.op in ("head", "network"))
    return lambda: network.run(x, threads, residual)


def _single(spec: LayerSpec) -> LayerSpec:
    """The layer by itself: its residual, if any, is given by the caller."""
    return LayerSpec(
        spec.kind,
        spec.conv,
        spec.bn,
        spec.cin,
        spec.cout,
        spec.stride,
        spec.relu6,
        -1 if spec.residual else 0,
    )


def serve(contender: str, batch: int) -> Callable[[str], Callable[[], object]]:
    """For bench.workers: from a shape's name to the contender's call; built when first asked for."""
    table = {shape.name: shape for shape in shapes()}
    calls: dict[str, Callable[[], object]] = {}

    def call(name: str) -> Callable[[], object]:
        if name not in calls:
            shape = table[name]
            args = arguments(shape, batch)
            calls[name] = ours(shape, args) if contender == OURS else lambda: row(shape.op).eager(*args)
        return calls[name]

    if contender == OURS:
        cpu.isa()  # fails here, with its reason, where the extension is not there
    return call


def measure(
    workers: dict[str, Worker], shape: Shape, options: argparse.Namespace, bounds: limits.Limits
) -> list[results.Row]:
    """One shape: each side alone, then both in turns."""
    single, turns = {}, {name: list[float]() for name in workers}
    for name, worker in workers.items():
        with alone([worker], list(workers.values())):
            single[name] = timing.summarize(worker.turn(timing.CALLS, shape.name)).median
    for _ in range(options.rounds):
        for name, worker in workers.items():
            turns[name] += worker.turn(timing.CALLS, shape.name)
    args = arguments(shape, options.batch)
    macs, moved = row(shape.op).macs(*args), row(shape.op).bytes(*args)
    rows = []
    for name, times in turns.items():
        summary = timing.summarize(times)
        gmacs, gbs = macs / summary.median / 1e6, moved / summary.median / 1e6
        rows.append(
            results.Row(
                bench="kernels",
                name=shape.name,
                contender=name,
                isa=workers[name].isa,
                batch=options.batch,
                threads=options.threads,
                form=f"x{shape.count}",
                ms=summary.median,
                ms_p20=summary.p20,
                ms_p80=summary.p80,
                ms_alone=single[name],
                noisy=timing.differ(summary.median, single[name]),
                images_per_s=options.batch / summary.median * 1e3,
                gmacs=gmacs,
                gmacs_peak=bounds.gmacs,
                gmacs_share=gmacs / bounds.gmacs,
                gbs=gbs,
                gbs_copy=bounds.gbs,
                gbs_share=gbs / bounds.gbs,
                weights="seeded",
            )
        )
    return rows


def show(rows: Sequence[results.Row]) -> None:
    """One shape's line: our time and shares, and torch's time."""
    mine, torchs = rows[0], rows[-1]
    mark = "*" if mine.noisy or torchs.noisy else " "
    print(
        f"{mine.name:34} {mine.form:>3} {mine.ms:8.4f} [{mine.ms_p20:.4f} {mine.ms_p80:.4f}]{mark}"
        f" {mine.gmacs:7.1f} {mine.gmacs_share:6.1%} {mine.gbs_share:6.1%} {torchs.ms:9.4f}"
        f" {torchs.ms / mine.ms:6.2f}x",
        flush=True,
    )


def main(arguments_: Sequence[str] | None = None) -> int:
    """Measure, print, and add the rows to the CSV file."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="", help="instruction set to force")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each side at each shape")
    parser.add_argument("--match", default="", help="only shapes whose name holds this text")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="CSV file that the rows are added to")
    options = parser.parse_args(arguments_)
    if min(options.batch, options.threads, options.rounds) < 1:
        parser.error("--batch, --threads and --rounds must be at least 1")

    shared, bounds = results.context(), limits.measure(options.threads)
    env = {**os.environ, "MNV2_FORCE_ISA": options.isa}
    cores = limits.cores(options.threads)
    workers: dict[str, Worker] = {}
    rows: list[results.Row] = []
    try:
        for name in (OURS, TORCH):
            request = {"contender": name, "batch": options.batch}
            workers[name] = Worker("kernels", request, cores, env).ready()
        print(
            f"{shared['processor']}; {workers[OURS].isa}; batch {options.batch}, {options.threads} thread(s)"
        )
        print(f"measured limits: {bounds.gmacs:.1f} GMAC/s, copy {bounds.gbs:.1f} GB/s read and written")
        print(f"{'':34} {'':>3} {'ms [20% 80%]':>26} {'GMAC/s':>8} {'peak':>6} {'copy':>6} {TORCH:>9}")
        for shape in shapes():
            if options.match in shape.name:
                measured = measure(workers, shape, options, bounds)
                show(measured)
                rows += measured
    finally:
        for worker in workers.values():
            worker.close()
    if not rows:
        parser.error(f"no shape's name holds {options.match!r}")
    results.save(options.output, rows, shared)
    return 0


if __name__ == "__main__":
    sys.exit(main())
