"""bfloat16 on the CPU: kernels of both arithmetics on every instruction set, and engines of that dtype."""

from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import calibrate, run_guarded
from safetensors.torch import load_file, save_file
from torch import Tensor

import mnv2_fast
from mnv2_fast import MobileNetV2, UserError
from mnv2_fast.arch import LayerSpec
from mnv2_fast.backends import cpu
from mnv2_fast.chain import Link, weight_dtype
from mnv2_fast.ops import small_network

ISAS = cpu.isas() if cpu.available() else []
ARITHMETICS = ("bf16", "bf16_weights")
HALF_STEP = 2.0**-8  # the most that rounding to bf16 moves a number, relative to it
CHANNELS = (1, 3, 5, 8, 9, 12, 15, 16, 17, 24, 33, 144)
SIZES = ((1, 1), (2, 7), (7, 2), (8, 15))

forms = pytest.mark.parametrize(("isa", "arithmetic"), [(i, a) for i in ISAS for a in ARITHMETICS])


def weights_of(spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """A weight as a bf16 network keeps it, and a bias."""
    fan_in = spec.cin if spec.kind in ("pointwise", "linear") else 9
    weight = torch.randn(spec.weight_shape) * (2 / fan_in) ** 0.5
    return weight.to(weight_dtype(spec.kind, "bf16")), torch.rand(spec.cout)


def expected(spec: LayerSpec, pair: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """One layer in float64, and the bound on the error of its float32 sums."""
    w, b = (t.double() for t in pair)
    groups, padding = (spec.cin if spec.kind == "depthwise" else 1), w.shape[-1] // 2
    y = F.conv2d(x.double(), w, b, spec.stride, padding, groups=groups)
    bound = F.conv2d(x.double().abs(), w.abs(), b.abs(), spec.stride, padding, groups=groups)
    return y.clamp(0, 6) if spec.relu6 else y, bound * (w[0].numel() + 3) * torch.finfo(torch.float32).eps / 2


def check(y: Tensor, exact: Tensor, bound: Tensor) -> None:
    allowed = bound + (HALF_STEP * exact.abs() if y.dtype == torch.bfloat16 else 0) + 1e-30
    assert ((y.double() - exact).abs() <= allowed).all()


@forms
@pytest.mark.parametrize(
    ("kind", "stride"), [("stem", 2), ("depthwise", 1), ("depthwise", 2), ("pointwise", 1)]
)
def test_layers_round_once(isa: str, arithmetic: str, kind: str, stride: int) -> None:
    for channels in CHANNELS:
        # Of a 1x1 layer: an odd count, and those that tiles take in one step, two, three and six.
        inputs = {"stem": (3,), "depthwise": (channels,), "pointwise": (19, 20, 56, 72, 144)}[kind]
        for cin in inputs:
            spec = LayerSpec(kind, kind, "", cin, channels, stride, channels % 3 == 0)
            pair = weights_of(spec)
            network = cpu.Network([spec], [pair], pool=False, isa=isa, dtype="bf16", arithmetic=arithmetic)
            for n, (h, w) in zip((1, 3, 1, 2), SIZES, strict=True):
                x = (3 * torch.randn(n, cin, h, w)).bfloat16()
                for layout in (x, x.contiguous(memory_format=torch.channels_last)):
                    y = network.run(layout, threads=1 + n % 2)
                    assert y.dtype == (torch.bfloat16 if arithmetic == "bf16" else torch.float32)
                    check(y, *expected(spec, pair, x))


@forms
def test_residual_is_added_before_rounding(isa: str, arithmetic: str) -> None:
    for channels, cin, (h, w) in itertools.product(CHANNELS, (11, 48), ((5, 3), (7, 7))):
        spec = LayerSpec("pointwise", "project", "", cin, channels, 1, False, -1)
        pair = weights_of(spec)
        x, residual = torch.randn(2, cin, h, w).bfloat16(), torch.randn(2, channels, h, w).bfloat16()
        exact, bound = expected(spec, pair, x)
        network = cpu.Network([spec], [pair], pool=False, isa=isa, dtype="bf16", arithmetic=arithmetic)
        exact = exact + residual.double()
        check(network.run(x, 1, residual=residual), exact, bound + exact.abs() * 2.0**-24)


@forms
@pytest.mark.parametrize("inputs", [1, 2, 161, 1280])
def test_linear_layer_of_any_depth(isa: str, arithmetic: str, inputs: int) -> None:
    for classes in (1, 7, 24, 100):
        spec = LayerSpec("linear", "classifier", "", inputs, classes)
        weight, bias = weights_of(spec)
        x = torch.randn(17, inputs, 1, 1).bfloat16()
        network = cpu.Network([spec], [(weight, bias)], isa=isa, dtype="bf16", arithmetic=arithmetic)
        y = network.run(x, 2)
        assert y.dtype == torch.float32
        exact, bound = expected(spec, (weight[..., None, None], bias), x)
        check(y, exact.flatten(1), bound.flatten(1))


@forms
def test_rounding_keeps_nan_infinity_and_ties_to_even(isa: str, arithmetic: str) -> None:
    values = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 3.3e38, float("inf"), float("-inf"), float("nan")]
    bias = torch.tensor(values)
    spec = LayerSpec("pointwise", "p", "", 2, len(values), 1, False)
    pair = torch.zeros(spec.weight_shape).bfloat16(), bias
    network = cpu.Network([spec], [pair], pool=False, isa=isa, dtype="bf16", arithmetic=arithmetic)
    y = network.run(torch.zeros(1, 2, 1, 1).bfloat16()).flatten()
    wanted = bias.bfloat16() if arithmetic == "bf16" else bias
    assert torch.equal(y.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))
    x = torch.randn(1, 3, 9, 9)
    x[0, 1, 4, 4] = float("nan")
    chain = small_network(8)
    tensors = [weights_of(spec) for spec in chain.specs]
    for special, number in ((x, True), (x.nan_to_num(), False)):
        answer = cpu.Network(chain.specs, tensors, isa=isa, dtype="bf16", arithmetic=arithmetic).run(special)
        assert bool(answer.isnan().any()) == number


@forms
def test_threads_batch_and_place_do_not_change_an_answer(isa: str, arithmetic: str) -> None:
    layers = list(mnv2_fast.arch.network(num_classes=7, width_mult=0.35))
    network = cpu.Network(
        layers, [weights_of(spec) for spec in layers], isa=isa, dtype="bf16", arithmetic=arithmetic
    )
    x = torch.randn(11, 3, 65, 40)
    one = torch.cat([network.run(image[None], 1) for image in x])
    for threads in (1, 2, 3, 8):
        assert torch.equal(network.run(x, threads), one)


def test_nothing_is_read_past_a_tensor() -> None:
    """Inputs end where a page that may not be touched begins: an odd channel has no partner there."""
    script = """
dtypes = {"bf16": torch.bfloat16, "bf16_weights": torch.float32}
for isa in cpu.isas():
    for channels in (1, 3, 15, 17, 24, 33, 48, 64):
        for kind, stride in (("stem", 2), ("depthwise", 1), ("depthwise", 2), ("pointwise", 1)):
            cin = 3 if kind == "stem" else channels
            spec = LayerSpec(kind, kind, "", cin, channels, stride, True)
            tensors = [(torch.randn(spec.weight_shape), torch.randn(channels))]
            for arithmetic in dtypes:
                form = dict(isa=isa, dtype="bf16", arithmetic=arithmetic)
                network = cpu.Network([spec], tensors, pool=False, **form)
                for h, w in ((1, 1), (2, 3), (1, 16), (1, 17), (5, 9)):
                    x = torch.randn(2, cin, h, w).to(dtypes[arithmetic])
                    assert torch.equal(network.run(guarded_nhwc(x), 1), network.run(x, 1))
        spec = LayerSpec("linear", "l", "", channels, 24)
        tensors = [(torch.randn(spec.weight_shape), torch.randn(24))]
        for arithmetic in dtypes:
            network = cpu.Network([spec], tensors, isa=isa, dtype="bf16", arithmetic=arithmetic)
            x = torch.randn(3, channels, 1, 1).to(dtypes[arithmetic])
            assert torch.equal(network.run(guarded_nhwc(x), 1), network.run(x, 1))
print("done")
"""
    run_guarded(script)


def test_weights_are_rounded_once() -> None:
    """1 + 2**-8 is halfway between two bf16 numbers: float32 cannot tell from which side a product came."""
    tie, little = 1 + 2.0**-8, 2.0**-40
    weight = torch.tensor([tie + little, tie - little, tie], dtype=torch.float64)
    assert (weight.float() == tie).all()
    link = Link(LayerSpec("pointwise", "c", "", 1, 3), bias=True, norm=False)
    pair = link.fold({"weight": weight.reshape(3, 1, 1, 1), "bias": torch.zeros(3)}, "bf16")
    assert pair[0].flatten().tolist() == [1 + 2.0**-7, 1.0, 1.0]
    assert (pair[0].dtype, pair[1].dtype) == (torch.bfloat16, torch.float32)


@pytest.fixture(scope="module")
def model() -> MobileNetV2:
    torch.manual_seed(1)
    return calibrate(MobileNetV2(num_classes=5, width_mult=0.35))


def test_engine_answers_as_the_model(model: MobileNetV2) -> None:
    engine = mnv2_fast.compile(model, dtype="bf16")
    x = torch.randn(8, 3, 64, 48)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()._forward_impl(x.double())
        torchs = copy.deepcopy(model).bfloat16()._forward_impl(x.bfloat16()).double()
    y = engine(x)
    assert y.dtype == torch.float32
    assert "bf16" in repr(engine)
    assert (y - exact).abs().max() <= 2 * (torchs - exact).abs().max()
    assert (y - exact).abs().max() > 1e-5  # it is bf16
    eager = copy.deepcopy(model)
    eager.backend = "eager"
    plain = mnv2_fast.compile(eager, dtype="bf16")
    assert plain.backend == "eager"
    assert (plain(x) - exact).abs().max() <= 2 * (torchs - exact).abs().max()


def test_bytes_equal_normalized_floats_bit_for_bit(model: MobileNetV2) -> None:
    engine = mnv2_fast.compile(model, dtype="bf16")
    images = torch.randint(0, 256, (3, 45, 38, 3), dtype=torch.uint8)
    mean = torch.tensor(engine.preprocessing.mean)[:, None, None]
    std = torch.tensor(engine.preprocessing.std)[:, None, None]
    floats = images.permute(0, 3, 1, 2).contiguous().to(torch.float32).div(255).sub(mean).div(std)
    assert torch.equal(engine(images), engine(floats))
    for arithmetic in ARITHMETICS:
        table = mnv2_fast.engine.byte_table(engine.preprocessing)
        form = {"dtype": "bf16", "arithmetic": arithmetic}
        network = cpu.Network(engine.layers, engine._tensors, table=table, **form)
        assert torch.equal(network.run(images), network.run(floats))


def test_file_holds_bf16_and_answers_the_same(model: MobileNetV2, tmp_path: Path) -> None:
    engine, path = mnv2_fast.compile(model, dtype="bf16"), tmp_path / "b.safetensors"
    engine.save(path)
    full = tmp_path / "f.safetensors"
    mnv2_fast.compile(model).save(full)
    assert path.stat().st_size < 0.6 * full.stat().st_size
    loaded, x = mnv2_fast.load(path), torch.randn(2, 3, 40, 40)
    assert loaded.dtype == "bf16"
    assert torch.equal(loaded(x), engine(x))
    tensors = load_file(path)
    assert tensors["classifier.1.weight"].dtype == torch.bfloat16
    assert tensors["features.0.0.weight"].dtype == torch.float32
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    wrong = tmp_path / "w.safetensors"
    save_file({name: t.float() for name, t in tensors.items()}, wrong, metadata)
    with pytest.raises(UserError, match=r"in an engine of bf16 it is torch\.bfloat16"):
        mnv2_fast.load(wrong)


def test_fp16_is_refused_and_bf16_named(model: MobileNetV2) -> None:
    with pytest.raises(UserError, match=r"fp16.*bf16"):
        mnv2_fast.compile(model, dtype="fp16")


def test_a_processor_without_the_instruction_is_said_once(
    model: MobileNetV2, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mnv2_fast import info

    isa = cpu.isa()
    said = cpu.bf16_arithmetic()
    assert info.collect()["kernels"]["bf16"] == said
    assert ("fp32 arithmetic" in said) == (isa not in ("avx512bf16", "amx", "scalar"))
    cpu._say_of_bf16.cache_clear()
    with caplog.at_level(logging.INFO, "mnv2_fast"):
        mnv2_fast.compile(model, dtype="bf16")
        mnv2_fast.compile(model, dtype="bf16")
    assert caplog.text.count("fp32 arithmetic") == ("fp32 arithmetic" in said)
