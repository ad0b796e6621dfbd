"""The package's layers: each module imports only those below it, heavy libraries only inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mnv2_fast"

# Top to bottom; modules of one row do not import each other. Leaves may be imported by all.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli", "serve"),
    ("cli_compare", "cli_evaluate", "cli_train"),
    ("compare_report",),
    ("compare",),
    ("costs",),
    ("blocks", "demo", "info"),
    ("report", "terminal"),
    ("train", "predict", "export", "quantize"),
    ("settle",),
    ("trainer",),
    ("evaluation",),
    ("engine",),
    ("eager_network", "images"),
    ("adopt",),
    ("model",),
    ("nn",),
    ("plans",),
    ("training_eval",),
    ("training",),
    ("training_head",),
    ("autograd", "reading"),
    ("ops",),
    ("packs",),
    ("backends.chains", "backends.triton_train"),
    ("backends.cpu_train",),
    ("backends.cpu", "backends.triton"),
    ("backends.replay", "backends.eager"),
    ("quant", "calibration"),
    ("chain", "int8"),
    ("_C", "kernels"),
)
# Of every layer above the model's.
BESIDE = (
    "data",
    "photos",
    "imagecache",
    "loading",
    "flowers",
    "distributed",
    "optim",
    "reporting",
    "runs",
    "stopping",
    "weights",
    "_torchvision",
    "files",
    "corruptions",
    "metrics",
    "plots",
    "lenet",
    "contenders",
)
LEAVES = ("arch", "env", "errors", "machine", "recipe")
INSIDE_ONLY = (
    "torchvision",
    "matplotlib",
    "tensorboard",
    "fastapi",
    "ray",
    "onnx",
    "onnxruntime",
    "tqdm",
    "triton",
    "yaml",
)

# Known exceptions: what imports upwards, inside a function, and why.
UPWARDS = {("model", "adopt"): "`accelerate` is found beside MobileNetV2; adopt builds on it"}


def modules() -> dict[str, Path]:
    """Module name within the package -> file."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names[name.removesuffix(".__init__")] = path
    return names


def imports(name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """(What a module imports, in full; whether at its top)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in ast.walk(tree)} - {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    here = ["mnv2_fast", *name.split(".")]
    is_package = path.name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + (1 if is_package else 0)] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{module}.{alias.name}" for alias in node.names] if module else []
            found = found or [alias.name for alias in node.names]
        else:
            continue
        for target in found:
            yield target, id(node) in top


def resolve(target: str, known: dict[str, Path]) -> str | None:
    """The package's module that an import names, or None for anything else."""
    if not target.startswith("mnv2_fast."):
        return None
    parts = target.split(".")[1:]
    while parts:
        name = ".".join(parts)
        if name in known or name in ("_C",) or parts[0] == "kernels":
            return "kernels" if parts[0] == "kernels" else name
        parts.pop()
    return None


def rank(name: str) -> int | None:
    """The layer's number from the top; None for a module that is in no layer."""
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


KNOWN = modules()


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in ("__init__", "backends", "assets")])
def test_imports_only_what_is_below(name: str) -> None:
    mine = rank(name)
    assert mine is not None or name in BESIDE + LEAVES, f"{name} is in no layer: give it a place in LAYERS"
    for target, _ in imports(name, KNOWN[name]):
        other = resolve(target, KNOWN)
        if other is None or other == name or other in LEAVES or (name, other) in UPWARDS:
            continue
        if name in LEAVES:
            pytest.fail(f"{name} is a leaf and imports {other}")
        if name in BESIDE:
            assert other in BESIDE, f"{name} imports {other}"
            continue
        assert other in BESIDE or (rank(other) or 0) > mine, f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", KNOWN)
def test_heavy_libraries_are_imported_inside_functions(name: str) -> None:
    for target, at_top in imports(name, KNOWN[name]):
        library = target.partition(".")[0]
        assert not (at_top and library in INSIDE_ONLY), f"{name} imports {library} at its top"
        if library == "torchvision":
            assert name == "_torchvision", f"{name} imports torchvision: only _torchvision does"


def test_kernels_import_nothing_of_the_package() -> None:
    for path in (PACKAGE.parent / "kernels").rglob("*.py"):
        for target, _ in imports("kernels." + path.stem, path):
            assert not target.startswith("mnv2_fast.") or target.startswith("mnv2_fast.kernels"), path
