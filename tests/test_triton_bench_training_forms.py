"""What `bench.gpu` checks and times of a training step's kernels: by the interpreter, and as launches."""

from __future__ import annotations

import collections
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton_interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))  # the interpreter's child is run as a script

from bench import gpu_checks, gpu_forms, gpu_race, gpu_times, gpu_training_forms
from bench.gpu_forms import DTYPES, Form, StepProbe
from bench.gpu_training_forms import training_forms
from kernels import aot, train_depthwise
from kernels.common import arithmetic, tiles
from mnv2_fast import MobileNetV2, arch, training
from mnv2_fast.backends import chains, triton_train

UNITS = 132  # of an H200, which share the pixels


def tiny_layers() -> list[arch.Layer]:
    """Every kind of layer in every form that the network has, small enough for the interpreter."""
    specs = [arch.LayerSpec("stem", "", "", 3, 8, 2, True), *arch.inverted_residual("", 8, 8, 2, 1)]
    specs += [*arch.inverted_residual("", 8, 12, 1, 2), *arch.inverted_residual("", 12, 12, 1, 2)]
    specs += [arch.LayerSpec("pointwise", "", "", 12, 40, 1, True), arch.LayerSpec("linear", "", "", 40, 5)]
    return arch.layers(size=11, specs=specs)


def tiny_forms() -> list[Form]:
    """Of these; 1x1 layers have a kernel for each gradient, too, as the network's widest do."""
    with mock.patch.object(gpu_training_forms, "goes_apart", return_value=True):
        return training_forms(tiny_layers())


def short_tiles(device_name: str, kernel: str) -> dict[str, dict[str, int]]:
    """The tile table with few rows and columns of depthwise kernels, whose loops the interpreter unrolls."""
    return {
        name: {**row, "rows": 2, "cols": 1} if "lanes" in row else row
        for name, row in tiles(device_name, kernel).items()
    }


def small_checks() -> list[gpu_checks.Check]:
    """Each tiny form in fp16, every third of a name in the other kinds."""
    of_forms = tiny_forms()
    found = [check for form in of_forms for check in gpu_checks.form_checks(form, "fp16")]
    return [*found, *gpu_checks.other_kinds(of_forms)]


def touched(form: Form) -> str:
    """Whether the judge would see any one number of any answer that is a little off."""
    probe = form.make(2, "fp16")
    assert isinstance(probe, StepProbe)
    found = probe.run()
    for i, (name, out, want, allowed) in enumerate(probe.judge(found)):
        most = 0.02 * float(want.abs().max())
        if not allowed.max() <= most:
            return f"{name}: {allowed.max():.3g} allowed of values up to {want.abs().max():.3g}"
        at = int(out.numel() // 2)
        spoiled = want.flatten().clone()
        spoiled[at] += 3 * allowed.flatten()[at]
        if not gpu_checks.judged(spoiled.view(want.shape), want, allowed).startswith("1 of"):
            return f"{name}, answer {i}: an error of three times what is allowed is unseen"
    return ""


def torchs(form: Form) -> str:
    """What torch makes that is none of what the kernel is judged by, whatever the order of its numbers."""
    probe = form.make(2, "fp32")
    assert isinstance(probe, StepProbe)
    wants = [want for _, _, want, _ in probe.judge(probe.run())]
    wants += [row for want in wants if want.dim() == 2 for row in want]
    made = probe.eager()
    for i, got in enumerate(made if isinstance(made, tuple) else (made,)):
        alike = [want for want in wants if got is not None and want.numel() == got.numel()]
        pairs = [(want.flatten().sort()[0], got.double().flatten().sort()[0]) for want in alike]
        if got is not None and not any(torch.allclose(*pair, 1e-3, 1e-3) for pair in pairs):
            return f"result {i} is another"
    return ""


def _child() -> None:
    triton_interpreter.mend()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gpu_forms.DEVICE = "cpu"
    for module in (gpu_forms, train_depthwise):
        module.tiles = short_tiles  # type: ignore[assignment]
    found = {check.name: check.run() for check in small_checks()}
    for form in tiny_forms():
        found |= {f"touched {form}": touched(form), f"torch's {form}": torchs(form)}
    print(json.dumps(found))


def test_every_form_is_right_when_interpreted(
    verdicts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_forms, "DEVICE", "cpu")
    names = [check.name for check in small_checks()]
    assert {name: verdicts[name] for name in names} == dict.fromkeys(names, "")
    assert {name.split(", ")[-2] for name in names} == set(DTYPES)
    made = {form.name for form in tiny_forms()}
    assert made == {form.name for form in training_forms()}
    assert len(made) == 12
    for reads in ("s1 at", "linear at", "activated at", "activated, residual at"):
        assert any(f"{reads} " in name for name in names), reads


def test_every_judge_sees_a_small_error(verdicts: dict[str, str]) -> None:
    said = {name: why for name, why in verdicts.items() if name.startswith("touched")}
    assert len(said) == len(tiny_forms())
    assert said == dict.fromkeys(said, "")


def test_torch_makes_the_same(verdicts: dict[str, str]) -> None:
    """What a form is timed beside."""
    said = {name: why for name, why in verdicts.items() if name.startswith("torch's")}
    assert len(said) == len(tiny_forms())
    assert said == dict.fromkeys(said, "")


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, those that training imports, too, are launched on nothing, for an H200's units."""
    for name in ("norm", "train_depthwise", "train_pointwise", "train_pointwise_gradient", "train_stem"):
        importlib.import_module(f"mnv2_fast.kernels.{name}")
    monkeypatch.setattr(gpu_forms, "DEVICE", "meta")
    for name, module in list(sys.modules.items()):
        if "kernels." in name or name.startswith("bench."):
            monkeypatch.setattr(module, "device_of", lambda device: ("", UNITS), raising=False)


def _launched(form: Form, kind: str, tile: dict[str, int] | None = None) -> list[aot.Launch]:
    probe = form.make(256, kind, tile)
    with aot.launches() as made:
        probe.run()
    return made


def _facts(launch: aot.Launch) -> tuple[Any, ...]:
    """A launch without what the forms have otherwise: the share by which running statistics move, how many
    parts a norm adds; TF32 means nothing in fp16.
    """
    name, arguments = launch.kernel.fn.__name__, dict(launch.arguments)
    otherwise = {"TF32", "share"}
    if name in ("normalize_kernel", "norm_gradient_kernel"):
        otherwise |= {"parts", "number", "pixels", "mean", "var"}
    facts = [
        (key, (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value)
        for key, value in sorted(arguments.items())
        if key not in otherwise
    ]
    module = launch.kernel.fn.__module__.rpartition(".")[2]
    return module, name, launch.grid, launch.warps, launch.stages, tuple(facts)


def test_the_forms_are_what_a_step_launches(on_meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, as often, with the same shapes and constants: norms, masks and residuals among them."""
    monkeypatch.setitem(chains.KERNELS, "meta", chains.KERNELS["cuda"])
    monkeypatch.setattr(training, "_kernels", lambda x: triton_train)
    monkeypatch.setattr(training, "_dtype", lambda device: torch.float16)
    with torch.device("meta"):
        model = MobileNetV2().train()
        chain = training.read_chain(model, model._read_features(any_mode=True))
        with aot.launches() as made:
            y = training.run_joined(torch.empty(256, 3, 224, 224), chain)
            y.backward(torch.empty_like(y))
    ours: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for form in training_forms():
        if not form.name.endswith(("input gradient", "weight gradient")):  # which "gradients" has, too
            for launch in _launched(form, "fp16"):
                ours[_facts(launch)] += form.count
    assert ours == collections.Counter(map(_facts, made))
    assert ours.total() == 304


@pytest.mark.parametrize("kind", DTYPES)
def test_a_tile_reaches_the_launch(kind: str, on_meta: None) -> None:
    """Each form names the row that its launcher reads for that layer and arithmetic."""
    seen = collections.Counter()
    for form in training_forms():
        if not form.table or kind not in form.kinds():
            continue
        (row,) = (row.format(arithmetic(*DTYPES[kind])) for row in form.rows)
        tile = {**tiles("", form.table)[row], "warps": 32}
        if "most" in tile:
            tile["most"] = 2**20  # or there are two kernels, with tiles of their own
        made = _launched(form, kind, tile)
        assert 32 in {launch.warps for launch in made}, (str(form), row)
        assert 32 not in {launch.warps for launch in _launched(form, kind)}
        seen[form.table, row] += 1
    if kind == "fp16":
        rows = {(name, row) for name, row in seen if name.startswith(("train", "norm"))}
        named = ("train_stem", "train_depthwise", "train_pointwise", "train_pointwise_both", "norm")
        wanted = {(name, row) for name in named for row in tiles("", name) if "x" not in row}
        assert rows == {(name, row) for name, row in wanted if not row.endswith(("tf32", "ieee"))}


def test_every_branch_of_a_kernel_is_raced(on_meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what compiles another kernel: norms, masks, residuals, what is made again."""
    monkeypatch.setattr(gpu_race, "usable", lambda form: not form.whole_block)

    def branches(of: list[Form]) -> set[tuple[Any, ...]]:
        found = set()
        for form in of:
            for launch in _launched(form, "fp16") if "fp16" in form.kinds() else ():
                kernel = launch.kernel.fn
                flags = {key: value for key, value in launch.arguments.items() if isinstance(value, bool)}
                if not flags.get("FOR_X", True):
                    del flags["RESIDUAL"]  # which is added to the gradient of x
                found.add((kernel.__module__, kernel.__name__, *sorted(flags.items())))
        return found

    everything = branches(training_forms())
    assert len(everything) > 20
    assert everything <= branches(gpu_race.off_by_default())


def test_no_tile_is_left_behind(on_meta: None) -> None:
    form = next(form for form in training_forms() if form.name == "train stem")
    before = gpu_training_forms.train_stem.tiles
    tile = {"m": 32, "warps": 32}
    with pytest.raises(TypeError), gpu_training_forms.given(gpu_training_forms.train_stem, "", "", tile):
        raise TypeError
    _launched(form, "fp16", tile)
    assert gpu_training_forms.train_stem.tiles is before


def test_kernels_go_apart_where_the_default_has_it(on_meta: None) -> None:
    """The forms of one gradient are of the layers and kinds for which a step launches two kernels."""
    apart = {str(form): form for form in training_forms() if form.name == "train pointwise input gradient"}
    for form in training_forms():
        if form.name == "train pointwise gradients":
            of_input = apart.get(str(form).replace("gradients", "input gradient"))
            for kind in DTYPES:
                two = "input_gradient_kernel" in {one.kernel.__name__ for one in _launched(form, kind)}
                assert two == (of_input is not None and kind in of_input.kinds()), (str(form), kind)


def test_what_must_move_is_counted(on_meta: None) -> None:
    """Each tensor once: an expansion's raw output, which is made again, is none of them."""
    moved = {f"{form.name} {form.layer}": form.make(256, "fp16").bytes for form in training_forms()}
    pixels, weights = 56 * 56 * 256, 24 * 144
    both = 2 * (pixels * (144 + 3 * 24) + weights) + 4 * weights
    assert moved["train pointwise gradients 24 to 144 s1, activated, residual"] == both
    assert moved["train pointwise 24 to 144 s1, activated"] == 2 * (pixels * (24 + 144) + weights)
    assert moved["train depthwise gradients 144 to 144 s1"] == 2 * pixels * 144 * 4 + 4 * (9 * 144) * 2
    assert moved["train activate 24, residual"] == 2 * pixels * 24 * 3


def test_torchs_stem_has_its_images_in_channels_last(on_meta: None) -> None:
    """Made before it is timed: torch's convolutions read no other layout, and copy none."""

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.layouts: list[tuple[bool, ...]] = []
            self.copies = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            if name.startswith("convolution"):
                maps = [t for t in args if isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] == 256]
                self.layouts.append(tuple(t.is_contiguous(memory_format=torch.channels_last) for t in maps))
            self.copies += name == "clone"
            return function(*args, **(kwargs or {}))

    for form in training_forms():
        if form.name.startswith("train stem"):
            probe = form.make(256, "fp16")
            with Seen() as seen:
                probe.eager()
            assert seen.layouts == [(True, True) if "gradient" in form.name else (True,)]
            assert seen.copies == 0


def _first_wrong(probe: StepProbe, change: Any) -> str:
    call = probe.call
    spoiled = StepProbe(lambda: change(call()), probe.judge, probe.planted, probe.eager, probe.bytes)
    return gpu_checks.check_step_probe(spoiled)


def _doubling() -> StepProbe:
    """Of a kernel that is right."""
    x = torch.randn(3, 2, 2, 5)

    def judge(found: Any) -> Iterator[Any]:
        yield "answer", found[0], x.double() * 2, torch.full(x.shape, 1e-6, dtype=torch.float64)

    return StepProbe(lambda: (torch.empty(x.shape).copy_(x * 2), None), judge, x, lambda: None, 0)


def test_a_wrong_answer_of_a_step_is_seen() -> None:
    def without_nan(found: Any) -> Any:
        return found[0].nan_to_num(0), None

    def partly(found: Any) -> Any:
        out = torch.empty_like(found[0])
        out[:2] = found[0][:2]
        return out, None

    def another(found: Any) -> Any:
        return found[0] + 1e-7 * torch.rand(()), None

    torch.manual_seed(0)
    assert _first_wrong(_doubling(), lambda found: found) == ""
    assert "answer: 60 of 60 values beyond" in _first_wrong(_doubling(), lambda found: (found[0] + 0.1, None))
    assert "answer, NaN planted: 1 of 60" in _first_wrong(_doubling(), without_nan)
    assert "answer: 20 of 60 values not written" in _first_wrong(_doubling(), partly)
    assert "others at the second call" in _first_wrong(_doubling(), another)


def test_they_are_checked_timed_and_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16, and every third of a name in other kinds; by one name."""
    monkeypatch.setattr(gpu_forms, "DEVICE", "cpu")
    names = [check.name for check in gpu_checks.checks()]
    works = {work.name: work for work in gpu_times.works()}
    raced = {(form.name, form.rows, form.variant) for form in gpu_race.off_by_default()}
    for form in training_forms():
        if "fp16" in form.kinds():
            assert any(name.startswith(f"{form}, fp16, ") for name in names), str(form)
            if form.name not in gpu_times.SMALL:
                assert works[str(form)].subject == str(form)
        assert form.variant is None or (form.name, form.rows, form.variant) in raced
    assert any(name.startswith("train pointwise ") and ", tf32, " in name for name in names)
    monkeypatch.setattr(gpu_race, "PROVEN", frozenset({"training"}))
    assert not any(form.name.startswith("train") for form in gpu_race.off_by_default())


if __name__ == "__main__":
    _child()
