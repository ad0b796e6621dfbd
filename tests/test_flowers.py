"""The flower photos: fetched once, checked, and unpacked whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers import colour_photos

from mnv2_fast import UserError, cli, costs, env, flowers


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that photos are fetched to."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv(env.DATA.name, str(folder))
    return folder


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an archive where it is downloaded from: some photos, and members of other names."""

    def make(members: Sequence[str] = (), checksum: str = "") -> None:
        photos = colour_photos(tmp_path / "source", 2, ["daisy", "tulips"])
        archive = tmp_path / "published.tgz"
        with tarfile.open(archive, "w:gz") as file:
            file.add(photos, "flower_photos")
            for name in members:
                member = tarfile.TarInfo(name)
                member.size = 4
                file.addfile(member, io.BytesIO(b"evil"))
        monkeypatch.setattr(flowers, "URL", archive.as_uri())
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(flowers, "SHA256", checksum or digest)

    return make


def test_fetched_once(publish: Callable[..., None], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    folder = flowers.fetch(progress=False)
    assert folder == data / "flower_photos"
    assert sorted(path.name for path in folder.iterdir()) == ["daisy", "tulips"]
    assert len(list(folder.glob("*/*.png"))) == 4
    monkeypatch.setattr(flowers, "URL", "https://nowhere.invalid/")
    assert flowers.fetch() == folder
    assert sorted(path.name for path in data.iterdir()) == ["flower_photos", "flower_photos.tgz"]


def test_an_archive_put_there_is_not_fetched(
    publish: Callable[..., None], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    (tmp_path / "published.tgz").rename(data / "flower_photos.tgz")
    assert len(list(flowers.fetch().glob("*/*.png"))) == 4


def _refused(data: Path) -> str:
    with pytest.raises(UserError) as caught:
        flowers.fetch(progress=False)
    assert "\n" not in str(caught.value)
    assert not (data / "flower_photos").exists()
    assert not list(data.glob(".*"))
    return str(caught.value)


def test_another_archive_is_refused(publish: Callable[..., None], data: Path) -> None:
    publish(checksum="0" * 64)
    assert "invalid hash value" in _refused(data)
    assert list(data.iterdir()) == []


def test_no_network_is_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowers, "URL", (tmp_path / "nowhere.tgz").as_uri())
    message = _refused(data)
    assert "put flower_photos.tgz in a folder and set MNV2_DATA to it" in message


def test_no_room_to_unpack_is_no_fault_of_the_archive(
    publish: Callable[..., None], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()

    def full(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", full)
        assert _refused(data).endswith(f"to unpack {data / 'flower_photos.tgz'}: make some")
    assert len(list(flowers.fetch().glob("*/*.png"))) == 4


@pytest.mark.parametrize("name", ["../escaped", "flower_photos/../../escaped"])
def test_an_archive_writes_nowhere_else(
    publish: Callable[..., None], data: Path, tmp_path: Path, name: str
) -> None:
    publish([name])
    assert "cannot be unpacked" in _refused(data)
    assert not list(tmp_path.rglob("escaped"))


def test_a_damaged_archive_is_refused(data: Path) -> None:
    (data / "flower_photos.tgz").write_bytes(b"no archive")
    assert "remove it to fetch it again" in _refused(data)


def test_the_command_takes_its_name(
    publish: Callable[..., None], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    publish()
    words = "--weights none --image-size 32 --epochs 1 --batch-size 2 --threads 1 --workers 0"
    threads = torch.get_num_threads()
    assert cli.main(["finetune", "--data", "flowers", "--out", "run", *words.split()]) == 0
    assert torch.get_num_threads() == threads
    assert str(data / "flower_photos") in (tmp_path / "run" / "args.yaml").read_text(encoding="utf-8")


def test_a_comparison_takes_their_name_and_puts_its_report_elsewhere(
    publish: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, "_compiled", lambda network, x: network)  # half a minute
    publish()
    words = "--seeds 1 --epochs 1 --batch-size 2 --workers 0 --only lenet --out runs --report report"
    assert cli.main(["compare", "--data", "flowers", *words.split()]) == 0
    assert "daisy, tulips" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report" / "curves.png").exists()
    assert not list((tmp_path / "runs").glob("*.png"))
    assert (tmp_path / "runs" / "settings.json").exists()


def test_the_checksum_is_whole() -> None:
    assert len(flowers.SHA256) == 64
    int(flowers.SHA256, 16)
