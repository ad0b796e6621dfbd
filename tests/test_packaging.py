"""What users install: the wheel, its extension, what it links to, and the first minutes of a fresh clone."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, RunPython
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILES = ["pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md"]
MAKE_FILES = ["Makefile", "constraints.txt"]
FOLDERS = ["csrc", "kernels", "mnv2_fast"]
ARTEFACTS = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")

# Builds find this environment's own cmake and ninja, as under make.
WITH_TOOLS = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}

OPENMP = ("libgomp", "libomp", "libiomp")

# All that the extension may ask the system for: no torch, no Python library.
LINKED = re.compile(r"(libgomp|libstdc\+\+|libm|libgcc_s|libc|libpthread|ld-linux-x86-64)\.so\.\d+")


def run(*command: str | Path, **options: object) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, made from a copy so that nothing here touches the checkout."""
    tree = tmp_path_factory.mktemp("source")
    for name in FILES + MAKE_FILES:
        shutil.copy2(ROOT / name, tree / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=ARTEFACTS)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", tree, env=WITH_TOOLS)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tree / "unpacked", filter="data")
    (unpacked,) = (tree / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(source_tree: Path) -> Path:
    """The wheel made from the source distribution, as `python -m build` makes it."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", source_tree, env=WITH_TOOLS)
    (built,) = (source_tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel; torch and others are borrowed from this one."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    # A folder named in a .pth is searched, but its own .pth files, the editable install's too, are not read.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


PROGRAM = """
import os, sys, torch
import mnv2_fast, mnv2_fast.kernels
from mnv2_fast import MobileNetV2, compile, load, weights
from mnv2_fast.backends import cpu

assert mnv2_fast.__file__.startswith(sys.prefix), mnv2_fast.__file__
assert mnv2_fast.kernels.__file__.startswith(sys.prefix), mnv2_fast.kernels.__file__
assert os.path.isfile(os.path.join(os.path.dirname(mnv2_fast.kernels.__file__), "configs", "default.json"))
assert len(weights.imagenet_labels()) == 1000
assert os.path.exists(os.path.join(os.path.dirname(mnv2_fast.__file__), "py.typed"))
assert load("flowers").num_classes == 5
torch.manual_seed(0)
model, x = MobileNetV2().eval(), torch.randn(2, 3, 64, 64)
expected = MobileNetV2(backend="eager").eval()
expected.load_state_dict(model.state_dict())
with torch.no_grad():
    torch.testing.assert_close(compile(model)(x), expected(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-4)
print(cpu.available(), cpu.unavailable_reason())
"""


def in_empty_folder(python: Path, folder: Path, *arguments: str) -> str:
    """The output of the clean environment's interpreter, with nothing of the checkout in sight."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MNV2_", "PYTHON"))
    }
    return run(python, *arguments, cwd=folder, env=environment)


def test_wheel_installs_and_runs_in_a_clean_environment(clean_python: Path, tmp_path: Path) -> None:
    assert in_empty_folder(clean_python, tmp_path, "-c", PROGRAM).split() == ["True"]


def test_wheel_brings_the_command(clean_python: Path, tmp_path: Path) -> None:
    command = clean_python.with_name("mnv2")
    assert "usage: mnv2" in run(command, "--help", cwd=tmp_path)
    assert "mnv2" in in_empty_folder(clean_python, tmp_path, "-m", "mnv2_fast", "info")


def test_extension_of_another_python_falls_back_to_eager(
    clean_python: Path, source_tree: Path, tmp_path: Path
) -> None:
    inside = "import mnv2_fast; print(mnv2_fast.__path__[0])"
    package = Path(in_empty_folder(clean_python, tmp_path, "-c", inside).strip())
    (extension,) = package.glob("_C.*.so")
    other = extension.with_name("_C.cpython-399-x86_64-linux-gnu.so")
    extension.rename(other)
    try:
        available, _, reason = in_empty_folder(clean_python, tmp_path, "-c", PROGRAM).partition(" ")
    finally:
        other.rename(extension)
    assert available == "False"
    assert "_C" in reason
    assert len(reason.strip().splitlines()) == 1


def test_wheel_holds_what_it_should_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(archive.read(next(n for n in names if n.endswith("METADATA"))))
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {
        "mnv2_fast",
        f"mnv2_fast-{metadata['Version']}.dist-info",
    }
    packaged = {name for name in names if name.endswith(".py")}
    for package, folder in (("mnv2_fast", ROOT / "mnv2_fast"), ("mnv2_fast/kernels", ROOT / "kernels")):
        expected = {f"{package}/{path.relative_to(folder)}" for path in folder.rglob("*.py")}
        assert expected <= packaged, sorted(expected - packaged)
    (extension,) = (name for name in names if name.endswith(".so"))
    assert sizes[extension] < 3_300_000  # three precisions, each for the instruction sets that change it
    # The flower classifier, so that a machine without a network has trained weights: int8, as floats 9 MB.
    assert 2_000_000 < sizes["mnv2_fast/assets/flowers-int8.safetensors"] < 2_600_000
    assert "mnv2_fast/assets/flowers-int8.md" in names
    assert sum(sizes.values()) < 7_000_000


def test_extension_links_to_the_system_only(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        extension = archive.extract(name, tmp_path)
    needed = re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", extension))
    assert "libgomp.so.1" in needed  # the name under which torch brings its own: one pool for both
    assert [library for library in needed if not LINKED.fullmatch(library)] == []


@pytest.mark.usefixtures("wheel")
def test_isa_objects_share_no_code_with_each_other(source_tree: Path) -> None:
    """A weak symbol compiled for AVX-512 may be the one that the linker keeps for every processor."""
    isas = re.findall(r"^ISA\((\w+),", (ROOT / "csrc" / "isa.def").read_text(), re.MULTILINE)
    assert {"avx512", "avx2", "scalar"} <= set(isas)
    for isa in isas:
        objects = list((source_tree / "build").glob(f"cmake-*/CMakeFiles/isa_{isa}.dir/**/*.o"))
        assert objects, isa
        for path in objects:
            symbols = [line.split() for line in run("nm", "-C", "--defined-only", path).splitlines()]
            kinds = {" ".join(fields[2:]): fields[1] for fields in symbols}
            assert [name for name, kind in kinds.items() if kind in "wWvVu"] == [], path
            # What it shows to other objects carries its own name.
            assert [name for name, kind in kinds.items() if kind.isupper() and isa not in name] == [], path


def test_one_openmp_runtime_beside_torch(native: None, run_python: RunPython) -> None:
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    brought = [path.name for name in OPENMP for path in libraries.glob(f"{name}*.so*")]
    if brought != ["libgomp.so.1"]:
        pytest.skip(f"this torch brings {brought}, under names that no other library can share")
    code = f"""
import os, torch
from mnv2_fast import MobileNetV2, compile
compile(MobileNetV2().eval(), threads=2)(torch.randn(1, 3, 32, 32))
torch.randn(512, 512) @ torch.randn(512, 512)
files = {{line.split()[-1] for line in open("/proc/self/maps") if "/" in line}}
assert any("/mnv2_fast/_C." in file for file in files)
print(*(file for file in files if os.path.basename(file).startswith({OPENMP!r})), sep="\\n")
"""
    runtimes = run_python(code).stdout.split()
    assert [Path(runtime).parent for runtime in runtimes] == [libraries]


def test_import_costs_little_more_than_torch(run_python: RunPython) -> None:
    """Processor time of both in one process, the least of each: a busy machine only ever adds to either."""
    code = """
import time; begin = time.process_time()
import torch; between = time.process_time()
from mnv2_fast import MobileNetV2
print(between - begin, time.process_time() - between)
"""
    times = [[float(value) for value in run_python(code).stdout.split()] for _ in range(3)]
    least = [min(values) for values in zip(*times, strict=True)]
    assert least[1] < 0.2 * least[0], times


def test_import_loads_no_optional_package(run_python: RunPython) -> None:
    code = """
import sys, torch
before = set(sys.modules)
from mnv2_fast import MobileNetV2, compile, load, Predictor
optional = "torchvision matplotlib onnx onnxruntime onnxscript openvino triton skimage sklearn".split()
print(*(name for name in optional if name in sys.modules and name not in before))
"""
    assert run_python(code).stdout.split() == []


def test_constraints_pin_every_direct_dependency() -> None:
    pins = {
        canonicalize_name(Requirement(line).name): str(Requirement(line).specifier)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["project"]["optional-dependencies"].values():
        asked += extra
    names = {canonicalize_name(Requirement(text).name) for text in asked} - {"mnv2-fast"}
    assert sorted(names - pins.keys()) == []
    assert all(pin.startswith("==") for pin in pins.values())
    assert pins["torch"] == "==2.13.0"
    assert pins["torchvision"] == "==0.28.0"
    assert "triton" not in pins  # a torch with CUDA insists on its own


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler is not there"),
        ({"CXX": "", "PATH": ""}, "there is no C++ compiler"),
        ({"CXX": "false"}, "builds no C++17 program with OpenMP"),
        ({"MINIMUM_DISK_GB": "1e9"}, "GB are free"),
    ],
)
def test_what_a_machine_lacks_is_said_in_one_line(environment: dict[str, str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "preflight.py"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("mnv2: error: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("sys.version_info = (3, 10)", "too old"),
        ("importlib.util.find_spec = lambda name: None", "python3-venv"),
        ("sysconfig.get_paths = lambda: {'include': '/nowhere'}", "python3-dev"),
    ],
)
def test_what_python_lacks_is_said_in_one_line(broken: str, says: str, run_python: RunPython) -> None:
    code = f"""
import importlib.util, sys, sysconfig
sys.path.insert(0, "tools")
import preflight
{broken}
sys.exit(preflight.main(["python"]))
"""
    done = run_python(code, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_make_installs_the_build_requirements_and_no_more() -> None:
    (line,) = re.findall(
        r"^\t\$\(PIP\) install -c constraints\.txt (.*)$", (ROOT / "Makefile").read_text(), re.M
    )
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert set(line.split()) == {Requirement(text).name for text in required}


def test_a_second_make_does_no_work_twice(tmp_path: Path) -> None:
    for name in FILES + MAKE_FILES:
        shutil.copy2(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")

    def planned(target: str) -> str:
        return run("make", "--no-print-directory", "-n", target, cwd=tmp_path)

    assert "-m venv" in planned("demo")
    (tmp_path / ".venv").mkdir()
    for stamp in (".made", ".tools", ".demo", ".dev"):
        (tmp_path / ".venv" / stamp).touch()
    for target in ("demo", "test", "lint"):
        assert "install" not in planned(target)
    source = tmp_path / "csrc" / "bind.cpp"
    later = (tmp_path / ".venv" / ".dev").stat().st_mtime + 3600
    os.utime(source, (later, later))
    for target in ("demo", "test"):
        assert planned(target).count("install --no-build-isolation") == 1
