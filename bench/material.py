"""What all contenders share, in one folder: the weights, the photos, the exact answers and the ONNX file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import ROOT

if TYPE_CHECKING:
    import numpy as np
    import torch

WEIGHTS, PHOTOS, LABELS, EXACT, ONNX = (
    "weights.safetensors",
    "photos.npy",
    "labels.npy",
    "exact.npy",
    "mobilenet_v2.onnx",
)
INPUT, BATCH = "input", "batch"
NOISE = 32  # images where there are no photos
WNIDS = "imagenet_wnids.txt"
WHERE = "by default data/imagenet_sample in MNV2_SHARED or ../shared"


def path(folder: str, name: str) -> Path:
    """A file of the shared folder."""
    return Path(folder) / name


def photos(folder: str, count: int | None = None) -> np.ndarray:
    """The first `count` images, normalized, float32 [N, 3, 224, 224] contiguous; again from the first on
    where there are fewer."""
    import numpy as np

    there = np.load(path(folder, PHOTOS), mmap_mode="r")
    return np.array(there if count is None else there[np.arange(count) % len(there)])


def calibration(folder: str, half: int) -> np.ndarray:
    """Every second photo from the `half`-th: what an int8 network is calibrated on; the others judge it."""
    return photos(folder)[half::2].copy()


def shared_data(name: str) -> Path:
    """A folder of `data` in MNV2_SHARED or ../shared."""
    return Path(os.environ.get("MNV2_SHARED") or ROOT.parent / "shared") / "data" / name


def default_photos() -> Path:
    """The folder of photos where none is named, as WHERE says."""
    return shared_data("imagenet_sample")


def source() -> str:
    """Which weights everyone runs: real ones where they are found without a download, else seeded ones."""
    from mnv2_fast import weights

    for row in weights.WEIGHTS:
        if weights.find_local(row) is not None:
            return row.name
    return "seeded"


def make(folder: str, pictures: Path, count: int | None) -> None:
    """Write the weights and the photos, with their classes where the photos' names tell them.

    Args:
        folder: where to.
        pictures: folder of photos named `WNID_name.JPEG`, the WordNet ids in order in `imagenet_wnids.txt`
            beside it; without it noise takes their place.
        count: so many photos at most.
    """
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from mnv2_fast import MobileNetV2, data, weights

    name = source()
    torch.manual_seed(0)
    state = MobileNetV2().state_dict() if name == "seeded" else weights.load_state_dict(name)[0]
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path(folder, WEIGHTS))
    paths = sorted(pictures.glob("*.JPEG"))[:count]
    if not paths:
        np.save(path(folder, PHOTOS), torch.randn(NOISE, 3, 224, 224).numpy())
        return
    preprocessing = weights.Preprocessing()
    crops = [torch.tensor(data.resize_and_crop(data.read_image(file), preprocessing)) for file in paths]
    np.save(path(folder, PHOTOS), data.normalize(torch.stack(crops), preprocessing).contiguous().numpy())
    if (wnids := pictures.parent / WNIDS).exists():
        classes = [line.split()[0] for line in wnids.read_text(encoding="utf-8").splitlines() if line.strip()]
        np.save(path(folder, LABELS), np.array([classes.index(file.name.split("_")[0]) for file in paths]))


def answer_exactly(folder: str) -> None:
    """Write the logits of torchvision's network in float64, [N, 1000], which everyone is judged by."""
    import numpy as np
    import torch

    model = torchvision_model(path(folder, WEIGHTS)).double()
    with torch.no_grad():
        logits = [model(x.double()) for x in torch.from_numpy(photos(folder)).split(10)]
    np.save(path(folder, EXACT), torch.cat(logits).numpy())


def torchvision_model(file: Path) -> torch.nn.Module:
    """torchvision's MobileNetV2 in eval mode."""
    from safetensors.torch import load_file

    from mnv2_fast._torchvision import torchvision

    model: torch.nn.Module = torchvision().models.mobilenet_v2()
    model.load_state_dict(load_file(file))
    return model.eval()


def our_model(folder: str) -> Any:
    """Our MobileNetV2 in eval mode."""
    from mnv2_fast import mobilenet_v2

    return mobilenet_v2(weights=path(folder, WEIGHTS)).eval()


def export_onnx(folder: str) -> None:
    """Write the network as ONNX with a dynamic batch, for those that read it."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own use of torch
        torch.onnx.export(
            torchvision_model(path(folder, WEIGHTS)),
            (torch.from_numpy(photos(folder, 2)),),
            path(folder, ONNX),
            dynamo=True,
            external_data=False,
            input_names=[INPUT],
            dynamic_shapes={"x": {0: torch.export.Dim(BATCH)}},
            verbose=False,
        )
