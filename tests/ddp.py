"""What each of two processes of `test_ddp` does: by torchrun, with a folder where it leaves `found.pt`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import calibrate
from torch import Tensor, distributed, nn

from mnv2_fast import MobileNetV2, UserError, fit, loading, optim, photos, trainer
from mnv2_fast._torchvision import torchvision
from mnv2_fast.distributed import Group, SaidElsewhereError, joined
from mnv2_fast.errors import Interrupted
from mnv2_fast.trainer import Sums, Trainer
from mnv2_fast.weights import Preprocessing, load_state_dict

SEEN = Preprocessing(resize=72, crop=64)
OPTIONS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 4,
    "preprocessing": SEEN,
    "workers": 0,
    "progress": False,
    "amp": "none",
    "augment": ("crop", "flip"),
    "crop_scale": 0.35,
    "train_size": SEEN.crop,
}
PLAIN = {"optimizer": "sgd", "lr": 0.01, "warmup_epochs": 0, "weight_decay": 0.0, "head_lr_factor": 1}
FROZEN = {"freeze_bn": True, "dropout": 0.0}


def small_network(backend: str = "auto") -> MobileNetV2:
    """The same one in every process, with batch norms that carry the signal through."""
    torch.manual_seed(0)
    model = calibrate(MobileNetV2(3, width_mult=0.25, backend=backend))
    nn.init.normal_(model.classifier[1].weight, 0, 0.1)
    return model


def record(trace: list[tuple[Sums, list[Tensor]]]) -> None:
    """From now on every step adds its sums and gradients."""
    step = Trainer._step

    def recorded(self: Trainer, found: Sums) -> bool:
        trace.append((found, [p.grad.clone() for p in self.trainable if p.grad is not None]))
        return step(self, found)

    trainer.Trainer._step = recorded  # type: ignore[method-assign]


def over_torchvision(folder: photos.LabelledFolder, group: Group) -> list[float]:
    """The mean loss of each step of DistributedDataParallel over torchvision's model, by hand."""
    model = torchvision().models.MobileNetV2(num_classes=3, width_mult=0.25, dropout=0.0)
    model.load_state_dict(small_network().state_dict())
    network = nn.parallel.DistributedDataParallel(model.train())
    loader, _ = loading.make_loaders(
        folder,
        SEEN,
        4,
        transform=loading.augmentation(SEEN, scale=(0.35, 1.0)),
        workers=0,
        drop_last=True,
        rank=group.rank,
        world=group.world,
    )
    step = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(step, 2 * loader.sampler.batches)
    losses = []
    for epoch in range(2):
        for images, labels, _ in loader.epoch(epoch):
            loss = nn.functional.cross_entropy(network(images), labels, label_smoothing=0.1)
            step.zero_grad()
            loss.backward()
            step.step()
            schedule.step()
            losses.append(sum(group.gather(loss.item())) / group.world)
    return losses


def pretrained_curves(group: Group, root: Path) -> dict[str, list[float]]:
    """The mean loss of each of six steps with batch statistics, two shards of eight photos a step, of a
    pretrained network under DistributedDataParallel: on our kernels, and torchvision's. A trained one's
    losses hardly feel rounding, where the small one of random weights is chaotic.
    """
    images, labels = torch.load(root / "real.pt", weights_only=True)
    mine = slice(group.rank, None, group.world)
    losses: dict[str, list[float]] = {}
    for name, make in (("ours", MobileNetV2), ("torchvision", torchvision().models.MobileNetV2)):
        torch.manual_seed(0)
        model = make(num_classes=1000, dropout=0.0)
        model.load_state_dict(load_state_dict(root / "weights.safetensors")[0])
        model.classifier[1] = nn.Linear(model.last_channel, 5)
        network = nn.parallel.DistributedDataParallel(model.train())
        step = torch.optim.SGD(model.parameters(), 0.002, 0.9, nesterov=True)
        losses[name] = []
        for _ in range(6):
            logits = network(images[mine])
            assert name != "ours" or model.why_not(images[mine]) is None
            loss = nn.functional.cross_entropy(logits, labels[mine])
            step.zero_grad()
            loss.backward()
            step.step()
            losses[name].append(sum(group.gather(loss.item())) / group.world)
    return losses


def over_ours(group: Group) -> tuple[str, list[Tensor]]:
    """DistributedDataParallel over our model, batch norms frozen: what made its first block's output, and the
    gradients of a step."""
    model = frozen_network()
    network = nn.parallel.DistributedDataParallel(model)
    images, labels = batch()
    mine = slice(group.rank, None, group.world)
    nn.functional.cross_entropy(network(images[mine]), labels[mine]).backward()
    block = model.features[1](model.features[0](images[mine]))
    assert block.grad_fn is not None
    return block.grad_fn.name(), [p.grad for p in model.parameters() if p.grad is not None]


def frozen_network() -> MobileNetV2:
    """A network in train mode but for its batch norms and without dropout."""
    model = small_network()
    optim.set_mode(model, freeze_bn=True, head_only=False)
    model.classifier[0].p = 0.0
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Eight images with labels, the same ones in every process."""
    torch.manual_seed(1)
    return torch.randn(8, 3, SEEN.crop, SEEN.crop), torch.arange(8) % 3


def refusal(group: Group, **options: Any) -> tuple[str, str]:
    """Who is told of a mistake, and how."""
    try:
        fit(**{**OPTIONS, **options})
    except (UserError, KeyError) as error:
        return type(error).__name__, str(error)
    raise AssertionError("not refused")


class Fails(nn.Module):
    """What the second process alone fails in, in its third step."""

    def __init__(self, group: Group, error: Exception) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(3))
        self.layers(torch.zeros(2, 3, 64, 64))
        self.error, self.fails, self.steps = error, group.rank == 1, 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or the error."""
        self.steps += self.training
        y: Tensor = self.layers(x)
        if self.fails and self.steps == 3:
            raise self.error
        return y


def alone(group: Group, folder: photos.LabelledFolder) -> dict[str, Callable[[], dict[str, Any]]]:
    """Mistakes of one process of two, by where they are made."""

    def failing(error: Exception) -> dict[str, Any]:
        torch.manual_seed(0)
        return {"data": folder, "model": Fails(group, error)}

    def after_an_epoch(row: Any) -> None:
        if group.rank == 1:
            raise UserError("the second one's wish")

    no_weights = {"data": folder, "weights": "none here.pth" if group.rank == 1 else None}
    return {
        "weights": lambda: no_weights,
        "no memory": lambda: failing(MemoryError()),
        "a bug": lambda: failing(KeyError("a bug")),
        "an epoch's end": lambda: {"data": folder, "model": small_network(), "on_epoch_end": after_an_epoch},
    }


def half_a_step(group: Group, folder: photos.LabelledFolder, out: Path) -> dict[str, Any]:
    """A signal ends a loader's worker of the second process while the first one is in its step."""
    fetch, calls = loading._Batches.__getitem__, [0]

    def ended(self: Any, keys: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3 and group.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated")
        return fetch(self, keys)

    model = small_network("eager")
    loading._Batches.__getitem__ = ended  # type: ignore[method-assign]
    try:
        fit(folder, model=model, out=out, **{**OPTIONS, **PLAIN, "dropout": 0.0})
    except Interrupted as interrupted:
        said = group.gather(str(interrupted))
    loading._Batches.__getitem__ = fetch  # type: ignore[method-assign]
    left = {key: value.clone() for key, value in model.state_dict().items()}
    saved = torch.load(out / "last.pt", weights_only=True)
    again = {"resume": True, "preprocessing": SEEN, "progress": False}
    fit(folder, model=small_network("eager"), out=out, **again)
    return {"said": said, "left": left, "saved": saved}


def main(root: Path) -> None:
    """All of it, in one go: starting processes takes most of the time."""
    torch.set_num_threads(1)
    folder = photos.find(root / "photos")
    found: dict[str, Any] = {}
    with joined() as group:
        trace: list[tuple[Sums, list[Tensor]]] = []
        record(trace)
        fit(folder, model=small_network(), **{**OPTIONS, **PLAIN, **FROZEN, "accumulate": 2})
        found["gradients"] = trace[0][1]
        trace.clear()
        options = {**OPTIONS, **PLAIN, "dropout": 0.0}
        # On torch's kernels: batch norm of 16 values makes rounding 3% of a loss within a step.
        whole = fit(folder, model=small_network("eager"), out=root / "whole", **options)
        found["losses"] = [sum(group.gather(sums.loss / sums.photos)) / group.world for sums, _ in trace]
        found["torchvision"] = over_torchvision(folder, group)
        found["ours"] = over_ours(group)
        found["pretrained"] = pretrained_curves(group, root)
        found["history"] = whole.history
        found["equal"] = all(
            torch.equal(value, other)
            for states in [group.gather(whole.model.state_dict())]
            for value, other in zip(states[0].values(), states[1].values(), strict=True)
        )

        step = Trainer._step

        def stop(self: Trainer, sums: Sums) -> bool:
            if self.progress.step == 3 and group.rank == 1:  # one process is told, all stop
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, sums)

        trainer.Trainer._step = stop  # type: ignore[method-assign]
        try:
            fit(folder, model=small_network("eager"), out=root / "resumed", **options)
        except Interrupted as interrupted:
            found["interrupted"] = group.gather((str(interrupted), interrupted.exit_code))
        trainer.Trainer._step = step  # type: ignore[method-assign]
        fit(
            folder,
            model=small_network("eager"),
            out=root / "resumed",
            resume=True,
            preprocessing=SEEN,
            progress=False,
        )

        again = {"data": folder, "model": small_network()}
        found["refused"] = group.gather(refusal(group, **again, out=root / "whole"))
        found["large"] = group.gather(refusal(group, **again, batch_size=99))
        found["nan"] = group.gather(refusal(group, **again, lr=1e30, optimizer="sgd", warmup_epochs=0))
        assert found["refused"][1][0] == SaidElsewhereError.__name__
        found["alone"] = {
            where: group.gather(refusal(group, **options(), out=root / "alone", overwrite=True))
            for where, options in alone(group, folder).items()
        }
        found["half a step"] = half_a_step(group, folder, root / "half")
        if group.first:
            torch.save(found, root / "found.pt")
    assert not distributed.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
