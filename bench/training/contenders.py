"""CONTENDERS and SETTINGS: who trains the network, and what of it is trained how.

Everyone has the same loop, seed and images, see `loops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DTYPES = ("fp32", "bf16")
CLASSES = 5
BATCH, SIZE, THREADS = 32, 224, 2

# Larger than any block that a step asks for: none comes fresh from the system, none goes back to it. With 32
# MB, the most that some C libraries' manuals allow, a step still has 10,000 page faults.
_KEEP = str(64 << 30)
TUNED = {"MALLOC_TOP_PAD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": _KEEP, "MALLOC_TRIM_THRESHOLD_": _KEEP}


@dataclass(frozen=True)
class Contender:
    """One way to train MobileNetV2.

    Attributes:
        name: of the way.
        channels_last: whether the model and the images are in it; else they are NCHW, as loaders give them.
        compiled: by torch.compile.
        env: environment of its processes.
    """

    name: str
    channels_last: bool = False
    compiled: bool = False
    env: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return self.name == OURS

    @property
    def models(self) -> Any:
        """The module that has `mobilenet_v2`."""
        if self.ours:
            import mnv2_fast

            return mnv2_fast
        from mnv2_fast._torchvision import torchvision

        return torchvision().models


OURS = "mnv2_fast"
PLAIN = "torch NCHW"
CHANNELS_LAST = "torch channels_last"
BEST = "torch channels_last, tuned"  # torch's, where no run has said which is
COMPILED = "torch.compile, tuned"

CONTENDERS = (
    Contender(OURS),
    Contender(PLAIN),
    Contender(CHANNELS_LAST, channels_last=True),
    Contender(BEST, channels_last=True, env=TUNED),
    Contender(COMPILED, channels_last=True, compiled=True, env=TUNED),
)


def find(name: str) -> Contender:
    """The contender of that name."""
    return next(contender for contender in CONTENDERS if contender.name == name)


def freeze_norms(model: Any) -> None:
    """Norms in eval mode within a training model; their scales and shifts are trained."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def freeze_features(model: Any) -> None:
    """Only the classifier is trained; norms still take the batch's statistics."""
    model.features.requires_grad_(False)


def freeze_features_in_eval(model: Any) -> None:
    """Only the classifier is trained; the features are those of an eval model."""
    freeze_features(model)
    model.features.eval()


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        name: of the rows, and on the command line.
        title: for readers.
        batch: images a step; None: as many as are asked for.
        freeze: what of the model does not learn.
        classic: the script that everybody has, in fp32, without a setting of torch or the allocator.
        contenders: who trains it; empty: ours and torch's best of STEP.
    """

    name: str
    title: str
    batch: int | None = None
    freeze: Callable[[Any], None] | None = None
    classic: bool = False
    contenders: tuple[str, ...] = ()

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Precisions that it is trained in."""
        return DTYPES[:1] if self.classic else DTYPES


STEP, CLASSIC = "step", "classic"
SETTINGS = (
    Setting(STEP, "a training step", contenders=tuple(row.name for row in CONTENDERS)),
    Setting(CLASSIC, "the classic script", classic=True, contenders=(OURS, PLAIN)),
    Setting("frozen-norms", "norms frozen", freeze=freeze_norms),
    Setting("head", "head only, features in eval mode", freeze=freeze_features_in_eval),
    Setting("head-train", "head only, features in train mode", freeze=freeze_features),
    Setting("batch-8", "batch 8", batch=8),
    Setting("batch-128", "batch 128", batch=128),
)


def setting_of(name: str) -> Setting:
    """The setting of that name."""
    return next(setting for setting in SETTINGS if setting.name == name)
