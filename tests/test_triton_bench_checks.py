"""What `python -m bench.gpu` checks, on the CPU: its forms by the interpreter and by numpy, its networks by
stubs; and that it sees what is wrong.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import triton_interpreter
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))  # the interpreter's child is run as a script

import gluon_stand_in
import gpu_stand_in

from bench import gpu_checks, gpu_forms, gpu_network
from bench.gpu_checks import Check
from bench.gpu_forms import DTYPES, Form
from kernels import depthwise
from mnv2_fast import arch
from mnv2_fast.backends import replay


def tiny_layers() -> list[arch.Layer]:
    """Every kind of layer but a whole block's, small enough for the interpreter."""
    specs = [arch.LayerSpec("stem", "", "", 3, 8, 2, True), *arch.inverted_residual("", 8, 8, 2, 3)]
    specs += [*arch.inverted_residual("", 8, 8, 1, 2), arch.LayerSpec("pointwise", "", "", 8, 40, 1, True)]
    return arch.layers(size=11, specs=[*specs, arch.LayerSpec("linear", "", "", 40, 5)])


def small_checks() -> list[Check]:
    """Each tiny form in every kind with every tile, an odd shape, images that are hardly far."""
    of_forms = gpu_forms.forms(tiny_layers())
    found = [
        check for form in of_forms for kind in form.kinds() for check in gpu_checks.form_checks(form, kind)
    ]
    far = [
        form for form in of_forms if str(form) in ("depthwise 16 to 16 s1 at 3", "pointwise 24 to 8 s1 at 3")
    ]
    found += [*gpu_checks.depthwise_checks(gpu_checks.ODD_SHAPES[-1:])]
    return found + [Check(f"far {form}", "", lambda form=form: gpu_checks.check_far(form)) for form in far]


def touched(form: Form, kind: str) -> str:
    """Whether the judge would see an answer that is a little off: what it allows, where, and how much."""
    probe = form.make(2, kind)
    probe.run()
    want, allowed = probe.judge()
    most = {"fp16": 0.03, "bf16": 0.1, "fp32": 1e-3, "tf32": 0.05}[kind] * float(want.abs().max())
    if not allowed.max() <= most:
        return f"{allowed.max():.3g} allowed of values up to {want.abs().max():.3g}"
    at = int(want.numel() // 2)
    near = want.flatten()[at] + 3 * allowed.flatten()[at]
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), want.shape))
    probe.out[index] = near
    said = gpu_checks.judged(probe.out, want, allowed)
    return "" if said.startswith("1 of") else f"an error of three times what is allowed: {said or 'unseen'}"


def _child() -> None:
    triton_interpreter.mend()
    torch.set_num_threads(1)
    gpu_forms.DEVICE = "cpu"
    gpu_checks.FAR = 3000
    found = {check.name: check.run() for check in small_checks()}
    for form in gpu_forms.forms(tiny_layers()):
        found |= {f"touched {form}, {kind}": touched(form, kind) for kind in form.kinds()}
    print(json.dumps(found))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With small photos, and one thread: several wait for each other where the machine is busy."""
    monkeypatch.setattr(gpu_forms, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_network, "SIZE", 96)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_form_is_right_when_interpreted(verdicts: dict[str, str], on_the_cpu: None) -> None:
    names = [check.name for check in small_checks()]
    assert {name: verdicts[name] for name in names} == dict.fromkeys(names, "")
    assert len([name for name in names if name.startswith("far")]) == 2
    gradients = [f"{op} {of} gradient" for op in ("depthwise", "pointwise") for of in ("input", "weight")]
    pairs = "depthwise with project", "depthwise, then project"
    for op in (
        "stem",
        "stem of bytes",
        "depthwise",
        "pointwise",
        "features",
        "classifier",
        *gradients,
        *pairs,
    ):
        assert any(name.startswith(op) for name in names), op
    for row in ("large_s1", "small_s2", "large_half", "small_tf32", "large_ieee", "half, one image"):
        assert any(name.endswith(row) for name in names), row


def test_every_judge_sees_a_small_error(verdicts: dict[str, str]) -> None:
    said = {name: why for name, why in verdicts.items() if name.startswith("touched")}
    assert len(said) > 40
    assert said == dict.fromkeys(said, "")


def _blocks(*rows: str) -> Iterator[Form]:
    for form in gpu_forms.forms():
        if form.whole_block and form.rows[0] in rows:
            rows = tuple(row for row in rows if row != form.rows[0] or row == "stem")
            yield form


@pytest.mark.parametrize("form", list(_blocks("stem", "28_s2", "7_s1")), ids=str)
def test_whole_blocks_are_right_by_numpy(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "CHECK_BATCH", 3 if form.size == 7 else 1)
    with gluon_stand_in.executed() as moved:
        assert [check.run() for check in gpu_checks.form_checks(form, "fp16")] == [""]
        assert touched(form, "fp16") == ""
    assert moved


def _unwritten(x, weight, bias, stride, relu6, *, out, tile):
    return out


def _without_nan(x, weight, bias, stride, relu6, *, out, tile):
    return out.copy_(depthwise.reference(x, weight, bias, stride, relu6).nan_to_num(0))


def _slightly_off(x, weight, bias, stride, relu6, *, out, tile):
    return out.copy_(depthwise.reference(x, weight, bias, stride, relu6) * 1.01)


def _spoils_others(x, weight, bias, stride, relu6, *, out, tile):
    out.copy_(depthwise.reference(x, weight, bias, stride, relu6))
    return out[1:].add_(out[:1].sum() * 0)


def _another_each_time(x, weight, bias, stride, relu6, *, out, tile):
    out.copy_(depthwise.reference(x, weight, bias, stride, relu6))
    return out[-1, 0, 0, 0].add_(2e-6 * torch.rand(()) * out.isfinite()[-1, 0, 0, 0])


def _right(x, weight, bias, stride, relu6, *, out, tile):
    return out.copy_(depthwise.reference(x, weight, bias, stride, relu6))


def _depthwise_form() -> Form:
    return next(form for form in gpu_forms.forms(tiny_layers()) if form.name == "depthwise")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (_unwritten, "not written"),
        (_without_nan, "NaN lost"),
        (_slightly_off, "beyond tolerance"),
        (_spoils_others, "NaN lost or made"),
    ],
)
def test_a_wrong_kernel_is_seen(kernel: Callable, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = _depthwise_form()
    monkeypatch.setattr(depthwise, "depthwise", _right)
    assert gpu_checks.check_form(form, "fp16", None) == ""
    assert gpu_checks.check_depthwise((2, 33, 7, 8), 1, torch.float16) == ""
    monkeypatch.setattr(depthwise, "depthwise", kernel)
    assert said in gpu_checks.check_form(form, "fp16", None)
    if kernel is not _spoils_others:
        assert gpu_checks.check_depthwise((2, 33, 7, 8), 1, torch.float16)


def test_other_bits_at_the_second_call_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "depthwise", _another_each_time)
    torch.manual_seed(0)
    said = [gpu_checks.check_form(_depthwise_form(), "fp32", None) for _ in range(8)]
    assert any("1 values are others at the second call" in why for why in said), said


def test_what_is_near_but_not_far_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def near(x, weight, bias, stride, relu6, *, out, tile):
        right = depthwise.reference(x[:10], weight, bias, stride, relu6)
        return out[:10].copy_(right)

    monkeypatch.setattr(gpu_checks, "FAR", 20000)
    monkeypatch.setattr(depthwise, "depthwise", _right)
    assert gpu_checks.check_far(_depthwise_form()) == ""
    monkeypatch.setattr(depthwise, "depthwise", near)
    assert "not written" in gpu_checks.check_far(_depthwise_form())


def test_the_list_of_checks_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form in fp16 with each tile, the other kinds of each name, far images and networks."""
    monkeypatch.setattr(gpu_checks, "usable", lambda form: True)
    monkeypatch.setattr(gpu_checks, "has_blocks", lambda: True)
    names = [check.name for check in gpu_checks.checks()]
    assert len(names) == len(set(names))
    for form in gpu_forms.forms():
        for row in form.tiles("fp16"):
            assert f"{form}, fp16, {row}" in names
    for op in {form.name for form in gpu_forms.forms()}:
        for kind in next(form for form in gpu_forms.forms() if form.name == op).kinds():
            assert any(name.startswith(f"{op} ") and f", {kind}, " in name for name in names), (op, kind)
    far = [name.split()[0] for name in names if "past 2**31" in name]
    assert far == ["depthwise", "depthwise", "pointwise", "block"]  # the second one with its projection
    for kind in DTYPES:
        assert f"network by layer, {kind}, photos as bytes" in names
    assert "network fused, fp16, photos as numbers" in names


class _Stub:
    """Our network, by torch in `dtype` and what `spoil` makes of it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, spoil: Callable[[Tensor], Tensor]) -> None:
        self.model, self.dtype, self.spoil = model, dtype, spoil

    def __call__(self, x: Tensor) -> Tensor:
        x = gpu_network.as_numbers(x, self.dtype) if x.dtype == torch.uint8 else x
        with torch.no_grad():
            return self.spoil(self.model.to(self.dtype)(x).double())


def _stale(run: replay.Run, x: Tensor, lane: replay.Lane) -> replay.Graph:
    """A graph that answers what it did first, once it has answered."""
    y, first = run(x), []

    def again() -> None:
        if not first:
            first.append(run(x))
        y.copy_(first[0])

    return replay.Graph(again, x, y)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The check of a network that a stub stands in for."""
    model = gpu_network.settled_network()
    monkeypatch.setattr(gpu_network, "settled_network", lambda: model)
    monkeypatch.setattr(replay, "place", lambda x: 0)
    monkeypatch.setattr(replay, "capturing", lambda device: False)
    monkeypatch.setattr(replay, "_lanes", {})

    def check(kind: str, spoil: Callable, from_bytes: bool, capture: Callable = gpu_stand_in.graph) -> str:
        from copy import deepcopy

        monkeypatch.setattr(replay, "capture", capture)
        dtype = DTYPES[kind][0]
        monkeypatch.setattr(gpu_network, "our_network", lambda *_: _Stub(deepcopy(model), dtype, spoil))
        return gpu_checks.check_network(kind, False, from_bytes)

    return check


@pytest.mark.parametrize("from_bytes", [True, False], ids=["bytes", "numbers"])
@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32", "tf32"])
def test_a_right_network_passes(network: Callable[..., str], kind: str, from_bytes: bool) -> None:
    assert network(kind, lambda y: y, from_bytes) == ""


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "the photo is ignored": lambda y: y.mean(0, keepdim=True).repeat(len(y), 1),
    "slightly off": lambda y: y * 1.02,
    "one logit": lambda y: y + torch.eye(*y.shape) * 0.1,
    "photos mixed up": lambda y: y.flip(0),
    "NaN": lambda y: y + math.nan,
}


@pytest.mark.parametrize("kind", ["fp16", "fp32"])
@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_wrong_network_is_seen(network: Callable[..., str], spoiled: str, kind: str) -> None:
    assert "are allowed" in network(kind, SPOILED[spoiled], True)


@pytest.mark.parametrize("kind", ["fp16", "tf32"])
def test_an_error_beyond_torchs_is_seen(network: Callable[..., str], kind: str) -> None:
    """One logit off by twice what is allowed, of which the other errors may take a half."""
    model, photos = gpu_network.settled_network(), gpu_network.photos(gpu_checks.CHECK_BATCH, 1)
    want, torchs = (gpu_network.torchs_answer(model, photos, d) for d in (torch.float64, torch.float16))
    off = float((torchs - want).abs().max()) * (8 if kind == "tf32" else 4)
    assert "are allowed" in network(kind, lambda y: y + torch.eye(*y.shape) * off, True)


def test_an_answer_to_the_photos_before_is_seen(network: Callable[..., str]) -> None:
    assert "logits of photos 2" in network("fp16", lambda y: y, True, _stale)


def test_logits_depend_on_the_photo() -> None:
    """By far more than fp16 is off; activations are neither dead nor all clamped, down to the last layer."""
    model, photos = gpu_network.settled_network(), gpu_network.photos(4, 1)
    logits = gpu_network.torchs_answer(model, photos, torch.float64)
    error = (gpu_network.torchs_answer(model, photos, torch.float16) - logits).abs().max()
    for i, j in ((0, 1), (0, 2), (1, 3)):
        assert (logits[i] - logits[j]).abs().max() > 20 * error
    shares = []
    for layer in model.layers:
        if isinstance(layer[-1], nn.ReLU6):
            layer.register_forward_hook(
                lambda _, __, y: shares.append(float(((y > 0) & (y < 6)).float().mean()))
            )
    with torch.no_grad():
        model(gpu_network.as_numbers(photos, torch.float32))
    assert len(shares) == 35
    assert all(0.5 < share < 0.99 for share in shares), shares


def test_photos_too_alike_are_no_proof(network: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_network, "photos", lambda n, seed: torch.full((n, 96, 96, 3), 7, dtype=torch.uint8)
    )
    assert "too little to tell" in network("fp16", lambda y: y, True)


def test_our_network_is_the_plain_one() -> None:
    """Its folded layers, by the float64 twins of the operators, for no interpreter is in this process."""
    model = gpu_network.settled_network(7)
    network = gpu_network.our_network(model, "fp32", False)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y = x
        inputs = []
        for i, spec in enumerate(network.specs):
            weight, bias = network._layer(i)
            inputs.append(y)
            if spec.kind == "linear":
                y = torch.nn.functional.linear(y.mean((2, 3)), weight, bias)
                break
            groups = spec.cout if spec.kind == "depthwise" else 1
            y = torch.nn.functional.conv2d(y, weight, bias, spec.stride, weight.shape[2] // 2, 1, groups)
            y = y.clamp(0, 6) if spec.relu6 else y
            y = y + inputs[-spec.residual - 1] if spec.residual else y
        torch.testing.assert_close(y, model(x))


def test_plain_network_is_torchvisions() -> None:
    from mnv2_fast._torchvision import torchvision

    torch.manual_seed(0)
    theirs = torchvision().models.mobilenet_v2(num_classes=7).eval()
    ours = gpu_network.plain_network(7).eval()
    for spec, layer in zip(ours.specs, ours.layers, strict=True):
        parts = {spec.conv: layer[2] if spec.kind == "linear" else layer[0], spec.bn: layer[1]}
        for name, part in parts.items():
            if name:
                part.load_state_dict(theirs.get_submodule(name).state_dict(), strict=spec.kind != "linear")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


if __name__ == "__main__":
    _child()
