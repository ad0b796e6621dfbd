"""The README's programs run, and what the documents name exists."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import colour_photos, one_thread  # noqa: F401 (a fixture)

from mnv2_fast import env

README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "mnv2_fast").rglob("*.md"))]


@pytest.mark.usefixtures("one_thread")
def test_readme_programs_run(
    weights_v1: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one namespace, as a reader would type them."""
    monkeypatch.setenv("MNV2_WEIGHTS", str(weights_v1.parent))
    monkeypatch.chdir(tmp_path)
    shutil.copy(photos[0], tmp_path / "cat.jpg")
    (tmp_path / "photos").mkdir()
    for photo in photos[:8]:
        shutil.copy(photo, tmp_path / "photos")
    shutil.copy(photos[0], tmp_path / "daisy.jpg")
    colour_photos(tmp_path / "flowers", 14)
    programs = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) >= 3
    names: dict[str, object] = {"torch": torch, "images": torch.zeros(2, 3, 64, 64)}
    for program in programs:
        exec(compile(program, str(README), "exec"), names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 5)


def test_readme_names_every_environment_variable() -> None:
    named = set(re.findall(r"`(MNV2_[A-Z_]+)`", README.read_text(encoding="utf-8")))
    assert named == {variable.name for variable in env.VARIABLES}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target


def test_design_names_only_what_exists() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:csrc|tests|bench|kernels|simd|backends)/[\w/.]*\w\.\w+)`", text)
    assert paths
    for path in paths:
        places = (ROOT / path, ROOT / "csrc" / path, ROOT / "mnv2_fast" / path)
        assert any(place.exists() for place in places), path


def test_make_targets_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for target in re.findall(
            r"(?:^|`)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE
        ):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_design_names_every_module() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    modules = {path.stem for path in (ROOT / "mnv2_fast").glob("*.py")} - {"__init__"}
    named = set(re.findall(r"`(\w+)`", text.partition("## The floors")[2].partition("\n## ")[0]))
    assert modules - named == set()


def test_speed_is_stated_where_it_was_measured() -> None:
    """What stands between the markers is written from the results: none without them, a row with them."""
    for mark, results in (
        ("bench.plot", "peers"),
        ("bench.plot training", "training"),
        ("bench.plot flowers", "flowers"),
    ):
        begin, end = (re.escape(f"<!-- {mark}: {word} -->") for word in ("begin", "end"))
        speed = re.findall(f"{begin}(.*?){end}", README.read_text("utf-8"), re.DOTALL)
        assert len(speed) == 1
        rows = re.findall(r"^\|.*\d.*\|$", speed[0], re.MULTILINE)
        assert bool(rows) <= (ROOT / "bench" / "results" / f"{results}.csv").exists()
