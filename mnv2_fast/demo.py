"""The demonstration, and the timing that `mnv2 bench` shares with it: our engine beside torchvision."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import data
from ._torchvision import installed, torchvision
from .engine import Engine, compile
from .model import MobileNetV2
from .predict import Predictor, load_model
from .weights import MissingWeightsError, infer_width, num_classes, row

ENGINE = "mnv2_fast engine"
TORCHVISION = "torchvision, channels_last"

# Relative to the largest logit. Measured between two layouts of torch itself: about 2e-6.
_AGREEMENT = 1e-4


def run(weights: str, photo: str | None = None, threads: int | None = None) -> int:
    """Classify a photo, compare with torchvision's answer and time both; prints what it finds.

    Without the published weights asked for, the graph is verified and timed on seeded ones, and every line
    that depends on them says so.

    Args:
        weights: a name or a path, as for `load_model`.
        photo: a path; by default the cat that scikit-image ships.
        threads: of both networks; torch's number by default.

    Returns:
        0, or 1 where the answers differ.

    Raises:
        UserError: the photo or the weights file asked for cannot be used.
    """
    source = photo or _chelsea()
    try:
        model = load_model(weights)
        seeded = ""
    except MissingWeightsError as error:
        if row(weights) is None:
            raise
        model = seeded_model()
        seeded = " on seeded weights, not trained ones"
        print(f"no weights: {error}")
    engine = compile(model, threads=threads)
    predictor = Predictor(engine)
    if source is None:
        print("no photo: pip install scikit-image, or name a photo; random pixels instead")
        x = torch.rand((1, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    else:
        image = data.read_image(source)
        pixels = torch.from_numpy(data.resize_and_crop(image, predictor.preprocessing).copy())
        x = data.normalize(pixels[None], predictor.preprocessing)
        if not seeded:
            print(f"{Path(source).name}, weights {weights}:")
            for best in predictor([image])[0]:
                print(f"  {best['score']:7.2%}  {best['label']}")
    print(f"kernels: {engine.backend} {engine.isa}".rstrip())
    if not installed():
        print("torchvision is not installed, nothing to compare with: pip install torchvision")
        print(table(race({ENGINE: lambda: engine(x)}, engine.threads)))
        return 0
    reference = torchvision_twin(model)
    with torch.inference_mode():
        expected = reference(x)
    difference, scale = float((engine(x) - expected).abs().max()), float(expected.abs().max())
    print(f"latency of one image{seeded}:")
    print(table(race(contenders(engine, reference, x), engine.threads)))
    print(f"maximum difference of the logits: {difference:.2e} (largest logit {scale:.2f}){seeded}")
    if not difference <= _AGREEMENT * scale:
        print("the answers differ: rebuild the extension, and report it if they still do")
        return 1
    return 0


def seeded_model() -> MobileNetV2:
    """A network with random weights, always the same, whose activations have the size of a trained one's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MobileNetV2()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None  # the statistics become those of the one batch below
        with torch.no_grad():
            model.train()(torch.randn(4, 3, 96, 96))
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


def torchvision_twin(model: MobileNetV2) -> nn.Module:
    """torchvision's model with the same weights, in channels_last and eval mode.

    Raises:
        UserError: torchvision is missing.
    """
    state = model.state_dict()
    width = infer_width(state, "the model")
    twin = torchvision().models.mobilenet_v2(num_classes=num_classes(state), width_mult=width)
    twin.load_state_dict(state)
    twin.eval().to(memory_format=torch.channels_last)
    result: nn.Module = twin
    return result


def contenders(engine: Engine, reference: nn.Module | None, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What `race` times: the engine on x, and the reference on x in channels_last."""
    calls: dict[str, Callable[[], Tensor]] = {ENGINE: lambda: engine(x)}
    if reference is not None:
        theirs = x.to(memory_format=torch.channels_last)
        calls[TORCHVISION] = lambda: reference(theirs)
    return calls


def race(
    calls: Mapping[str, Callable[[], Tensor]], threads: int | None = None, turns: int = 3, timed: int = 20
) -> dict[str, list[float]]:
    """Milliseconds of each call. Contenders take turns of `timed` calls, as idle threads of one slow the
    next.

    Before each turn at least 5 calls and 40 ms do not count.

    Args:
        calls: name -> what is timed.
        threads: torch's number meanwhile; as it is by default.
        turns: of each contender.
        timed: calls in a turn.
    """
    before = torch.get_num_threads()
    times: dict[str, list[float]] = {name: [] for name in calls}
    try:
        torch.set_num_threads(threads or before)
        with torch.inference_mode():
            for _ in range(turns):
                for name, call in calls.items():
                    start, warm = time.perf_counter(), 0
                    while warm < 5 or time.perf_counter() - start < 0.04:
                        call()
                        warm += 1
                    for _ in range(timed):
                        begin = time.perf_counter()
                        call()
                        times[name].append((time.perf_counter() - begin) * 1e3)
    finally:
        torch.set_num_threads(before)
    return times


def table(times: Mapping[str, Sequence[float]], batch: int = 1) -> str:
    """Median, 20% and 80% quantile, images per second, and the median as a multiple of the first row's."""
    first = statistics.median(next(iter(times.values())))
    lines = [f"  {'':28}{'median ms':>10}{'20%':>9}{'80%':>9}{'images/s':>10}{'ratio':>8}"]
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=5)
        median = statistics.median(values)
        rate, ratio = 1e3 * batch / median, median / first
        lines.append(f"  {name:28}{median:10.3f}{low:9.3f}{high:9.3f}{rate:10.1f}{ratio:7.2f}x")
    return "\n".join(lines)


def _chelsea() -> str | None:
    spec = importlib.util.find_spec("skimage")
    folders = spec.submodule_search_locations if spec is not None else None
    photos = [Path(folder) / "data" / "chelsea.png" for folder in folders or ()]
    return next((str(photo) for photo in photos if photo.is_file()), None)
