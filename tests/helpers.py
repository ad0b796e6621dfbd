"""What several test modules build their models with."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mnv2_fast import MobileNetV2
from mnv2_fast.metrics import Evaluation
from mnv2_fast.nn import eager_only

Net = TypeVar("Net", bound=nn.Module)

SMALL = {"num_classes": 7, "width_mult": 0.35}
TOLERANCE = {"rtol": 1e-4, "atol": 5e-4}


@torch.no_grad()
def calibrate(model: Net, size: tuple[int, int] = (64, 64)) -> Net:
    """`model` in eval mode, with batch norms that carry the signal through, as in a trained network."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
        norm.momentum = 1.0
    with eager_only():
        model.train()(torch.randn(4, 3, *size))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var.clamp_(min=1e-3)
    return model.eval()


def from_logits(
    classes: Sequence[str], targets: Tensor, logits: Tensor, paths: Sequence[Path] = ()
) -> Evaluation:
    """An `Evaluation` of a network's outputs [N, C]."""
    return Evaluation(tuple(classes), targets, torch.softmax(logits.double(), 1), tuple(paths))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """These tests are many small calls: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def eager(model: MobileNetV2, x: Tensor) -> Tensor:
    """The answer of plain torch with the model as it is now."""
    backend, model.backend = model.backend, "eager"
    try:
        return model(x)
    finally:
        model.backend = backend


def check(model: MobileNetV2, x: Tensor, served: bool = True) -> Tensor:
    """The model's answer, once it is plain torch's and came, or came not, from the kernels."""
    assert (model.why_not(x) is None) == served, model.why_not(x)
    y = model(x)
    torch.testing.assert_close(y, eager(model, x), **TOLERANCE)
    return y.detach().clone()


def changed(model: MobileNetV2, x: Tensor, change: Callable[[], object], served: bool = True) -> None:
    """`change` moves the answer, and the fast answer moves with it."""
    before = check(model, x)
    change()
    assert (check(model, x, served) - before).abs().max() > 1e-2


def run_guarded(script: str) -> None:
    """Run a script in a process of its own with what `guard` has, answers guarded; it prints done at last."""
    prologue = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from guard import guard_outputs, guarded, guarded_nhwc
from mnv2_fast.arch import LayerSpec
from mnv2_fast.backends import cpu
guard_outputs()
"""
    done = subprocess.run(
        [sys.executable, "-c", prologue + script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "done"


def share_between_threads(
    run: Callable[[Tensor, int], Tensor], batches: Sequence[Tensor], expected: Sequence[Tensor]
) -> None:
    """Four Python threads call `run` on batches of their own choice: every answer is the expected one."""
    wrong = []

    def work(i: int) -> None:
        for k in range(40):
            j = (i + k) % len(batches)
            if not torch.equal(run(batches[j], 1 + k % 3), expected[j]):
                wrong.append((i, k))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def colour_photos(root: Path, count: int = 12, names: Sequence[str] = ("red", "grün", "sky blue")) -> Path:
    """A folder of small noisy photos, each class with more of one colour, and without train/ and val/."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 156, (40, 40, 3), dtype=np.uint8)
            pixels[..., channel % 3] += 100
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root
