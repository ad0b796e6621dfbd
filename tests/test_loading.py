"""Batches of a labelled folder: the same bits whatever makes them, and no photo lost without a word."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mnv2_fast import UserError, data, imagecache, loading, photos
from mnv2_fast.loading import Batch, EpochSampler, Loader, PhotoDataset, worker_errors
from mnv2_fast.photos import LabelledFolder
from mnv2_fast.weights import Preprocessing

SMALL = Preprocessing(resize=20, crop=16)


@pytest.fixture
def folder(tmp_path: Path) -> LabelledFolder:
    """12 photos to train on and 6 to validate on, of 3 classes."""
    rng = np.random.default_rng(0)
    for side, count in (("train", 4), ("val", 2)):
        for name in ("a", "b b", "ü"):
            for i in range(count):
                path = tmp_path / "photos" / side / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (24, 28 + i, 3), dtype=np.uint8)).save(path)
    return photos.find(tmp_path / "photos")


def _dataset(folder: LabelledFolder, seed: int = 0, cache: bool = False) -> PhotoDataset:
    opened = None
    if cache:
        paths = [photo.path for photo in folder.train]
        opened = imagecache.open_cache(folder.root.parent / "cache", folder.root, paths, SMALL)
        assert opened is not None
    names = ("crop", "flip", "rotation", "colour", "erasing")
    transform = loading.augmentation(SMALL, names)
    return PhotoDataset(
        folder.train, folder.classes, SMALL, transform, seed=seed, cache=opened, every_class=True
    )


def _epochs(loader: Loader, epochs: Sequence[int] = (0, 1), start: int = 0) -> list[Batch]:
    return [batch for epoch in epochs for batch in loader.epoch(epoch, start)]


def _same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_without_augmentation_the_network_sees_what_a_predictor_sees(folder: LabelledFolder) -> None:
    dataset = PhotoDataset(folder.val, folder.classes, SMALL)
    assert len(dataset) == 6
    seen = []
    for i, photo in enumerate(folder.val):
        image, label = dataset[i]
        expected = torch.from_numpy(data.resize_and_crop(data.read_image(photo.path), SMALL).copy())
        assert torch.equal(image, expected.permute(2, 0, 1))
        assert label == photo.label
        seen.append(expected)
    (batch,) = Loader(dataset, EpochSampler(6, 6, training=False), workers=0).epoch()
    assert torch.equal(batch.images, data.normalize(torch.stack(seen), SMALL))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images.dtype == torch.float32
    assert batch.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.indices.tolist() == list(range(6))


def test_augmentation_follows_from_seed_epoch_and_number(folder: LabelledFolder) -> None:
    dataset = _dataset(folder)
    image, _ = dataset[3, 5]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 16, 16)
    before = torch.get_rng_state()
    dataset[1, 2]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(dataset[3, 5][0], image)
    assert torch.equal(_dataset(folder)[3, 5][0], image)
    assert not torch.equal(dataset[4, 5][0], image)
    assert not torch.equal(_dataset(folder, seed=1)[3, 5][0], image)
    assert torch.equal(dataset[5][0], dataset[0, 5][0])


def test_the_cache_changes_no_bit(folder: LabelledFolder) -> None:
    with_cache, without = _dataset(folder, cache=True), _dataset(folder)
    for i in range(len(without)):
        assert torch.equal(with_cache[2, i][0], without[2, i][0])
    other = Preprocessing(resize=18, crop=16)
    with pytest.raises(UserError, match="for another preprocessing"):
        PhotoDataset(folder.train, folder.classes, other, cache=with_cache._cache)


def test_workers_change_no_bit_and_draw_from_no_generator_of_the_model(folder: LabelledFolder) -> None:
    sampler = EpochSampler(12, 5, seed=3)
    before = torch.get_rng_state()
    alone = _epochs(Loader(_dataset(folder), sampler, workers=0))
    assert [len(batch.labels) for batch in alone] == [5, 5, 2, 5, 5, 2]
    assert _same(_epochs(Loader(_dataset(folder, cache=True), EpochSampler(12, 5, seed=3), workers=2)), alone)
    assert torch.equal(torch.get_rng_state(), before)
    assert not _same(alone[:3], alone[3:])
    assert not _same(_epochs(Loader(_dataset(folder), EpochSampler(12, 5, seed=4), workers=0)), alone)


def test_training_begins_again_in_mid_epoch(folder: LabelledFolder) -> None:
    loader = Loader(_dataset(folder), EpochSampler(12, 2), workers=1)
    whole = _epochs(loader, [5])
    for batch in loader.epoch(5):  # cut off
        assert _same([batch], whole[:1])
        break
    assert _same(_epochs(loader, [5], start=4), whole[4:])
    assert _epochs(loader, [5], start=6) == []
    assert _same(_epochs(loader, [5]), whole)


def test_a_dataset_can_be_sent_to_a_worker(folder: LabelledFolder) -> None:
    dataset = _dataset(folder, cache=True)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1, 2][0], dataset[1, 2][0])


def test_a_transform_to_float_is_not_normalized_again(folder: LabelledFolder) -> None:
    def transform(image: Tensor) -> Tensor:
        return image[:, :16, :16].float() + torch.rand(())

    dataset = PhotoDataset(folder.train, folder.classes, SMALL, transform)
    (batch,) = Loader(dataset, EpochSampler(12, 12), workers=0).epoch()
    assert torch.equal(batch.images[3], dataset[0, int(batch.indices[3])][0])


@pytest.mark.parametrize("name", loading.AUGMENTATIONS)
def test_each_augmentation_alone_changes_the_photo(name: str) -> None:
    image = torch.randint(0, 256, (3, 20, 27), dtype=torch.uint8)
    plain = loading.augmentation(SMALL, ())(image)
    assert torch.equal(plain, torch.from_numpy(_cropped(image)).permute(2, 0, 1))
    changed = [loading.augmentation(SMALL, (name,))(image) for _ in range(20)]
    assert all(c.shape == (3, 16, 16) and c.dtype == torch.uint8 for c in changed)
    assert any(not torch.equal(c, plain) for c in changed)


def _cropped(image: Tensor) -> np.ndarray:
    return data.centre_crop(Image.fromarray(image.permute(1, 2, 0).numpy()), SMALL).copy()


def test_an_unknown_augmentation_is_named() -> None:
    with pytest.raises(UserError, match="augmentation flop: use some of crop, flip"):
        loading.augmentation(SMALL, ("crop", "flop"))


def _order(sampler: EpochSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert all(key[0] == epoch for batch in batches for key in batch)
    return [[i for _, i in batch] for batch in batches]


def test_an_epoch_has_each_photo_once_in_an_order_of_its_own() -> None:
    first, second = (_order(EpochSampler(50, 8), epoch) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [8] * 6 + [2]
    assert sorted(chain.from_iterable(first)) == list(range(50))
    assert first != second
    assert _order(EpochSampler(50, 8), 1) == second
    assert _order(EpochSampler(50, 8, seed=1)) != first
    assert _order(EpochSampler(50, 8, drop_last=True)) == first[:-1]
    assert [len(b) for b in _order(EpochSampler(5, 8, drop_last=True))] == [5]
    assert list(chain.from_iterable(_order(EpochSampler(50, 8, training=False)))) == list(range(50))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(world: int) -> None:
    alone = _order(EpochSampler(50, 4 * world, seed=2), 7)
    shares = [_order(EpochSampler(50, 4, seed=2, rank=r, world=world), 7) for r in range(world)]
    assert len({len(share) for share in shares}) == 1
    for k, batch in enumerate(alone):
        together = [share[k] for share in shares]
        assert len({len(part) for part in together}) == 1
        joined = [part[j] for j in range(len(together[0])) for part in together]
        assert joined[: len(batch)] == batch
        assert len(joined) - len(batch) < world


def test_a_process_short_of_photos_takes_from_the_beginning() -> None:
    shares = [_order(EpochSampler(2, 4, rank=r, world=5)) for r in range(5)]
    assert [len(share[0]) for share in shares] == [1] * 5
    assert {share[0][0] for share in shares} == {0, 1}


@pytest.mark.parametrize("count", [1, 7, 8, 9, 12])
def test_processes_validate_each_photo_once(count: int) -> None:
    shares = [_order(EpochSampler(count, 2, training=False, rank=r, world=4)) for r in range(4)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(count))
    assert all(batch for share in shares for batch in share)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ({"count": 0}, "at least one photo"),
        ({"batch_size": 0}, "batch of at least 1"),
        ({"seed": -1}, "seed of at least 0"),
        ({"rank": 2, "world": 2}, "ranks go from 0"),
    ],
)
def test_numbers_that_make_no_sense(kind: dict[str, int], match: str) -> None:
    with pytest.raises(UserError, match=match):
        EpochSampler(**{"count": 4, "batch_size": 2, **kind})


def _damage(folder: LabelledFolder) -> list[Path]:
    """The first photos of each class in training cut off, empty and of text; one of validation gone."""
    cut, empty, text = (folder.train[i].path for i in (0, 4, 8))
    cut.write_bytes(cut.read_bytes()[:300])
    empty.write_bytes(b"")
    text.write_text("this is no photo")
    folder.val[5].path.unlink()
    return [cut, empty, text]


@pytest.mark.parametrize(("workers", "cache"), [(0, False), (2, False), (0, True), (2, True)])
def test_a_damaged_photo_is_named_once_counted_and_replaced(
    folder: LabelledFolder, workers: int, cache: bool
) -> None:
    damaged = _damage(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = Loader(_dataset(folder, cache=cache), EpochSampler(12, 5), workers=workers)
        batches = _epochs(loader, [0, 1, 2])
    said = [str(warning.message) for warning in caught]
    assert len(said) == 3
    for path in damaged:
        assert sum(f"photo skipped: {path} is" in line for line in said) == 1
    assert set(loader.dataset.skipped) == set(damaged)
    assert [len(batch.labels) for batch in batches] == [5, 5, 2] * 3
    for batch in batches:
        assert not set(batch.indices.tolist()) & {0, 4, 8}
        assert [folder.train[i].label for i in batch.indices] == batch.labels.tolist()
    for epoch in range(3):
        labels = torch.cat([batch.labels for batch in batches[3 * epoch : 3 * epoch + 3]])
        assert labels.bincount().tolist() == [4, 4, 4]


def test_validation_goes_on_without_a_damaged_photo(folder: LabelledFolder) -> None:
    _damage(folder)
    dataset = PhotoDataset(folder.val, folder.classes, SMALL)
    for batch_size in (4, 1):
        loader = Loader(dataset, EpochSampler(6, batch_size, training=False), workers=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches = _epochs(loader, [0])
        assert len(caught) == (batch_size == 4)
        assert torch.cat([batch.indices for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    assert list(dataset.skipped.values()) == [f"no file {folder.val[5].path}: check the path"]
    with pytest.raises(data.ImageError, match="no file"):
        dataset[5]


@pytest.mark.filterwarnings("ignore:photo skipped")
@pytest.mark.parametrize(("workers", "cache"), [(0, False), (1, False), (0, True)])
def test_a_class_without_a_usable_photo_is_an_error(
    folder: LabelledFolder, workers: int, cache: bool
) -> None:
    for photo in folder.train[4:8]:
        photo.path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no photo of class 'b b' in .* can be used") as caught:
        _epochs(Loader(_dataset(folder, cache=cache), EpochSampler(12, 2), workers=workers))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:photo skipped")
def test_validation_goes_on_without_a_whole_class(folder: LabelledFolder) -> None:
    for photo in folder.val[2:4]:
        photo.path.write_bytes(b"")
    _, val = loading.make_loaders(folder, SMALL, 4, workers=0)
    assert torch.cat([batch.labels for batch in val.epoch()]).tolist() == [0, 0, 2, 2]
    assert len(val.dataset.skipped) == 2


def test_a_worker_that_has_ended_is_one_line(folder: LabelledFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading._Batches, "_fetch", lambda self, keys: os._exit(9))
    _, val = loading.make_loaders(folder, SMALL, 4, workers=1)
    with pytest.raises(UserError, match="a process that makes batches has ended") as caught, worker_errors():
        list(val.epoch())
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="another mistake"), worker_errors():
        raise RuntimeError("another mistake")


def test_loaders_of_a_folder(folder: LabelledFolder, tmp_path: Path) -> None:
    train, val = loading.make_loaders(
        folder, SMALL, 4, seed=5, cache_folder=tmp_path / "cache", workers=0, rank=1, world=2
    )
    (first, _) = train.epoch(3)
    assert first.images.shape == (4, 3, 16, 16)
    assert [len(batch.labels) for batch in val.epoch()] == [3]
    assert len(list((tmp_path / "cache").glob("*.images"))) == 1
    full, _ = loading.make_loaders(folder, SMALL, 5, workers=0, drop_last=True)
    assert [len(batch.labels) for batch in full.epoch()] == [5, 5]
    own = lambda image: image[:, :8, :8]  # noqa: E731
    train, val = loading.make_loaders(folder, SMALL, 4, transform=own, workers=0)
    assert next(train.epoch()).images.shape == (4, 3, 8, 8)
    assert next(val.epoch()).images.shape == (4, 3, 16, 16)
    with pytest.raises(UserError, match="workers=-1"):
        loading.make_loaders(folder, SMALL, 4, workers=-1)


def test_workers_follow_from_the_cores(folder: LabelledFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((16, 8), (2, 1), (1, 1)):
        monkeypatch.setattr(loading.machine, "cores", lambda cores=cores: cores)
        assert loading.default_workers() == workers
        assert loading.default_workers(2) == max(1, workers // 2)
    assert [loader.workers for loader in loading.make_loaders(folder, SMALL, 4)] == [1, 1]
