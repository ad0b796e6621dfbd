"""A labelled folder of photos: found, split, and cached; `test_loading.py` makes batches of it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnv2_fast import UserError, data, imagecache, photos
from mnv2_fast._torchvision import torchvision
from mnv2_fast.weights import Preprocessing

SMALL = Preprocessing(resize=20, crop=16)
LARGE = Preprocessing(resize=200, crop=16)
HOUR_AGO_NS = time.time_ns() - 3600 * 10**9


def _save(path: Path, seed: int = 0, width: int = 30, height: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def _tree(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def _counts(found: Iterable[photos.Photo]) -> dict[int, int]:
    labels = [photo.label for photo in found]
    return {label: labels.count(label) for label in sorted(set(labels))}


def test_classes_and_labels_are_those_of_image_folder(tmp_path: Path) -> None:
    names = ["b c/1.png", "b c/deep/2.PNG", "Zoë/1.png", "a/x y.jpg", "a/ü.jpg", "_/1.webp", "花/1.png"]
    for side in ("train", "val"):
        _tree(tmp_path / side, [*names, "a/notes.txt", ".cache/1.png"])
    found = photos.find(tmp_path)
    for side, ours in (("train", found.train), ("val", found.val)):
        theirs = torchvision().datasets.ImageFolder(
            str(tmp_path / side), is_valid_file=lambda path: "notes" not in path and "/." not in path,
            allow_empty=True,
        )  # fmt: skip
        assert [name for name in theirs.classes if name != ".cache"] == list(found.classes)
        expected = sorted((path, theirs.classes[label]) for path, label in theirs.samples)
        assert sorted((str(photo.path), found.classes[photo.label]) for photo in ours) == expected
    assert found.classes == ("Zoë", "_", "a", "b c", "花")


def test_the_flower_photos(flowers: Path) -> None:
    found = photos.find(flowers)
    assert found.classes == ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    assert (len(found.train), len(found.val)) == (1720, 430)
    assert all("/train/" in str(photo.path) for photo in found.train)
    split = photos.find(flowers / "train", val_share=0.25)
    assert len(split.val) == pytest.approx(430, abs=3)


def test_a_split_keeps_every_photo_once_and_the_share_of_each_class(tmp_path: Path) -> None:
    sizes = {"a": 2, "b": 3, "c": 10, "d": 50}
    _tree(tmp_path, [f"{name}/{i}.jpg" for name, size in sizes.items() for i in range(size)])
    found = photos.find(tmp_path)
    assert _counts(found.val) == {0: 1, 1: 1, 2: 2, 3: 10}
    assert _counts(found.train) == {0: 1, 1: 2, 2: 8, 3: 40}
    assert len({photo.path for photo in (*found.train, *found.val)}) == 65
    assert all(photo.path.parent.name == found.classes[photo.label] for photo in found.train)
    for share, most in ((0.001, {0: 1, 1: 1, 2: 1, 3: 1}), (0.9, {0: 1, 1: 2, 2: 9, 3: 45})):
        assert _counts(photos.find(tmp_path, share).val) == most


def test_a_split_follows_from_seed_and_class_alone(tmp_path: Path) -> None:
    _tree(tmp_path, [f"{name}/{i:02}.jpg" for name in "bc" for i in range(40)])
    first = photos.find(tmp_path)
    assert photos.find(tmp_path) == first
    assert photos.find(tmp_path, seed=1).val != first.val
    names = [[p.path.name for p in first.val if p.label == label] for label in (0, 1)]
    assert names[0] != names[1]
    _tree(tmp_path, ["b/new.jpg", "a/1.jpg", "a/2.jpg"])
    again = photos.find(tmp_path)
    assert [p.path for p in again.val if p.label == 2] == [p.path for p in first.val if p.label == 1]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    _tree(tmp_path, [f"{name}/{i}.jpg" for name in ("train", "bus") for i in range(3)])
    assert photos.find(tmp_path).classes == ("bus", "train")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], "no photos in subfolders of .*put those of each class"),
        (["1.jpg", "2.jpg"], "no photos in subfolders"),
        (["a/1.jpg", "a/2.jpg"], "one class only, 'a': add a folder"),
        (["a/1.jpg", "a/2.jpg", "b/1.jpg"], "class 'b' .*has one photo.*add photos, or remove"),
        (["a/1.jpg", "a/2.jpg", "b/notes.txt"], "no photos in .*b: put some there"),
        (["train/a/1.jpg", "train/b/1.jpg"], "has train/ and no val/: add it, or give .*train to split"),
        (["val/a/1.jpg", "val/b/1.jpg"], "has val/ and no train/"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"], "no photos in subfolders of .*val"),
        (["train/a/1.jpg", "val/a/1.jpg"], "one class only"),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "train/c d/1.jpg", "val/a/1.jpg", "val/ü/1.jpg"],
            "differ in their classes, only train/ has 'b', 'c d'; only val/ has 'ü': give both",
        ),
    ],
)
def test_a_folder_that_cannot_be_learned_from_is_one_line(
    tmp_path: Path, names: list[str], match: str
) -> None:
    with pytest.raises(UserError, match=match) as caught:
        photos.find(_tree(tmp_path, names))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_such_folder_and_bad_numbers(tmp_path: Path) -> None:
    _tree(tmp_path, ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"])
    with pytest.raises(UserError, match=r"'.*/none' does not exist: give one with a subfolder per class"):
        photos.find(tmp_path / "none")
    with pytest.raises(UserError, match="is a file"):
        photos.find(tmp_path / "a" / "1.jpg")
    with pytest.raises(UserError, match="'' does not exist"):
        photos.find("")
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(UserError, match=r"above 0 and at most 0\.9"):
            photos.find(tmp_path, share)
    with pytest.raises(UserError, match="seed=-1"):
        photos.find(tmp_path, seed=-1)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Six photos of several sizes, and one that is cut off; an hour old, so that their times are believed."""
    found = [_save(tmp_path / "p" / f"{i} ü.png", i, 30 + i, 24 + i % 3) for i in range(6)]
    found.append(tmp_path / "p" / "cut.png")
    found[-1].write_bytes(found[0].read_bytes()[:200])
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of photos in the order they are decoded."""
    names: list[str] = []
    real = imagecache.load_resized

    def load(path: Path, preprocessing: Preprocessing, content: bytes | None = None) -> np.ndarray:
        names.append(path.name)
        return real(path, preprocessing, content)

    monkeypatch.setattr(imagecache, "load_resized", load)
    return names


def _open(
    paths: list[Path], preprocessing: Preprocessing = SMALL, most: int = 10**7
) -> imagecache.ImageCache:
    root = paths[0].parent
    cache = imagecache.open_cache(root.parent / "cache", root, paths, preprocessing, most_bytes=most)
    assert cache is not None
    return cache


def _expected(path: Path, preprocessing: Preprocessing = SMALL) -> np.ndarray:
    return np.asarray(data.resize_shorter_side(data.read_image(path), preprocessing))


def _check(cache: imagecache.ImageCache, paths: list[Path], preprocessing: Preprocessing = SMALL) -> None:
    for path in paths:
        pixels = cache.get(path)
        assert pixels is not None
        np.testing.assert_array_equal(pixels, _expected(path, preprocessing))


def test_a_photo_is_decoded_once_and_a_damaged_one_remembered(paths: list[Path], decoded: list[str]) -> None:
    _check(_open(paths), paths[:-1])
    assert sorted(decoded) == sorted(path.name for path in paths)
    decoded.clear()
    cache = _open(paths)
    _check(cache, paths[:-1])
    with pytest.raises(data.ImageError, match=r"cut.png is truncated or damaged"):
        cache.get(paths[-1])
    assert cache.get(paths[0].with_name("other.png")) is None
    assert decoded == []


def test_pixels_may_not_be_written(paths: list[Path]) -> None:
    pixels = _open(paths).get(paths[0])
    assert pixels is not None
    with pytest.raises(ValueError, match="read-only"):
        pixels[:] = 0


@pytest.mark.parametrize("kind", ["times are old", "times are new and stand still"])
def test_a_change_of_content_is_seen_whatever_its_times(
    paths: list[Path], decoded: list[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    old = paths[0].stat()
    if kind == "times are old":  # the cache is made an hour later: its reader believes them
        monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 3600 * 10**9)
    else:
        monkeypatch.setattr(imagecache, "_stat", lambda _: [1, old.st_mtime_ns, old.st_ctime_ns])
    _open(paths)
    decoded.clear()
    size = old.st_size
    other = _save(paths[0].with_name("other.png"), 99).read_bytes()
    paths[0].write_bytes((other + bytes(size))[:size])
    os.utime(paths[0], ns=(old.st_atime_ns, old.st_mtime_ns))
    _check(_open(paths), paths[:-1])
    assert decoded == [paths[0].name]


def test_new_times_alone_decode_nothing(paths: list[Path], decoded: list[str]) -> None:
    _open(paths)
    decoded.clear()
    for path in paths:
        os.utime(path, ns=(HOUR_AGO_NS, HOUR_AGO_NS))
    _check(_open(paths), paths[:-1])
    assert decoded == []


def test_files_that_stand_unchanged_are_not_read_again(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 3600 * 10**9)  # made an hour later
    _open(paths)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"reads {path}"))
    _open(paths)


def test_a_file_that_could_not_be_read_is_tried_again(
    paths: list[Path], decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 3600 * 10**9)  # times are believed
    real = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path == paths[2]:
            raise OSError(5, "Input/output error")
        return real(path)

    with monkeypatch.context() as disk:
        disk.setattr(Path, "read_bytes", broken)
        with pytest.raises(data.ImageError, match=r"2 ü.png cannot be read \(Input/output error\)"):
            _open(paths).get(paths[2])
        decoded.clear()
        _open(paths)
        assert decoded == []
    _check(_open(paths), paths[:-1])
    assert decoded == [paths[2].name]


def test_a_new_photo_is_added_and_one_gone_does_no_harm(paths: list[Path], decoded: list[str]) -> None:
    _open(paths)
    decoded.clear()
    added = _save(paths[0].with_name("new.png"), 7)
    paths[1].unlink()
    left = [added, *paths[2:-1], paths[0]]
    _check(_open(left), left)
    assert decoded == ["new.png"]


def test_another_preprocessing_has_a_cache_of_its_own(paths: list[Path], decoded: list[str]) -> None:
    first = _open(paths)
    other = Preprocessing(resize=18, crop=16)
    second = _open(paths, other)
    assert first.file != second.file
    assert first.fits(Preprocessing(resize=20, crop=8))
    assert not first.fits(other)
    pixels = second.get(paths[0])
    assert pixels is not None
    np.testing.assert_array_equal(pixels, _expected(paths[0], other))
    decoded.clear()
    _check(_open(paths), paths[:-1])
    assert decoded == []


def test_another_pillow_decodes_again(
    paths: list[Path], decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _open(paths)
    decoded.clear()
    monkeypatch.setattr(imagecache.PIL, "__version__", "0")
    _open(paths)
    assert len(decoded) == len(paths)


def test_the_bound_holds_and_the_rest_is_told_of(paths: list[Path], decoded: list[str]) -> None:
    one = _expected(paths[0], LARGE).nbytes
    most = 2 * one + one // 2
    with pytest.warns(UserWarning, match=r"keeps 2 of 7 photos within 0.4 MB, all need about 1.0 MB"):
        cache = _open(paths, LARGE, most)
    assert cache.file.stat().st_size < most + 2000
    _check(cache, paths[:2], LARGE)
    assert cache.get(paths[5]) is None
    decoded.clear()
    with pytest.warns(UserWarning, match="keeps 2 of 7"):
        _open(paths, LARGE, most)
    assert decoded == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _check(_open(paths, LARGE), paths[:-1], LARGE)
    assert sorted(decoded) == sorted(path.name for path in paths[2:])
    with pytest.warns(UserWarning, match="keeps 1 of 7"):
        cache = _open(paths, LARGE, one)
    assert cache.file.stat().st_size < one + 2000
    with pytest.raises(UserError, match="allow at least 1"):
        _open(paths, LARGE, 0)


def test_what_is_left_of_a_run_cut_off_is_made_good(paths: list[Path], decoded: list[str]) -> None:
    cache = _open(paths)
    content = cache.file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"something else", content[:-3]):
        cache.file.with_suffix(".part").write_bytes(damaged)
        cache.file.unlink()
        cache.file.write_bytes(damaged)
        decoded.clear()
        _check(_open(paths), paths[:-1])
        assert len(decoded) == len(paths)
    assert not cache.file.with_suffix(".part").exists()


def test_an_interrupted_update_leaves_the_old_file(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = _open(paths)
    before = cache.file.read_bytes()

    def interrupted(*_: object) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(imagecache, "load_resized", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _open([*paths, _save(paths[0].with_name("new.png"))])
    assert cache.file.read_bytes() == before
    assert not cache.file.with_suffix(".part").exists()


def test_a_folder_that_cannot_be_written_means_no_cache(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="no image cache in .*decoded in every epoch; make room"):
        assert imagecache.open_cache(tmp_path / "file", tmp_path, paths, SMALL) is None

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert imagecache.open_cache(tmp_path / "c", tmp_path, paths, SMALL) is None
    assert not list((tmp_path / "c").glob("*.[ip]*"))


def _count_decoded(paths: list[Path], answers: multiprocessing.SimpleQueue[int]) -> None:
    real, count = imagecache.load_resized, []

    def load(path: Path, preprocessing: Preprocessing, content: bytes | None = None) -> np.ndarray:
        count.append(path)
        time.sleep(0.02)  # so that the others come while this one is at work
        return real(path, preprocessing, content)

    imagecache.load_resized = load
    _check(_open(paths), paths[:-1])
    answers.put(len(count))


def test_processes_that_start_together_decode_once(paths: list[Path]) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_count_decoded, args=(paths, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    # A process that waited decodes nothing; `_check` reads what it compares with by itself.
    assert sorted(answers.get() for _ in processes) == [0, 0, len(paths)]


def test_a_cache_goes_to_another_process_without_its_pixels(paths: list[Path]) -> None:
    cache = _open(paths, LARGE)
    sent = pickle.dumps(cache)
    assert len(sent) < 5000
    there = pickle.loads(sent)
    np.testing.assert_array_equal(there.get(paths[0]), cache.get(paths[0]))
    late, gone = pickle.loads(sent), pickle.loads(sent)
    _save(paths[0], 50)
    _open(paths, LARGE)
    assert late.get(paths[1]) is None  # another file, other offsets
    assert there.get(paths[1]) is not None  # mapped before it was replaced
    cache.file.unlink()
    assert gone.get(paths[1]) is None


def test_progress_is_told(paths: list[Path], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    imagecache.open_cache(tmp_path / "c", tmp_path, paths, SMALL, progress=lambda *done: told.append(done))
    assert told == [(i + 1, len(paths)) for i in range(len(paths))]
