"""The tutorial: every block of it runs, in order, in one folder, and prints what it shows.

Commands of `mnv2` run in this process, where torch is loaded already, all others in bash.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from colours import PREPROCESSING, picture, settle
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mnv2_fast import MobileNetV2, cli, costs, plots

pytestmark = pytest.mark.usefixtures("native")

TUTORIAL = ROOT / "docs" / "finetune.md"
TEXT = TUTORIAL.read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)

CLASSES = ("daisy", "dandelion", "roses", "sunflowers", "tulips")
PHOTOS = 12  # of each class: one batch to train on, two photos to validate on

# All that runs otherwise than it is written: these words, and how many epochs there are, by the run's folder.
EPOCHS = {"run": 4, "run-long": 2}
OTHER_EPOCHS = 1
REPLACED = {
    "pip install ": f"cd {shlex.quote(str(ROOT))} && pip install --dry-run --no-index --no-build-isolation ",
    "--image-size 160": "--image-size 40",  # the weights made here are for 32 pixels, so that all is quick
    "--train-size 160": "--train-size 28",
    "RandomResizedCrop(224)": "RandomResizedCrop(32)",
}
# So that bash finds this Python's programs.
PROGRAMS = {"mnv2": "mnv2_fast", "torchrun": "torch.distributed.run", "pip": "pip"}

# What leads to the message of each row under "Troubles", in their order.
TROUBLES = (
    "mnv2 finetune --data fotos --out new",
    "mnv2 finetune --data photos/roses --out new",
    "mkdir single; cp -r photos/roses single\nmnv2 finetune --data single --out new",
    "mkdir -p lonely/roses; cp -r photos/daisy lonely; cp rose.jpg lonely/roses\n"
    "mnv2 finetune --data lonely --out new",
    "mkdir -p halves/val; cp -r photos halves/train; cp -r photos/[dst]* halves/val\n"
    "mnv2 finetune --data halves --out new",
    "cp -r photos damaged; : > damaged/roses/1.jpg\nmnv2 finetune --data damaged --out skipped",
    "mkdir -p few/a few/b; cp photos/roses/[1-6].jpg few/a; cp photos/tulips/[1-6].jpg few/b\n"
    "mnv2 finetune --data few --out new",
    "mnv2 finetune --data photos --out new --image-size 20000",
    "mnv2 finetune --data photos --out run",
    "mnv2 finetune --resume --out run --lr 0.1",
    "mnv2 finetune --data photos --out nan --optimizer sgd --lr 1e30 --warmup-epochs 0",
    "mnv2 finetune --data photos --out new --weights IMAGENET1K_V2",
    "mkdir other; cp -r photos/tulips other; cp -r photos/roses other/cats\n"
    "mnv2 evaluate --model run/final.safetensors --data other",
)

_NUMBER = r"-?[\d?][\d.,:e+-]*"
# What may differ between the output that is shown and that of a run, and what it then has to look like.
_FREE = {
    "rate": (r"[\d.?]+(?:s/batch|batch/s)", r"[\d.?]+(?:s/batch|batch/s)"),
    "bar": (r"(?<=%)\|[^|]+\|", r"\|[^|]*\|"),
    "share": (rf"(?<![\w-]){_NUMBER}%", rf"(?:{_NUMBER}%|-)"),  # a dash: of nothing
    "number": (rf"(?<![\w-]){_NUMBER}", _NUMBER),
    "name": (rf"\b(?:{'|'.join(CLASSES)})\b", f"(?:{'|'.join(CLASSES)})"),
    "left_out": (r"\.\.\.", ".*"),
    "space": (r"\s+", r"\s+"),
}
_TOKENS = re.compile("|".join(f"(?P<{name}>{found})" for name, (found, _) in _FREE.items()))


def line_pattern(shown: str) -> str:
    """A regular expression for lines of the form of one that is shown."""
    pattern, at = "", 0
    for token in _TOKENS.finditer(shown):
        pattern += re.escape(shown[at : token.start()]) + _FREE[str(token.lastgroup)][1]
        at = token.end()
    return pattern + re.escape(shown[at:])


def is_shown(shown: str, printed: str) -> bool:
    """Whether the lines shown were printed, one after another; a line of `...` stands for any.

    Bars are left out, which are drawn between the lines, where none is shown.
    """
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else f"{line_pattern(line)}\n" for line in lines)
    stripped = [line.strip() for line in re.split(r"[\r\n]+", printed)]
    said = [line for line in stripped if line and ("%|" in shown or "%|" not in line)]
    return re.search(f"^{pattern}", "".join(f"{line}\n" for line in said), re.MULTILINE) is not None


class Terminal(io.StringIO):
    """Takes what is printed; its user may press Ctrl-C once an epoch is done."""

    encoding = "utf-8"  # type: ignore[assignment] # with bars of blocks

    def __init__(self, *, interrupts: bool) -> None:
        super().__init__()
        self.interrupts = interrupts

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.interrupts and "; validation: " in text:
            self.interrupts = False
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def run_command(line: str) -> tuple[int, str]:
    """Run a line as at a terminal: its exit code, and what it prints."""
    command, _, comment = line.partition("    # ")
    for words, instead in REPLACED.items():
        command = command.replace(words, instead)
    if out := re.search(r" finetune --data \w+ --out ([\w-]+)", command):
        command = re.sub(r" --epochs \d+", "", command)
        command += f" --epochs {EPOCHS.get(out[1], OTHER_EPOCHS)}"
    if not command.startswith("mnv2 "):
        functions = "".join(
            f'{name}() {{ {shlex.quote(sys.executable)} -m {module} "$@"; }}\n'
            for name, module in PROGRAMS.items()
        )
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{functions}{command}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        return done.returncode, done.stdout
    terminal = Terminal(interrupts="Ctrl-C" in comment)
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        code = cli.main(shlex.split(command)[1:])
    assert not terminal.interrupts, f"not interrupted: {line}"
    return code, terminal.getvalue()


def run_commands(block: str) -> str:
    """Run a block of shell: what all of it prints."""
    printed = ""
    for line in block.splitlines():
        code, said = run_command(line)
        assert code == (cli.INTERRUPTED if "Ctrl-C" in line else cli.OK), f"{line}\n{said}"
        printed += said
    return printed


def run_program(block: str, names: dict[str, object]) -> str:
    """Run a block of Python: what it prints."""
    for words, instead in REPLACED.items():
        block = block.replace(words, instead)
    terminal = Terminal(interrupts=False)
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        exec(compile(block, str(TUTORIAL), "exec"), names)
    return terminal.getvalue()


def only_first(draw: Callable[..., None]) -> Callable[..., None]:
    """Draws in the first call only."""
    calls = itertools.count()
    return lambda *args: draw(*args) if next(calls) == 0 else None


def save_pretrained(folder: Path) -> None:
    """Weights under the name of published ones, whose last layer learns the colours in a few steps.

    All others are so large that steps of Adam hardly move them, and batch norm makes up for it.
    """
    model = MobileNetV2()
    for module in model.features.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 1000
    settle(model)
    metadata = {"preprocessing": json.dumps(PREPROCESSING.to_dict())}
    save_file(model.state_dict(), folder / "mobilenet_v2-IMAGENET1K_V1.safetensors", metadata)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The reader's folder, as the current one: small photos, and weights for such."""
    folder = tmp_path_factory.mktemp("tutorial")
    for i in range(PHOTOS * len(CLASSES)):
        place = folder / "photos" / CLASSES[i % len(CLASSES)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(place / f"{i // len(CLASSES) + 1}.jpg")
    shutil.copy(folder / "photos" / "roses" / "1.jpg", folder / "rose.jpg")
    shutil.copytree(folder / "photos" / "tulips", folder / "new")
    (folder / "weights").mkdir()
    torch.manual_seed(0)
    save_pretrained(folder / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MNV2_WEIGHTS", str(folder / "weights"))
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # No other weights are here, and nothing is fetched.
        patch.setenv("TORCH_HOME", str(folder))
        patch.setenv("https_proxy", "http://127.0.0.1:9")
        # Charts take longer than the trainings that they are of.
        patch.setattr(plots, "run_plots", only_first(plots.run_plots))
        # torch.compile takes half a minute; test_costs.py has the real one.
        patch.setattr(costs, "_compiled", lambda network, x: network)
        yield folder
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def printed(here: Path) -> list[tuple[str, str]]:
    """What is shown of each block's output, with what the block printed; all blocks are run."""
    found, said, names = [], "", dict[str, object]()
    for language, block in BLOCKS:
        if language == "text":
            found.append((block, said))
        else:
            said = run_commands(block) if language == "sh" else run_program(block, names)
    return found


def test_all_blocks_are_of_a_kind_that_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "text"}
    assert len(BLOCKS) == TEXT.count("```") / 2
    assert BLOCKS[0][0] != "text"
    commands = "".join(block for language, block in BLOCKS if language == "sh")
    for words in ("finetune", "predict", "evaluate", "quantize", "export", "compare"):
        assert f"mnv2 {words} " in commands
    for words in REPLACED:
        assert words in TEXT


def test_another_form_is_not_what_is_shown() -> None:
    assert is_shown("top-1: 78.3%\nroses 9", "said before\r  top-1: 5.0%\n 50%|##  | 1/2\ntulips   12\n")
    assert not is_shown("top-1: 78.3%", "top-5: 78.3%\n")
    assert not is_shown("top-1: 78.3%", "top-1: 0.783\n")
    assert not is_shown("roses 9\nloss 2", "roses 9\nand more\nloss 2\n")
    assert is_shown("roses 9\n...\nloss 2", "roses 9\nand more\nloss 2\n")
    assert is_shown("epoch 1: 10%|##   | 7/70", "epoch 1: 90%|#### | 9/10\n")
    assert not is_shown("epoch 1: 10%|##   | 7/70", "epoch 1: 9/10\n")


def test_a_command_that_fails_is_not_passed_over() -> None:
    for block in (
        "true\nfalse",
        "mnv2 predict nowhere.jpg --model nowhere.safetensors",
        "true | false | true",
    ):
        with pytest.raises(AssertionError):
            run_commands(block)


def test_it_prints_what_it_shows(printed: list[tuple[str, str]]) -> None:
    for shown, said in printed:
        assert is_shown(shown, said), f"shown:\n{shown}\nprinted:\n{said[-6000:]}"


@pytest.mark.usefixtures("printed")
def test_troubles_are_said_as_it_shows() -> None:
    rows = re.findall(r"^\| `(.+?)` \| .+ \|$", TEXT.partition("\n## Troubles\n")[2], re.MULTILINE)
    assert len(rows) == len(TROUBLES)
    for shown, trouble in zip(rows, TROUBLES, strict=True):
        *before, line = trouble.splitlines()
        for preparation in before:
            assert run_command(preparation) == (0, "")
        code, said = run_command(line)
        kind = "warning" if code == cli.OK else "error"
        assert code in (cli.OK, cli.USER_ERROR)
        assert is_shown(f"mnv2: {kind}: {shown}", said), f"shown:\n{shown}\nprinted:\n{said}"
    assert not Path("new/last.pt").exists()
