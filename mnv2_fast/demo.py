"""The demonstration, and the timing that `mnv2 bench` shares with it: our engine beside torchvision."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from . import data
from ._torchvision import installed, torchvision
from .engine import Engine, compile, load
from .errors import UserError
from .model import MobileNetV2
from .predict import Predictor, default_model, is_engine, load_model
from .weights import boxed, infer_width, num_classes, width_of

ENGINE = "mnv2_fast engine"
TORCHVISION = "torchvision, channels_last"

# Relative to the largest logit. Measured between two layouts of torch itself: about 2e-6.
_AGREEMENT = 1e-4

_PETALS, _FLORETS = 21, 160


def run(model: str | None = None, photo: str | None = None, threads: int | None = None) -> int:
    """Classify a photo, compare with torchvision's answer and time both; prints what it finds.

    An engine has no weights to give torchvision's model: then both are compared on seeded ones, and every
    line that depends on them says so.

    Args:
        model: a name or a file, as for `Predictor`; by default as `default_model` says.
        photo: a path; by default the cat that scikit-image ships. A drawn daisy where that is not installed,
            and for the flowers in the package.
        threads: of all networks; torch's number by default.

    Returns:
        0, or 1 where the answers differ.

    Raises:
        UserError: the photo or the model asked for cannot be used.
    """
    name = default_model() if model is None else model
    source = photo or (None if boxed(name) else _chelsea())
    image = drawn_daisy() if source is None else data.read_image(source)
    if is_engine(name):
        trained = load(name, threads)
        network, seeded = seeded_like(trained), " on seeded weights, not trained ones"
        engine = compile(network, threads=threads)
    else:
        network, seeded = load_model(name), ""
        engine = trained = compile(network, threads=threads)
    predictor = Predictor(trained)
    print(f"{Path(source).name if source else 'a drawn daisy'}, model {name}:")
    for best in predictor([image])[0]:
        print(f"  {best['score']:7.2%}  {best['label']}")
    pixels = torch.from_numpy(data.resize_and_crop(image, predictor.preprocessing).copy())
    x = data.normalize(pixels[None], predictor.preprocessing)
    own = {f"{name}, {trained.dtype}": lambda: trained(x)} if seeded else {}
    print(f"kernels: {engine.backend} {engine.isa}".rstrip())
    if not installed():
        print("torchvision is not installed, nothing to compare with: pip install torchvision")
        print(table(race(contenders(engine, None, x) | own, engine.threads)))
        return 0
    reference = torchvision_twin(network)
    with torch.inference_mode():
        expected = reference(x)
    difference, scale = float((engine(x) - expected).abs().max()), float(expected.abs().max())
    print(f"latency of one image{', fp32' if seeded else ''}{seeded}:")
    print(table(race(contenders(engine, reference, x) | own, engine.threads)))
    print(f"maximum difference of the logits: {difference:.2e} (largest logit {scale:.2f}){seeded}")
    if not difference <= _AGREEMENT * scale:
        print("the answers differ: rebuild the extension, and report it if they still do")
        return 1
    return 0


def drawn_daisy(size: int = 512) -> Image.Image:
    """A daisy on grass, RGB, always the same: a picture of a flower that no photo's licence is needed for."""
    side, middle = 2 * size, size  # drawn twice as large, for smooth edges
    image = Image.new("RGB", (side, side), (58, 96, 40))
    draw = ImageDraw.Draw(image)

    def place(angle: float, along: float, across: float = 0.0) -> tuple[float, float]:
        cos, sin = math.cos(angle), math.sin(angle)
        return middle + side * (along * cos - across * sin), middle + side * (along * sin + across * cos)

    edge = [(0.42 * i / 32, 0.055 * math.sin(math.pi * (i / 32) ** 1.5)) for i in range(33)]
    outline = [*edge, *((along, -across) for along, across in reversed(edge))]
    for turn, white in ((0.5, (214, 218, 226)), (0.0, (250, 250, 252))):  # petals behind, petals in front
        for i in range(_PETALS):
            angle = 2 * math.pi * (i + turn) / _PETALS
            draw.polygon([place(angle, *point) for point in outline], white, (190, 194, 204))
    _dot(draw, place(0, 0), 0.11 * side, (236, 178, 20))
    for i in range(_FLORETS):  # in a sunflower's spiral: each by the golden angle further
        where = place(i * math.pi * (3 - math.sqrt(5)), 0.105 * math.sqrt(i / _FLORETS))
        _dot(draw, where, 0.005 * side, (201, 130, 8))
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _dot(draw: ImageDraw.ImageDraw, at: tuple[float, float], radius: float, colour: tuple[int, ...]) -> None:
    draw.ellipse((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius), colour)


def seeded_like(engine: Engine) -> MobileNetV2:
    """A `seeded_model` with the layers of an engine.

    Raises:
        UserError: they are no standard network's.
    """
    width = width_of(engine.layers)
    if width is None:
        raise UserError("torchvision has no model with this engine's layers: give one of a standard width")
    return seeded_model(engine.num_classes, width)


def seeded_model(num_classes: int = 1000, width_mult: float = 1.0) -> MobileNetV2:
    """A network with random weights, always the same, whose activations have the size of a trained one's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MobileNetV2(num_classes, width_mult)
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
