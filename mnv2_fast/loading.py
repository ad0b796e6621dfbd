"""From a labelled folder to batches: the dataset, its augmentation, the order of an epoch, and the loader.

Everything random follows from (seed, epoch) for the order and (seed, epoch, number of the photo) for the
augmentation. So training can begin again anywhere, and neither workers nor a cache change a bit.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from . import data, imagecache, machine
from ._torchvision import torchvision, transforms_v2
from .data import ImageError
from .errors import UserError
from .imagecache import ImageCache, Progress
from .photos import LabelledFolder, Photo
from .recipe import AUGMENTATIONS
from .weights import Preprocessing

_CORES_PER_WORKER = 2  # one makes several times the photos that two cores train on

Transform = Callable[[Tensor], Tensor]
Key = tuple[int, int]  # (epoch, number of the photo)


def augmentation(
    preprocessing: Preprocessing,
    names: Sequence[str] = ("crop", "flip"),
    scale: tuple[float, float] = (0.08, 1.0),
) -> Transform:
    """A torchvision v2 transform from a resized photo, uint8 [3, H, W], to uint8 [3, crop, crop].

    Args:
        preprocessing: its `crop` and `interpolation` count; erased parts have the colour of its `mean`.
        names: of `AUGMENTATIONS`. "crop" is a random resized crop, without it the centre is cut out; "flip"
            left to right; "rotation" up to 15 degrees; "colour" jitters brightness, contrast and saturation
            by 0.4; "randaugment" and "erasing" have torchvision's defaults.
        scale: least and most share of the area that "crop" takes.

    Raises:
        UserError: a name is none of these, or torchvision is not installed.
    """
    unknown = sorted(set(names) - set(AUGMENTATIONS))
    if unknown:
        raise UserError(f"augmentation {', '.join(unknown)}: use some of {', '.join(AUGMENTATIONS)}")
    v2 = transforms_v2()
    size = preprocessing.crop
    interpolation = torchvision().transforms.InterpolationMode(preprocessing.interpolation)
    mean = [round(255 * value) for value in preprocessing.mean]
    steps = {
        "crop": v2.RandomResizedCrop(size, scale, interpolation=interpolation),
        "flip": v2.RandomHorizontalFlip(),
        "rotation": v2.RandomRotation(15, interpolation, fill=mean),
        "colour": v2.ColorJitter(0.4, 0.4, 0.4),  # with hue, 3.2 ms a photo and not 0.7
        "randaugment": v2.RandAugment(interpolation=interpolation),
        "erasing": v2.RandomErasing(value=mean),
    }
    chosen = [step for name, step in steps.items() if name in names]
    return v2.Compose(chosen if "crop" in names else [v2.CenterCrop(size), *chosen])


class PhotoDataset(Dataset[tuple[Tensor, int]]):
    """Photos with their labels; `dataset[i]` or, augmented as in an epoch, `dataset[epoch, i]`.

    An item is (image, label). Without a transform the image is what a `Predictor` would see, uint8
    [3, crop, crop]. With one it is what that makes of the resized photo, uint8 [3, H, W], by torch's global
    random generator, which is seeded for it and then put back.

    Args:
        photos: of one side of a `LabelledFolder`.
        classes: its class names.
        preprocessing: of the network.
        transform: to a uint8 or float tensor.
        seed: of the augmentation, at least 0.
        cache: of the resized photos.
        every_class: one without a usable photo is an error, as it is in training.

    Attributes:
        skipped: the photos found unusable so far, and why.
        says: whether each is warned of when it is found; by default it is.

    Raises:
        UserError: the cache is for another preprocessing, or knows that a class has no usable photo.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        classes: Sequence[str],
        preprocessing: Preprocessing,
        transform: Transform | None = None,
        *,
        seed: int = 0,
        cache: ImageCache | None = None,
        every_class: bool = False,
    ) -> None:
        if cache is not None and not cache.fits(preprocessing):
            raise UserError(
                f"the image cache {cache.file} is for another preprocessing: open one for {preprocessing}"
            )
        self.photos, self.classes = list(photos), list(classes)
        self.preprocessing, self.transform, self.seed = preprocessing, transform, seed
        self.skipped: dict[Path, str] = {}
        self.says = True
        self._cache, self._every_class = cache, every_class
        self._members: list[list[int]] = [[] for _ in classes]
        for i, photo in enumerate(self.photos):
            self._members[photo.label].append(i)
        self._usable = [len(members) for members in self._members]
        for i in range(len(self.photos)):
            try:
                self._kept(i)
            except ImageError as error:
                self.skip(i, str(error))

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, int]:
        """Raises ImageError where the photo cannot be used; a `Loader` goes on past it."""
        epoch, i = key if isinstance(key, tuple) else (0, key)
        image = self._kept(i)
        if image is None:
            image = imagecache.load_resized(self.photos[i].path, self.preprocessing)
        label = self.photos[i].label
        if self.transform is None:
            seen = data.centre_crop(Image.fromarray(image), self.preprocessing)
            return torch.from_numpy(seen.copy()).permute(2, 0, 1), label
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random_seed(self.seed, epoch, i))
            return self.transform(pixels), label

    def class_mates(self, i: int) -> Iterator[int]:
        """The other photos of a photo's class, from the next one round to the one before it."""
        members = self._members[self.photos[i].label]
        at = members.index(i)
        yield from members[at + 1 :]
        yield from members[:at]

    def skip(self, i: int, why: str) -> None:
        """Take note that a photo cannot be used; the first time warn of it, if it `says` so.

        Raises:
            UserError: it was the last one of its class, and each needs one.
        """
        photo = self.photos[i]
        if photo.path in self.skipped:
            return
        self.skipped[photo.path] = why
        self._usable[photo.label] -= 1
        if self.says:
            warn_of(why)
        if self._every_class and not self._usable[photo.label]:
            raise UserError(
                f"no photo of class {self.classes[photo.label]!r} in {photo.path.parent} can be used, the "
                f"last one: {why}"
            )

    def skip_as_others(self, skipped: Mapping[str, str]) -> None:
        """Take note of photos that other processes have skipped: absolute path -> why.

        Raises:
            UserError: as `skip`.
        """
        for i, photo in enumerate(self.photos):
            why = skipped.get(os.path.abspath(photo.path))
            if why is not None:
                self.skip(i, why)

    def _kept(self, i: int) -> np.ndarray | None:
        return None if self._cache is None else self._cache.get(self.photos[i].path)


def warn_of(why: str) -> None:
    """Name a photo that is left out, by the reason, which has its path."""
    warnings.warn(f"photo skipped: {why}", stacklevel=2)


def random_seed(*numbers: int) -> int:
    """A seed from several numbers: equal for equal ones, unrelated for others."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class EpochSampler(Sampler[list[Key]]):
    """The batches of an epoch as lists of (epoch, number of the photo), for one of several processes.

    Batch k of all `world` processes together is what batch k would be of one process with a `batch_size`
    of `world * batch_size`; process `rank` has every world-th photo of it.

    Args:
        count: photos there are.
        batch_size: photos of one process in a batch.
        training: shuffled by (seed, epoch), and each process has equally many photos in a batch: a last batch
            that cannot be shared evenly takes some from the epoch's beginning. Otherwise in order, each photo
            once, and a process may have a batch less.
        drop_last: leave out a last batch that is not full, unless it is the only one.
        seed: at least 0.
        rank: of this process.
        world: processes.

    Raises:
        UserError: there are no photos, or a number makes no sense.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        training: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if count < 1 or batch_size < 1 or seed < 0:
            raise UserError(
                f"{count} photos, batch_size={batch_size}, seed={seed}: give at least one photo, a batch of "
                "at least 1 and a seed of at least 0"
            )
        if not 0 <= rank < world:
            raise UserError(f"rank={rank} of world={world}: ranks go from 0 to world - 1")
        self.count, self.batch_size, self.training, self.seed = count, batch_size, training, seed
        self.rank, self.world = rank, world
        whole, rest = divmod(count, batch_size * world)
        self.batches = whole + bool(rest) if not drop_last or not whole else whole
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Which epoch the next iteration gives, and from which of its batches on."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches that the next iteration gives."""
        return sum(1 for k in range(self.start, self.batches) if self._has(k))

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, step = self.epoch, self.batch_size * self.world
        order = np.arange(self.count)
        if self.training:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        for k in range(self.start, self.batches):
            batch = order[k * step : (k + 1) * step]
            if self.training and len(batch) % self.world:
                batch = np.append(batch, np.resize(order, -len(batch) % self.world))
            if self._has(k):
                yield [(epoch, i) for i in batch[self.rank :: self.world].tolist()]

    def _has(self, k: int) -> bool:
        """Whether there is something for this process in batch k."""
        return self.training or k * self.batch_size * self.world + self.rank < self.count


class Batch(NamedTuple):
    """Photos as the network takes them.

    images: float32 [N, 3, H, W] in channels_last, normalized; or what a transform to float made.
    labels: int64 [N].
    indices: int64 [N], the photos' numbers in the dataset.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class _Fetched(NamedTuple):
    """A batch on its way from a worker, and the photos that could not be used, with the reasons."""

    images: Tensor | None
    labels: list[int]
    indices: list[int]
    unusable: list[tuple[int, str]]


class _Batches(Dataset[_Fetched]):
    """Whole batches of a dataset by the lists of a sampler: an error in a worker would end the epoch."""

    def __init__(self, dataset: PhotoDataset, replace: bool) -> None:
        self.dataset, self.replace = dataset, replace

    def __getitem__(self, keys: list[Key]) -> _Fetched:
        # One photo is too small to share: on two threads, without workers, augmenting takes longer.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._fetch(keys)
        finally:
            torch.set_num_threads(threads)

    def _fetch(self, keys: list[Key]) -> _Fetched:
        images, labels, indices, unusable = [], [], [], []
        for epoch, wanted in keys:
            for i in chain([wanted], self.dataset.class_mates(wanted) if self.replace else ()):
                try:
                    image, label = self.dataset[epoch, i]
                except (UserError, OSError) as error:
                    unusable.append((i, str(error)))
                    continue
                images.append(image.permute(1, 2, 0) if image.dtype == torch.uint8 else image)
                labels.append(label)
                indices.append(i)
                break
        return _Fetched(torch.stack(images) if images else None, labels, indices, unusable)


def _in_a_group_of_its_own(worker: int) -> None:
    """Out of reach of a signal to the group of the process that it works for, as of Ctrl-C at a terminal.

    That process stops between two steps and then ends its workers. One that the signal ended in mid-work
    left it waiting for the rest of a batch, or without the steps since the last checkpoint: 6 times in 80.
    """
    os.setpgid(0, 0)


class Loader:
    """Batches of a dataset, epoch by epoch, made by worker processes ahead of their use.

    A photo that cannot be used is left out of its batch. In training the next usable one of its class takes
    its place instead, so that batches keep their size and processes their step.

    Args:
        dataset: what to load.
        sampler: which of it, in batches.
        workers: processes; 0: none, photos are made when asked for. By default `default_workers()`.

    Raises:
        UserError: workers is below 0.
    """

    def __init__(self, dataset: PhotoDataset, sampler: EpochSampler, workers: int | None = None) -> None:
        workers = default_workers() if workers is None else workers
        if workers < 0:
            raise UserError(f"workers={workers}: give 0 or more")
        self.dataset, self.sampler, self.workers = dataset, sampler, workers
        self._loader = DataLoader(
            _Batches(dataset, sampler.training),
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0 and sampler.training,
            collate_fn=_as_it_is,
            worker_init_fn=_in_a_group_of_its_own,
            generator=torch.Generator(),  # it draws a seed: not from the one that dropout draws from
        )

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on.

        Raises:
            UserError: no photo of a class can be used that needs one, or a worker process has ended.
        """
        self.sampler.set_epoch(epoch, start)
        for fetched in self._loader:
            for i, why in fetched.unusable:
                self.dataset.skip(i, why)
            images = fetched.images
            if images is None:
                continue
            if images.dtype == torch.uint8:
                images = data.normalize(images, self.dataset.preprocessing)
            yield Batch(images, torch.tensor(fetched.labels), torch.tensor(fetched.indices))


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Within, a worker process that has ended is the user's to know of. torch tells of it anywhere.

    Raises:
        UserError: one has ended, or there is no room for what it makes.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("DataLoader worker", "shared memory")):
            raise
        raise UserError(
            f"a process that makes batches has ended ({str(error).splitlines()[0]}): use workers=0, or a "
            "smaller batch_size"
        ) from error


def _as_it_is(fetched: Any) -> Any:
    return fetched


def default_workers(processes: int = 1) -> int:
    """Worker processes of a loader: one for every two cores, at least one.

    Large photos without a cache may want more.

    Args:
        processes: that share the cores of this one, each with loaders of its own.
    """
    return max(1, machine.cores() // (_CORES_PER_WORKER * processes))


def make_loaders(
    folder: LabelledFolder,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    transform: Transform | None = None,
    seed: int = 0,
    cache_folder: str | os.PathLike[str] | None = None,
    cache_bytes: int = imagecache.MOST_BYTES,
    workers: int | None = None,
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
) -> tuple[Loader, Loader]:
    """The loaders of a folder's training and validation photos.

    Args:
        folder: from `photos.find`.
        preprocessing: of the network.
        batch_size: of one process.
        transform: of training photos; by default `augmentation(preprocessing)`.
        seed: of order and augmentation.
        cache_folder: where to keep resized photos, at most `cache_bytes` of them; None: nowhere.
        cache_bytes: as there.
        workers: of each loader, as `Loader` takes them.
        drop_last: leave out a last batch of training photos that is not full.
        rank: of this process.
        world: processes that train together.
        progress: called with the number of photos done and of all while the cache is made.

    Raises:
        UserError: as `augmentation`, `imagecache.open_cache`, `PhotoDataset`, `EpochSampler` and `Loader`.
    """
    cache = None
    if cache_folder is not None:
        paths = [photo.path for photo in (*folder.train, *folder.val)]
        cache = imagecache.open_cache(
            cache_folder, folder.root, paths, preprocessing, most_bytes=cache_bytes, progress=progress
        )
    loaders = []
    for training, photos in ((True, folder.train), (False, folder.val)):
        use = (transform or augmentation(preprocessing)) if training else None
        dataset = PhotoDataset(
            photos, folder.classes, preprocessing, use, seed=seed, cache=cache, every_class=training
        )
        sampler = EpochSampler(
            len(dataset),
            batch_size,
            training=training,
            drop_last=drop_last and training,
            seed=seed,
            rank=rank,
            world=world,
        )
        loaders.append(Loader(dataset, sampler, workers))
    return loaders[0], loaders[1]
