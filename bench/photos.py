"""A folder of JPEG files to labels: ours beside torchvision's transforms with torch, and where the time goes.

    python -m bench.photos [--photos DIR]

Everyone gets the same cores and classifies the same files, one pass a call, in turns (bench.workers). torch's
side is a plain loop and a DataLoader, at several batches, and its best counts. Stages are timed on one
thread, one after the other, over the same files.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import limits, material, results
from .workers import Worker, WorkerError

OUTPUT = results.FOLDER / "photos.csv"
ASKED = 3.0
OURS = "mnv2_fast"
TORCH = "torchvision + torch eager"
PASS = "folder to labels"
STAGES = {
    OURS: ("decode", "resize + crop", "network + labels"),
    TORCH: ("decode", "transforms", "network + labels"),
}
ROUNDS, CORES = 3, 2

# The engine is measured as it comes.
_OURS_ONLY = ("MNV2_FORCE_ISA", "MNV2_BACKEND", "MNV2_STRICT")

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Contender:
    """One way from files to labels; `workers` are a DataLoader's, 0 a plain loop."""

    name: str
    batch: int
    workers: int = 0

    @property
    def form(self) -> str:
        """How it runs, for tables."""
        return (
            f"DataLoader, {self.workers} workers"
            if self.workers
            else "loop"
            if self.name == TORCH
            else "stream"
        )


CONTENDERS = (
    Contender(OURS, 8),
    Contender(TORCH, 16),
    Contender(TORCH, 32),
    Contender(TORCH, 16, 2),
    Contender(TORCH, 32, 2),
)


def files_in(folder: Path, count: int) -> list[Path]:
    """The first photos of a folder, by name; none where it has none or is not there."""
    from mnv2_fast import UserError, data

    if not folder.is_dir():
        return []
    try:
        return list(itertools.islice(data.iterate_inputs([folder]), count))
    except UserError:  # no photo
        return []


def our_model() -> Any:
    """Our network in eval mode, with published weights where they are found, else seeded ones."""
    import torch

    from mnv2_fast import mobilenet_v2

    torch.manual_seed(0)
    source = material.source()
    return mobilenet_v2(weights=None if source == "seeded" else source).eval()


def torchvision_model() -> Any:
    """torchvision's, with the same weights."""
    from mnv2_fast._torchvision import torchvision

    model = torchvision().models.mobilenet_v2()
    model.load_state_dict(our_model().state_dict())
    return model.eval()


def ours(files: Sequence[Path], contender: Contender) -> Calls:
    """Our calls: the whole way on all cores, and each stage on one."""
    from mnv2_fast import Predictor, compile, data

    predictor = Predictor(compile(our_model()), batch_size=contender.batch, top_k=1)
    alone = Predictor(predictor.engine.with_threads(1), batch_size=contender.batch, top_k=1)
    kept: dict[str, list[Any]] = {}

    def decode() -> None:
        kept["photos"] = [data.read_image(path) for path in files]

    def crop() -> None:
        kept["pixels"] = [data.resize_and_crop(photo, predictor.preprocessing) for photo in kept["photos"]]

    def network() -> None:
        for at in range(0, len(files), contender.batch):
            alone._classify(alone.engine, kept["pixels"][at : at + contender.batch], 1)

    def all_of_it() -> None:
        for _, result in predictor.stream(iter(files)):
            if isinstance(result, Exception):
                raise result

    return dict(zip((PASS, *STAGES[OURS]), (all_of_it, decode, crop, network), strict=True))


class Photos:
    """torchvision's side as a dataset: files, opened and transformed as its documentation has it."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.transform = torch_transform()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


def torch_transform() -> Any:
    """torchvision's transforms of the V1 weights: resize, crop, to tensor, normalize."""
    from mnv2_fast._torchvision import torchvision

    return torchvision().models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()


def theirs(files: Sequence[Path], contender: Contender) -> Calls:
    """torch's calls: the whole way, and each stage of the loop on one thread."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader

    dataset, model = Photos(files), torchvision_model().to(memory_format=torch.channels_last)
    loader: DataLoader[Any] = DataLoader(dataset, contender.batch, num_workers=contender.workers)  # type: ignore[arg-type]
    threads, kept = torch.get_num_threads(), dict[str, list[Any]]()

    def labels(x: torch.Tensor) -> list[int]:
        best: list[int] = model(x.contiguous(memory_format=torch.channels_last)).softmax(1).argmax(1).tolist()
        return best

    def all_of_it() -> None:
        torch.set_num_threads(threads)
        for x in loader:
            labels(x)

    def decode() -> None:
        kept["photos"] = [Image.open(path).convert("RGB") for path in files]

    def transform() -> None:
        torch.set_num_threads(1)
        kept["tensors"] = [dataset.transform(photo) for photo in kept["photos"]]

    def network() -> None:
        torch.set_num_threads(1)
        for at in range(0, len(files), contender.batch):
            labels(torch.stack(kept["tensors"][at : at + contender.batch]))

    return dict(zip((PASS, *STAGES[TORCH]), (all_of_it, decode, transform, network), strict=True))


def serve(files: list[str], name: str, batch: int, workers: int) -> Callable[[str], Callable[[], object]]:
    """For bench.workers: a call for the whole way and for each stage."""
    calls = (ours if name == OURS else theirs)(
        [Path(file) for file in files], Contender(name, batch, workers)
    )
    return calls.__getitem__


def measure(files: Sequence[Path], cores: Sequence[int], rounds: int) -> Iterator[results.Row]:
    """The rows of one run: everyone's whole way in turns, then the stages of ours and of torch's loop."""
    started: list[tuple[Contender, Worker]] = []
    environment = {name: value for name, value in os.environ.items() if name not in _OURS_ONLY}
    note = f"{len(files)} photos of {files[0].parent.name}"
    try:
        for contender in CONTENDERS:
            request = {"files": list(map(str, files)), **vars(contender)}
            try:
                started.append((contender, Worker("photos", request, cores, environment).ready()))
            except WorkerError as error:
                print(f"left out: {contender.name}, {contender.form}: {error}", flush=True)
        times: list[list[float]] = [[] for _ in started]
        for number in range(rounds):
            for i in range(len(started)) if number % 2 == 0 else reversed(range(len(started))):
                times[i] += started[i][1].turn(1, PASS, warm_calls=int(number == 0), warm_ms=0)
        for (contender, worker), passes in zip(started, times, strict=True):
            yield _row(contender, PASS, passes, len(files), isa=worker.isa, threads=len(cores), note=note)
        for contender, worker in started:
            if contender in CONTENDERS[:2]:
                for stage in STAGES[contender.name]:
                    passes = worker.turn(rounds, stage, warm_calls=1, warm_ms=0)
                    yield _row(contender, stage, passes, len(files), isa=worker.isa, note=note)
    finally:
        for _, worker in started:
            worker.close()


def _row(contender: Contender, name: str, passes: Sequence[float], count: int, **more: Any) -> results.Row:
    """Times a photo from the milliseconds of each pass over `count` of them."""
    median = statistics.median(passes)
    return results.Row(
        bench="photos",
        name=name,
        contender=contender.name,
        batch=contender.batch,
        form=contender.form,
        ms=median / count,
        ms_p20=min(passes) / count,  # too few passes for quantiles
        ms_p80=max(passes) / count,
        images_per_s=count * 1e3 / median,
        weights=material.source(),
        **more,
    )


def show(rows: Sequence[results.Row]) -> list[str]:
    """The table of the whole way, the stages with their shares, and the ratio asked for."""
    whole = [row for row in rows if row.name == PASS]
    lines = [
        f"{PASS}, {whole[0].threads} core(s), {whole[0].note}",
        f"{'':60} {'ms/photo':>9} {'photos/s':>9}",
    ]
    for row in sorted(whole, key=lambda row: row.ms):
        label = f"{row.contender}, {row.form}, batch {row.batch}"
        lines.append(f"{label:60} {row.ms:9.2f} {row.images_per_s or 0:9.1f}")
    for name in (OURS, TORCH):
        stages = [row for row in rows if row.contender == name and row.name != PASS]
        total = sum(row.ms for row in stages)
        lines.append(f"{name}, stages on one thread: {total:.2f} ms a photo")
        lines += [f"  {row.name:58} {row.ms:9.2f} {row.ms / total:9.1%}" for row in stages]
    mine, best = (
        min((r for r in whole if r.contender == name), key=lambda r: r.ms) for name in (OURS, TORCH)
    )
    ratio = best.ms / mine.ms
    lines.append(
        f"{OURS} {ratio:.2f}x {TORCH} ({best.form}, batch {best.batch}), asked {ASKED:.2f}x: "
        f"{'reached' if ratio >= ASKED else 'MISSED'}"
    )
    return lines


def agreement(files: Sequence[Path]) -> str:
    """How often both sides say the same of a photo, and how far the pixels they see are apart."""
    import numpy as np
    import torch
    from PIL import Image

    from mnv2_fast import Predictor, compile, data

    predictor, model = Predictor(compile(our_model()), top_k=1), torchvision_model()
    transform, same, apart = torch_transform(), 0, list[float]()
    with torch.inference_mode():
        for path, result in predictor.stream(files):
            if isinstance(result, Exception):
                raise result
            x = transform(Image.open(path).convert("RGB"))
            same += result[0]["label"] == predictor.labels[int(model(x[None]).argmax())]
            seen = data.resize_and_crop(data.read_image(path), predictor.preprocessing)
            mine = data.normalize(torch.from_numpy(np.array(seen))[None], predictor.preprocessing)[0]
            std = torch.tensor(predictor.preprocessing.std)[:, None, None]
            apart.append(float(((mine - x) * std).abs().mean()) * 255)
    return f"same first class on {same} of {len(files)} photos; mean difference {max(apart):.3f}/255 at most"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and add the rows to the CSV file."""
    usable = min(CORES, len(os.sched_getaffinity(0)))
    parser = argparse.ArgumentParser(prog="python -m bench.photos", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, metavar="DIR", help=f"folder of photos ({material.WHERE})")
    parser.add_argument("--count", type=int, default=200, help="of its photos, the first ones (200)")
    parser.add_argument("--cores", type=int, default=usable, help=f"of every contender ({usable})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"passes of each contender ({ROUNDS})")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="CSV file that the rows are added to")
    options = parser.parse_args(arguments)
    if min(options.count, options.rounds) < 1:
        parser.error("--count and --rounds must be at least 1")
    folder = options.photos or material.default_photos()
    files = files_in(folder, options.count)
    if not files:
        said = f"no photos in {folder}: name a folder with --photos"
        if options.photos:
            parser.error(said)
        print(f"left out: bench.photos: {said}, or set MNV2_SHARED")  # `make bench` goes on
        return 0
    shared = results.context()
    rows = list(measure(files, limits.cores(options.cores), options.rounds))
    print("\n".join(show(rows)))
    print(agreement(files))
    results.save(options.output, rows, shared)
    return 0


if __name__ == "__main__":
    sys.exit(main())
