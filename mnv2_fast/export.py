"""Models in other formats."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from .errors import UserError
from .weights import Preprocessing, output_file

FORMATS = ("onnx",)

# Relative to the largest logit. Another runtime sums in another order; a wrong graph is off by far more.
_AGREEMENT = 1e-3


def export_onnx(model: nn.Module, path: str | os.PathLike[str], size: int | None = None) -> float | None:
    """Write a model as ONNX: `images` [batch, 3, size, size] -> `logits` [batch, classes], any batch.

    The graph is the plain torch one, in eval mode, so that every runtime loads it; the model itself is
    untouched. The file appears whole or not at all, and only after onnxruntime, where it is installed, has
    given the same logits.

    Args:
        model: from images to logits.
        path: of the file.
        size: height and width; by default those of the model's preprocessing.

    Returns:
        The largest difference of onnxruntime's logits on a random batch, or None where it is not installed.

    Raises:
        UserError: onnx or onnxscript is missing, path is no file in a folder that exists, or onnxruntime
            disagrees.
        OSError: the file cannot be written.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export to ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    target = output_file(path)
    if size is None:
        size = (getattr(model, "preprocessing", None) or Preprocessing()).crop
    training = model.training
    parameter = next(model.parameters())
    # A batch of 2: torch.export takes a dimension of 1 for a constant.
    x = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0)).to(parameter)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder,
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        beside = Path(folder) / "model.onnx"
        try:
            model.eval()
            expected = model(x).float().cpu()
            warnings.simplefilter("ignore", FutureWarning)  # of torch to itself
            torch.onnx.export(
                model,
                (x,),
                beside,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        finally:
            model.train(training)
        difference = _check(beside, x, expected)
        os.replace(beside, target)
    return difference


def _check(path: Path, x: torch.Tensor, expected: torch.Tensor) -> float | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (x, x[:1], torch.cat([x, x[:1]])):
        (logits,) = session.run(None, {"images": batch.cpu().numpy()})
        wanted = expected[[i % len(x) for i in range(len(batch))]]
        worst = max(worst, float((torch.from_numpy(logits).float() - wanted).abs().max()))
    if not worst <= _AGREEMENT * max(1.0, float(expected.abs().max())):
        raise UserError(
            f"onnxruntime's logits differ by {worst:.3g}, no file is written: try another onnxruntime"
        )
    return worst
