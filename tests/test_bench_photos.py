"""bench.photos: what it prints, and that both of its sides see the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # bench is not installed

from bench import photos


def test_photos_table_has_shares_and_the_ratio() -> None:
    ours, torch_side = photos.CONTENDERS[0], photos.CONTENDERS[1]
    rows = [
        photos._row(ours, photos.PASS, [100.0, 300.0, 200.0], 10, threads=2, note="10 photos of there"),
        photos._row(torch_side, photos.PASS, [700.0], 10, threads=2),
        *(
            photos._row(ours, stage, [ms], 10)
            for stage, ms in zip(photos.STAGES[ours.name], (3.0, 1.0, 4.0), strict=True)
        ),
        *(photos._row(torch_side, stage, [5.0], 10) for stage in photos.STAGES[torch_side.name]),
    ]
    assert (rows[0].ms, rows[0].ms_p20, rows[0].images_per_s) == (20.0, 10.0, 50.0)
    lines = photos.show(rows)
    assert lines[0] == "folder to labels, 2 core(s), 10 photos of there"
    assert [line.split()[-1] for line in lines if line.startswith("  decode")] == ["37.5%", "33.3%"]
    assert lines[-1] == "mnv2_fast 3.50x torchvision + torch eager (loop, batch 16), asked 3.00x: reached"


@pytest.mark.usefixtures("native")
def test_both_sides_see_the_same_photos(tmp_path: Path) -> None:
    """Every stage of both runs, in order; what they see and say of three photos is the same."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(3):
        values = rng.integers(0, 256, (24, 20 + 9 * i, 3), dtype=np.uint8)
        Image.fromarray(values).resize((300, 260 + 20 * i)).save(tmp_path / f"{i}.jpg")
    files = photos.files_in(tmp_path, 2)
    assert [file.name for file in files] == ["0.jpg", "1.jpg"]
    for contender in photos.CONTENDERS[:2]:
        call = photos.serve(list(map(str, files)), **vars(contender))
        for name in (photos.PASS, *photos.STAGES[contender.name]):
            call(name)()
    said = photos.agreement(photos.files_in(tmp_path, 200))
    assert said == "same first class on 3 of 3 photos; mean difference 0.000/255 at most"


def test_without_photos_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNV2_SHARED", str(tmp_path))
    sample = tmp_path / "data" / "imagenet_sample"
    said = f"no photos in {sample}: name a folder with --photos"
    assert photos.main([]) == 0
    assert capsys.readouterr().out == f"left out: bench.photos: {said}, or set MNV2_SHARED\n"
    sample.mkdir(parents=True)
    (sample / "README").touch()
    with pytest.raises(SystemExit) as stopped:  # asked for, it is a mistake
        photos.main(["--photos", str(sample)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {said}\n")


def test_photos_are_those_of_the_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV2_SHARED", str(tmp_path))
    sample = tmp_path / "data" / "imagenet_sample"
    sample.mkdir(parents=True)
    (sample / "n01440764_tench.JPEG").touch()
    taken: list[Path] = []

    def measure(files: list[Path], cores: list[int], rounds: int) -> list[object]:
        taken.extend(files)
        raise KeyboardInterrupt

    monkeypatch.setattr(photos, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        photos.main([])
    assert taken == [sample / "n01440764_tench.JPEG"]
