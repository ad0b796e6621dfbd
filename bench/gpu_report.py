"""Rows, lines and the last tables of what `bench.gpu` has measured."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from bench.gpu_children import Answer
from bench.gpu_times import BATCHES, COMPILED, EAGER, GRAPH, NO_GRAPH, OURS, TRAINING, Times, Work
from bench.results import Row

KIND = "fp16"


@dataclasses.dataclass
class Report:
    """What has been measured so far. `copy`: GB/s; `floors`: bytes an image by the way to run the network."""

    device: str
    copy: float = math.nan
    floors: dict[str, float] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)
    _forms: list[tuple[Work, float, float, float]] = dataclasses.field(default_factory=list)

    def take(self, work: Work, answer: Answer) -> None:
        """Keep and print one answer."""
        if work.name == "copy":
            self._take_copy(answer)
        elif work.name == TRAINING:
            self._take_step(work, answer)
        elif work.form is None:
            self._take_network(work.batch, work.contender, answer)
        elif answer.failed:
            print(f"{work.name}: {answer.failed}")
        else:
            self._take_form(work, answer.found)

    def _take_copy(self, answer: Answer) -> None:
        if answer.failed:
            print(f"\nno copy: {answer.failed}: shares of it are left out")
            return
        self.copy, self.floors = answer.found["gbs"], answer.found["floors"]
        print(f"\na copy reads and writes {self.copy:.0f} GB/s\n")

    def _take_network(self, batch: int, contender: str, answer: Answer) -> None:
        row = Row(
            "gpu",
            "network",
            contender,
            dtype=KIND,
            device=self.device,
            batch=batch,
            weights="seeded",
            form="call",
        )
        named = f"network, batch {batch:>4}, {contender:<26}"
        if answer.failed:
            print(f"{named} {answer.failed}")
            self.rows.append(dataclasses.replace(row, note=answer.failed))
            return
        rate = batch / answer.found[0] * 1e3
        print(f"{named} {_in_words(answer.found)}, {rate:.0f} images/s")
        self.rows.append(dataclasses.replace(_with_times(row, answer.found), images_per_s=rate))

    def _take_step(self, work: Work, answer: Answer) -> None:
        row = Row(
            "gpu",
            TRAINING,
            work.contender,
            dtype=KIND,
            device=self.device,
            batch=work.batch,
            weights="seeded",
            form="autocast",
        )
        named = f"{TRAINING}, batch {work.batch:>4}, {work.contender:<39}"
        if answer.failed:
            print(f"{named} {answer.failed}")
            self.rows.append(dataclasses.replace(row, note=answer.failed))
            return
        times, peak = answer.found["times"], answer.found["peak_mb"]
        rate = work.batch / times[0] * 1e3
        print(f"{named} {_in_words(times)}, {rate:.0f} images/s, {peak:.0f} MB")
        row = dataclasses.replace(_with_times(row, times), images_per_s=rate, peak_mb=peak)
        self.rows.append(row)

    def compiled(self, batch: int, answer: Answer) -> None:
        """Keep and print what torch.compile made of the network."""
        self._take_network(batch, COMPILED, answer)

    def _take_form(self, work: Work, found: dict[str, Any]) -> None:
        form = work.form
        assert form is not None
        for contender in (OURS, EAGER):
            times, named = found[contender], f"{work.name:<58} x{form.count:<2} {contender:<26}"
            row = Row(
                "gpu",
                f"{form.name} {form.layer}",
                contender,
                dtype=KIND,
                device=self.device,
                size=str(form.size),
                batch=work.batch,
                form="kernel",
                note=f"occurs {form.count} times",
            )
            if isinstance(times, str):
                print(f"{named} {times}")
                self.rows.append(dataclasses.replace(row, note=times))
                continue
            gbs, why = found["bytes"] / 1e6 / times[0], found[NO_GRAPH][contender]
            called = f"; called, not replayed: {why}" if why else ""
            print(f"{named} {_in_words(times)}  {gbs:6.0f} GB/s  {gbs / self.copy:4.0%}{called}")
            row = dataclasses.replace(_with_times(row, times), note=row.note + called)
            row = dataclasses.replace(row, gbs=gbs, gbs_copy=self.copy, gbs_share=gbs / self.copy)
            gmacs = work.batch * form.macs / times[0] / 1e6
            self.rows.append(dataclasses.replace(row, gmacs=gmacs))
        eager = found[EAGER][0] if not isinstance(found[EAGER], str) else math.nan
        self._forms.append((work, found[OURS][0], eager, found["bytes"]))

    def tables(self) -> Iterator[str]:
        """The short tables, line by line: kernels by name, then the network by batch beside its floors."""
        yield from self._of_kernels()
        yield from self._of_networks()
        yield from self._of_steps()
        for way, moved in self.floors.items():
            rate = self.copy * 1e9 / moved
            yield f"floor, {way}: {moved / 1e6:.2f} MB an image, {rate:.0f} images/s at a copy's speed"

    def _of_kernels(self) -> Iterator[str]:
        by_name: dict[str, list[tuple[Work, float, float, float]]] = collections.defaultdict(list)
        for one in self._forms:
            assert one[0].form is not None
            by_name[one[0].form.name].append(one)
        if by_name:
            titles = "".join(f"{title:>9}" for title in ("ms", "torch", "of copy", "lowest"))
            yield f"{'all layers of a network':<28}{titles}  slower than torch"
        for name, some in by_name.items():
            counts = [work.form.count for work, *_ in some if work.form]
            ours = sum(count * one[1] for count, one in zip(counts, some, strict=True))
            eager = sum(count * one[2] for count, one in zip(counts, some, strict=True))
            moved = sum(count * one[3] for count, one in zip(counts, some, strict=True))
            share = moved / 1e6 / ours / self.copy
            lowest = min(bytes_ / 1e6 / ms / self.copy for _, ms, _, bytes_ in some)
            slower = ", ".join(str(work.form) for work, ms, theirs, _ in some if ms > theirs)
            yield f"{name:<28} {ours:8.3f} {eager:8.3f} {share:8.0%} {lowest:8.0%}  {slower or 'nowhere'}"

    def _of_networks(self) -> Iterator[str]:
        of_networks = [row for row in self.rows if row.name == "network"]
        if not of_networks:
            return
        rates = {(row.batch, row.contender): row.images_per_s or math.nan for row in of_networks}
        ours = list(dict.fromkeys(name for _, name in rates if name.startswith(OURS)))
        columns = [*ours, EAGER, COMPILED]
        yield "images/s  " + "".join(f"{name:>28}" for name in columns) + "   best of ours / eager / compiled"
        for batch in sorted(BATCHES):
            found = [rates.get((batch, name), math.nan) for name in columns]
            best = max((rate for rate in found[: len(ours)] if not math.isnan(rate)), default=math.nan)
            ratios = " ".join(f"{_ratio(best, of):>7}" for of in found[-2:])
            yield f"{batch:>8}  " + "".join(f"{_rate(rate):>28}" for rate in found) + f"   {ratios}"

    def _of_steps(self) -> Iterator[str]:
        for batch in sorted({row.batch for row in self.rows if row.name == TRAINING}):
            rows = {row.contender: row for row in self.rows if (row.name, row.batch) == (TRAINING, batch)}
            rates = {name: row.images_per_s or math.nan for name, row in rows.items()}
            # A graph beside a graph.
            ours = {name: rates.get(OURS + GRAPH * name.endswith(GRAPH), math.nan) for name in rates}
            yield f"{TRAINING}, batch {batch}: " + "; ".join(
                f"{name} {_rate(rate)} images/s ({_ratio(ours[name], rate)})" for name, rate in rates.items()
            )


def _with_times(row: Row, times: Times) -> Row:
    median, low, high = times
    return dataclasses.replace(row, ms=median, ms_p20=low, ms_p80=high)


def _in_words(times: Sequence[float]) -> str:
    median, low, high = times
    return f"{median:7.3f} ms ({low:.3f} - {high:.3f})"


def _rate(rate: float) -> str:
    return "-" if math.isnan(rate) else f"{rate:.0f}"


def _ratio(rate: float, of: float) -> str:
    return "-" if math.isnan(rate / of) else f"{rate / of:.2f}x"
