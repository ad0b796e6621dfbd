"""The folder of a training. A full disk or a lost machine leaves the files that were there.

args.yaml           the data, the weights and every option
results.csv         one row an epoch
best.safetensors    the weights of the best epoch, with labels and preprocessing
final.safetensors   those of the last one
curves.png          loss and top-1 by epoch; with the next two once the training is done
confusion.png       of the last epoch's weights, on the validation photos
mistakes.png        the worst of them
last.pt             all that training needs to go on, to the bit
tensorboard/        where it is asked for
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .weights import Preprocessing

ARGS, RESULTS, BEST, FINAL, LAST = (
    "args.yaml",
    "results.csv",
    "best.safetensors",
    "final.safetensors",
    "last.pt",
)
_OF_ARGS = {"data", "model", "weights", "preprocessing"}  # among what `args.yaml` has
_STATE = {"identity", "preprocessing", "progress", "skipped"}  # among what `last.pt` has
TENSORBOARD = "tensorboard"
PLOTS = ("curves.png", "confusion.png", "mistakes.png")

Row = dict[str, Any]


def top1_of(row: Row) -> float:
    """The top-1 that counts: of the averaged weights, where there are such."""
    top1: float = row["ema_val_top1" if "ema_val_top1" in row else "val_top1"]
    return top1


class Run:
    """A run folder, which need not be there yet."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not os.fspath(folder):
            raise UserError("the run's folder is empty: give the name of a folder to write")
        self.folder = Path(folder).expanduser()

    def check_free(self, overwrite: bool) -> None:
        """See that a new run may be written here.

        Raises:
            UserError: a run is here that is not to be overwritten, or no folder can be made here.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file: give another folder")
        written = (LAST, BEST, FINAL, RESULTS, ARGS, *PLOTS, TENSORBOARD)
        there = [name for name in written if (self.folder / name).exists()]
        if there and not overwrite:
            raise UserError(
                f"{self.folder} has a run ({there[0]}): go on with it by --resume, replace it by "
                "--overwrite, or give another folder"
            )

    def begin(self, args: Mapping[str, Any]) -> None:
        """Make the folder, take away what is left of another run, and write the arguments of this one.

        Raises:
            UserError: it cannot be written, or PyYAML is not installed.
        """
        content = _yaml().safe_dump(dict(args), sort_keys=False, allow_unicode=True).encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder {self.folder} ({error.strerror}): give another"
            ) from error
        # Arguments never stand beside a state of other ones, wherever this is cut off.
        with self._replacing(ARGS, content):
            for name in (LAST, RESULTS, BEST, FINAL, *PLOTS):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / TENSORBOARD, ignore_errors=True)

    def args(self) -> dict[str, Any]:
        """The arguments that the run began with.

        Raises:
            UserError: there is no such run.
        """
        yaml = _yaml()
        file = self.folder / ARGS
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict) or not found.keys() >= _OF_ARGS:
            raise UserError(
                f"{self.folder} has no run to resume ({ARGS} is not there, or another program's): leave "
                "--resume out"
            )
        return found

    def command_knows(self) -> bool:
        """Whether `mnv2 finetune` can go on with it: it has no way to name a module or a preprocessing."""
        then = self.args()
        return then["model"] == "MobileNetV2" and then["preprocessing"] is None

    def save_results(self, history: Sequence[Row]) -> None:
        """Write `results.csv` anew.

        Raises:
            UserError: it cannot be written.
        """
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(history[0]), lineterminator="\n")
        table.writeheader()
        for row in history:
            table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self._write(RESULTS, text.getvalue().encode())

    def save_weights(
        self, name: str, model: nn.Module, classes: Sequence[str], preprocessing: Preprocessing
    ) -> None:
        """Write a model's state dict with class names and preprocessing, as `Predictor` reads it.

        Raises:
            UserError: it cannot be written.
        """
        from safetensors.torch import save

        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        metadata = {"labels": json.dumps(list(classes)), "preprocessing": json.dumps(preprocessing.to_dict())}
        self._write(name, save(tensors, metadata))

    def log(self, row: Row) -> None:
        """Write a row's numbers for TensorBoard, at its step.

        Raises:
            UserError: TensorBoard is not installed, or it cannot be written.
        """
        step, target = row["step"], self.folder / TENSORBOARD
        try:
            with summary_writer()(target, purge_step=step) as writer:
                for name, value in row.items():
                    writer.add_scalar(name, value, step)
        except OSError as error:
            raise self._unsaved(target, error) from error

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write `last.pt`.

        Raises:
            UserError: it cannot be written; the one before is left.
        """
        content = io.BytesIO()
        torch.save(dict(state), content)
        self._write(LAST, content.getbuffer())

    def state(self) -> dict[str, Any]:
        """What `save_state` wrote.

        Raises:
            UserError: nothing has been saved, or what is there is damaged.
        """
        file = self.folder / LAST
        if not file.exists():
            raise UserError(
                f"{self.folder} has no {LAST}, for its run was ended before the first one: begin again with "
                "--overwrite in place of --resume"
            )
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            if not state.keys() >= _STATE:
                raise ValueError("no training of this version is in it")
        except Exception as error:  # a damaged archive fails in many ways, each with its own exception
            raise UserError(
                f"{file} is damaged or not of a run ({str(error).strip().splitlines()[0]}): begin again with "
                "--overwrite in place of --resume"
            ) from error
        return state

    def _write(self, name: str, content: bytes | memoryview) -> None:
        with self._replacing(name, content):
            pass

    @contextlib.contextmanager
    def _replacing(self, name: str, content: bytes | memoryview) -> Iterator[None]:
        """Write beside a file, and take its place after what is within."""
        target, beside = self.folder / name, self.folder / f".{name}.part"
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield
            os.replace(beside, target)
        except OSError as error:
            raise self._unsaved(target, error) from error
        finally:
            beside.unlink(missing_ok=True)

    def _unsaved(self, target: Path, error: OSError) -> UserError:
        """What to raise where something cannot be written."""
        before = "the one before is untouched, " if target.is_file() else ""
        then = "go on with --resume" if (self.folder / LAST).exists() else "start it again"
        return UserError(
            f"cannot save {target} ({error.strerror}): {before}make room or check permissions, then {then}"
        )


def check_storable(model: nn.Module) -> None:
    """See that a safetensors file can hold the model's tensors.

    Raises:
        UserError: two of them are one.
    """
    names: dict[int, str] = {}
    for name, value in model.state_dict().items():
        other = names.setdefault(value.data_ptr(), name) if value.numel() else name
        if other != name:
            raise UserError(
                f"{other} and {name} of the model are one tensor, which a safetensors file does not hold: "
                "give each its own, as by torch.nn.Parameter(tensor.clone()), or train without a run folder"
            )


def summary_writer() -> Any:
    """TensorBoard's writer.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: pip install tensorboard") from None
    return SummaryWriter


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise UserError("PyYAML is not installed: pip install pyyaml") from None
    return yaml
