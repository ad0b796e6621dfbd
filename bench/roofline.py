"""`python -m bench.roofline`: how far each layer is from its roof, by the last run of bench.kernels.

A layer cannot be faster than its multiply-accumulates at the measured peak, nor, from memory, than its bytes
at the measured copy bandwidth; the slower of the two is its roof. Activations that stay in cache beat the
second, so a memory-bound layer's share may pass 100%.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import results
from .kernels import OURS, OUTPUT

PICTURE = results.FOLDER / "roofline.png"


@dataclass(frozen=True)
class Point:
    """One layer: milliseconds, MACs and bytes of a call, how often it occurs, and the limits of its run."""

    name: str
    count: int
    ms: float
    macs: float
    bytes: float
    peak: float
    copy: float

    @property
    def roof_ms(self) -> float:
        return max(self.macs / self.peak, self.bytes / self.copy) / 1e6

    @property
    def bound(self) -> str:
        return "compute" if self.macs / self.peak >= self.bytes / self.copy else "memory"

    @property
    def intensity(self) -> float:
        """MACs a byte."""
        return self.macs / self.bytes


def point(row: Mapping[str, str]) -> Point:
    """A point from a row of kernels.csv."""
    ms, gmacs, gbs = float(row["ms"]), float(row["gmacs"]), float(row["gbs"])
    return Point(
        row["name"],
        int(row["form"].removeprefix("x")),
        ms,
        gmacs * ms * 1e6,
        gbs * ms * 1e6,
        float(row["gmacs_peak"]),
        float(row["gbs_copy"]),
    )


def table(points: Sequence[Point]) -> str:
    """Layers by what they cost the network over their roof, and the sums."""
    lines = [f"{'':34} {'':>3} {'ms':>8} {'roof ms':>8} {'share':>6}  bound"]
    layers = [p for p in points if not p.name.startswith("network")]
    for p in sorted(layers, key=lambda p: p.count * (p.ms - p.roof_ms), reverse=True):
        lines.append(
            f"{p.name:34} x{p.count:<2} {p.ms:8.4f} {p.roof_ms:8.4f} {p.roof_ms / p.ms:6.1%}  {p.bound}"
        )
    total, roof = sum(p.count * p.ms for p in layers), sum(p.count * p.roof_ms for p in layers)
    compute = sum(p.count * p.macs / p.peak for p in layers) / 1e6
    lines.append(f"{'layer by layer':34} {'':>3} {total:8.4f} {roof:8.4f} {roof / total:6.1%}")
    lines.append(f"{'all of their MACs at peak':34} {'':>3} {'':>8} {compute:8.4f} {compute / total:6.1%}")
    for p in points:
        if p.name.startswith("network"):
            lines.append(
                f"{'the network as one call':34} {'':>3} {p.ms:8.4f} {compute:8.4f} {compute / p.ms:6.1%}"
            )
    return "\n".join(lines)


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """The roofline: GMAC/s over MACs a byte, one colour an operator, an area as large as its time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peak, copy = points[0].peak, points[0].copy
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    low, high = min(p.intensity for p in points) / 1.2, max(p.intensity for p in points) * 1.5
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    axes.plot(xs, [min(peak, x * copy) for x in xs], color="black", linewidth=1.2)
    axes.annotate(f"{peak:.0f} GMAC/s", (high, peak), ha="right", va="bottom", fontsize=9)
    axes.annotate(f"{copy:.0f} GB/s from memory", (low * 1.1, low * copy), ha="left", va="top", fontsize=9)
    total = sum(p.count * p.ms for p in points if not p.name.startswith("network"))
    for operator in dict.fromkeys(p.name.split()[0] for p in points):
        some = [p for p in points if p.name.split()[0] == operator]
        axes.scatter(
            [p.intensity for p in some],
            [p.macs / p.ms / 1e6 for p in some],
            s=[30 + 1500 * min(p.count * p.ms / total, 0.3) for p in some],
            marker="*" if operator == "network" else "o",
            alpha=0.7,
            label=operator,
        )
    axes.set(xscale="log", yscale="log", xlabel="MACs a byte", ylabel="GMAC/s", title=title)
    axes.grid(which="both", alpha=0.2)
    legend = axes.legend(loc="lower right", title="area: share of the time")
    for handle in legend.legend_handles:
        handle.set_sizes([50])  # type: ignore[union-attr]
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, default=OUTPUT, help="CSV file of bench.kernels")
    parser.add_argument("--contender", default=OURS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    try:
        rows = [row for row in results.read_last_run(options.input) if row["contender"] == options.contender]
    except FileNotFoundError as error:
        parser.error(str(error))
    if not rows:
        parser.error(f"{options.input} has no row of {options.contender!r}")
    points, first = [point(row) for row in rows], rows[0]
    print(table(points))
    title = f"{options.contender} ({first['isa']}), {first['threads']} thread(s), batch {first['batch']}"
    draw(points, f"{title}\n{first['processor']}", options.picture)
    print(f"drawn: {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
