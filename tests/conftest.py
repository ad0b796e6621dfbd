"""What every test may use: the shared data, a fixed seed, and one torch thread pool of a known size."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import triton_interpreter
from helpers import SMALL, calibrate
from torch import Tensor, nn

from mnv2_fast import MobileNetV2
from mnv2_fast.backends import cpu, cpu_train

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS_V1 = "weights/mobilenet_v2-IMAGENET1K_V1.safetensors"

# Set by a user's shell these would change what the tests prove; a test that wants one sets it itself.
for _name in ("MNV2_FORCE_ISA", "MNV2_BACKEND", "MNV2_STRICT"):
    os.environ.pop(_name, None)

torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_finish(session: pytest.Session) -> None:
    """List the modules whose cases Triton's interpreter runs, so that it runs two of them at a time."""
    paths = (str(item.path) for item in session.items if "verdicts" in getattr(item, "fixturenames", ()))
    triton_interpreter.wanted[:] = dict.fromkeys(paths)


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> dict[str, str]:
    """What is wrong with each case of a module that Triton's interpreter runs, see `triton_interpreter`."""
    return triton_interpreter.verdicts(str(request.path))


def pytest_sessionfinish() -> None:
    triton_interpreter.stop()


def _absent(what: str) -> None:
    """Skip the test that needs `what`, or fail it where the data is promised to be there (CI=true)."""
    message = f"{what} is absent: set MNV2_SHARED to the folder with data/ and weights/ (default: ../shared)"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(message)
    pytest.skip(message)


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        _absent(str(path))
    return path


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real weights and photos: $MNV2_SHARED, or `../shared` beside the checkout."""
    folder = Path(os.environ.get("MNV2_SHARED") or ROOT.parent / "shared").expanduser()
    if not folder.is_dir():
        _absent(str(folder))
    return folder.resolve()


@pytest.fixture(scope="session")
def weights_v1(shared: Path) -> Path:
    """The safetensors file of the IMAGENET1K_V1 weights."""
    return _inside(shared, WEIGHTS_V1)


@pytest.fixture(scope="session")
def photos(shared: Path) -> list[Path]:
    """The 200 real ImageNet photos, `WNID_name.JPEG`, sorted by name."""
    paths = sorted(_inside(shared, "data/imagenet_sample").glob("*.JPEG"))
    if len(paths) < 200:
        _absent("data/imagenet_sample with its 200 photos")
    return paths


@pytest.fixture(scope="session")
def wnids(shared: Path) -> list[str]:
    """The 1,000 WordNet ids in the order of the classes."""
    lines = _inside(shared, "data/imagenet_wnids.txt").read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


@pytest.fixture(scope="session")
def flowers(shared: Path) -> Path:
    """The flower photos: `train/CLASS/` and `val/CLASS/` in five classes."""
    return _inside(shared, "data/flowers")


@pytest.fixture(scope="session")
def native() -> None:
    """The test needs `_C`. A missing or broken build is a failure, never a skip."""
    try:
        importlib.import_module("mnv2_fast._C")
    except ImportError as error:
        pytest.fail(f"mnv2_fast._C does not import ({error}): run `make build`")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(params=cpu.isas() if cpu.available() else [])
def training_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn; new memory starts as NaN, so that what is not written shows."""
    before, empty = cpu.isa(), cpu_train.empty
    monkeypatch.setattr(cpu_train, "empty", lambda *shape, **of: empty(*shape, **of).fill_(torch.nan))
    cpu.extension().select_isa(request.param)
    yield request.param
    cpu.extension().select_isa(before)


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python() -> RunPython:
    """Runs a program in a fresh interpreter with this one's environment.

    `run_python("code", *args, env={...}, cwd=..., timeout=120, check=True)`: a value of None in `env` unsets
    the variable. With `check` a non-zero exit fails the test and shows what the program printed.
    """

    def run(
        code: str,
        *args: str,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        environment: dict[str, str] = dict(os.environ)
        for name, value in (env or {}).items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True,
            text=True,
            env=environment,
            cwd=cwd or ROOT,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture
def model() -> MobileNetV2:
    """A small eval-mode model whose batch norms carry the signal through and are away from the identity."""
    model = calibrate(MobileNetV2(**SMALL), (48, 40))
    nn.init.normal_(model.classifier[1].weight, 0, 0.1)
    return model


@pytest.fixture
def x() -> Tensor:
    """Two small images."""
    return torch.randn(2, 3, 48, 40)
