"""The C++ kernels against float64, on every instruction set that runs here."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from helpers import run_guarded, share_between_threads
from torch import Tensor

from mnv2_fast import arch
from mnv2_fast.arch import LayerSpec
from mnv2_fast.backends import cpu

ISAS = cpu.isas() if cpu.available() else []
# Odd ones, and for each ISA some that fill one vector and a half (6; 10, 12; 24) or a part of it (5; 9; 17).
CHANNELS = (1, 3, 5, 8, 9, 10, 12, 15, 16, 17, 24, 33, 144)
SIZES = ((1, 1), (2, 7), (7, 2), (8, 15), (15, 8))


def test_extension_is_built() -> None:
    assert cpu.available(), cpu.unavailable_reason()
    assert ISAS[-1] == "scalar"


def folded(layers: list[LayerSpec], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Weights that keep activations near 1 through any number of layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in layers:
        weight = torch.randn(spec.weight_shape, generator=generator)
        fan_in = weight[0].numel()
        tensors.append((weight * (2 / fan_in) ** 0.5, torch.rand(spec.cout, generator=generator)))
    return tensors


def twin(
    layers: list[LayerSpec], tensors: list[tuple[Tensor, Tensor]], x: Tensor, pool: bool
) -> tuple[Tensor, Tensor]:
    """The network in float64, and for each output the bound on the rounding error of its last layer."""
    inputs, bound = [], torch.zeros(())
    x = x.double()
    for spec, pair in zip(layers, tensors, strict=True):
        w, b = (t.double() for t in pair)
        inputs.append(x)
        if spec.kind == "linear":
            x = x if x.dim() == 2 else x.mean((2, 3))
            bound = F.linear(x.abs(), w.abs(), b.abs())
            x = F.linear(x, w, b)
            continue
        groups = spec.cin if spec.kind == "depthwise" else 1
        padding = 0 if spec.kind == "pointwise" else 1
        bound = F.conv2d(x.abs(), w.abs(), b.abs(), spec.stride, padding, groups=groups)
        x = F.conv2d(x, w, b, spec.stride, padding, groups=groups)
        if spec.relu6:
            x = x.clamp(0, 6)
        if spec.residual:
            x = x + inputs[-1 - spec.residual]
    if pool and layers[-1].kind != "linear":
        x, bound = x.mean((2, 3)), bound.mean((2, 3))
    return x, bound


def block(cin: int, hidden: int, cout: int, stride: int, residual: bool) -> list[LayerSpec]:
    return [
        LayerSpec("pointwise", "expand", "", cin, hidden, 1, True),
        LayerSpec("depthwise", "depthwise", "", hidden, hidden, stride, True),
        LayerSpec("pointwise", "project", "", hidden, cout, 1, False, 2 if residual else 0),
    ]


def single(kind: str, channels: int, stride: int, relu6: bool) -> list[LayerSpec]:
    cin = {"stem": 3, "depthwise": channels, "pointwise": 19}[kind]
    return [LayerSpec(kind, kind, "", cin, channels, stride, relu6)]


SINGLES = [("stem", 2), ("depthwise", 1), ("depthwise", 2), ("pointwise", 1)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kind", "stride"), SINGLES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_single_layers(isa: str, kind: str, stride: int, channels: int) -> None:
    for relu6 in (False, True):
        layers = single(kind, channels, stride, relu6)
        tensors = folded(layers)
        network = cpu.Network(layers, tensors, pool=False, isa=isa)
        assert network.isa == isa
        for n, (h, w) in zip((1, 3, 1, 3, 1), SIZES, strict=True):
            x = 3 * torch.randn(n, layers[0].cin, h, w)
            expected, bound = twin(layers, tensors, x, False)
            for threads in (1, 2, 3):
                y = network.run(x, threads)
                assert y.shape == expected.shape
                assert y.is_contiguous(memory_format=torch.channels_last)
                torch.testing.assert_close(y.double(), expected, rtol=0, atol=_atol(bound, layers[0]))


def _atol(bound: Tensor, spec: LayerSpec) -> float:
    """n products and sums in float32 are off by at most (n + 1) eps / 2 of the sum of absolute values."""
    depth = {"stem": 27, "depthwise": 9}.get(spec.kind, spec.cin)
    return float(bound.max()) * (depth + 2) * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("cin", "hidden", "cout"), [(1, 6, 3), (8, 48, 8), (24, 144, 24), (33, 65, 17), (16, 96, 24)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks(isa: str, cin: int, hidden: int, cout: int, stride: int) -> None:
    layers = block(cin, hidden, cout, stride, stride == 1 and cin == cout)
    tensors = folded(layers)
    network = cpu.Network(layers, tensors, pool=False, isa=isa)
    for n, h, w in [(1, 1, 1), (3, 7, 5), (2, 40, 33), (1, 3, 500)]:
        x = torch.randn(n, cin, h, w)
        expected, _ = twin(layers, tensors, x, False)
        for threads in (1, 2, 3):
            torch.testing.assert_close(network.run(x, threads).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_residual_of_a_pointwise_layer(isa: str) -> None:
    for channels in CHANNELS:
        layers = [LayerSpec("pointwise", "project", "", 11, channels, 1, False, -1)]
        tensors = folded(layers)
        x, residual = torch.randn(2, 11, 5, 3), torch.randn(2, channels, 5, 3)
        expected = F.conv2d(x.double(), *(t.double() for t in tensors[0])) + residual.double()
        y = cpu.Network(layers, tensors, pool=False, isa=isa).run(x, 1, residual=residual)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_whole_network_at_odd_sizes(isa: str) -> None:
    for width, shape in [
        (1.0, (1, 3, 96, 96)),
        (0.35, (3, 3, 65, 33)),
        (1.4, (2, 3, 1, 1)),
        (0.5, (5, 3, 2, 130)),
    ]:
        layers = list(arch.network(num_classes=7, width_mult=width))
        tensors = folded(layers)
        network = cpu.Network(layers, tensors, isa=isa)
        x = torch.randn(shape)
        expected, _ = twin(layers, tensors, x, True)
        for threads in (1, 2, 3):
            torch.testing.assert_close(network.run(x, threads).double(), expected, rtol=1e-4, atol=1e-4)


def test_channels_that_are_no_multiple_of_eight() -> None:
    setting = ((1, 5, 1, 1), (3, 7, 2, 2), (2, 9, 2, 1))
    layers = list(arch.network(11, 0.3, setting, round_nearest=1))
    tensors = folded(layers)
    for isa in ISAS:
        network = cpu.Network(layers, tensors, isa=isa)
        x = torch.randn(3, 3, 21, 18)
        torch.testing.assert_close(
            network.run(x).double(), twin(layers, tensors, x, True)[0], rtol=1e-5, atol=1e-5
        )


@pytest.fixture(scope="module")
def small() -> tuple[list[LayerSpec], cpu.Network]:
    layers = list(arch.network(10, 0.35))
    return layers, cpu.Network(layers, folded(layers))


@pytest.mark.parametrize("isa", ISAS)
def test_answer_does_not_depend_on_batch_threads_or_strides(isa: str) -> None:
    layers = list(arch.network(10, 0.35))
    network = cpu.Network(layers, folded(layers), isa=isa)
    x = torch.randn(17, 3, 70, 50)  # more than a tile of the classifier has
    alone = torch.cat([network.run(image[None], 1) for image in x])
    wide = torch.randn(17, 3, 70, 100)
    wide[..., ::2] = x
    layouts = [
        x,
        x.contiguous(memory_format=torch.channels_last),
        wide[..., ::2],
        x.transpose(2, 3).contiguous().mT,
    ]
    for threads in (1, 2, 3, 5, 8):  # images are taken as they come, by more threads than there are cores
        for layout in layouts:
            assert torch.equal(network.run(layout, threads), alone)
        for n in (1, 2, 4, 7, 10):
            assert torch.equal(network.run(x[:n], threads), alone[:n])
    assert torch.equal(network.run(x[:1].expand(3, -1, -1, -1), 2), alone[:1].expand(3, -1))


@pytest.mark.parametrize("arithmetic", [None, "bf16", "bf16_weights"])
@pytest.mark.parametrize("isa", ISAS)
def test_all_forms_of_a_block_give_the_same_answer(isa: str, arithmetic: str | None) -> None:
    """Of every block of a network, and of two whose filtered tensors are larger than one strip."""
    kinds = ["pointwise", "depthwise", "pointwise"]
    for layers, shape in [
        (list(arch.network(10, 0.35)), (1, 3, 70, 50)),
        (block(8, 136, 8, 1, True), (1, 8, 61, 37)),
        (block(8, 136, 24, 2, False), (1, 8, 61, 90)),
    ]:
        precision = {"dtype": "bf16", "arithmetic": arithmetic} if arithmetic else {}
        network = cpu.Network(layers, folded(layers), pool=shape[1] == 3, isa=isa, **precision)
        x = torch.randn(shape)
        expected = network.run(x, 1)
        for form in ("", *network.block_forms):
            for threads in (1, 2, 3, 8) if arithmetic is None else (1, 3):
                y, times = network.time_steps(x, threads, form)
                assert torch.equal(y, expected), (form, threads)
                assert [i for step in times for i in step.layers] == list(range(len(layers)))
                assert all(step.seconds > 0 for step in times)
                ran = {step.form for step in times if [layers[i].kind for i in step.layers] == kinds}
                assert ran == {form} or not form


def test_a_block_form_that_is_none_is_refused(small: tuple[list[LayerSpec], cpu.Network]) -> None:
    with pytest.raises(ValueError, match="fused, part-fused or per-layer"):
        small[1].time_steps(torch.randn(1, 3, 32, 32), 1, "half")


def test_empty_batch(small: tuple[list[LayerSpec], cpu.Network]) -> None:
    assert small[1].run(torch.empty(0, 3, 32, 32)).shape == (0, 10)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_propagate(isa: str, value: float) -> None:
    for kind, stride in SINGLES:
        for relu6 in (False, True):
            layers = single(kind, 17, stride, relu6)
            tensors = folded(layers)
            x = torch.randn(1, layers[0].cin, 6, 7)
            x[0, 0, 3, 4] = value
            expected = twin(layers, tensors, x, False)[0].float()
            y = cpu.Network(layers, tensors, pool=False, isa=isa).run(x)
            torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_nothing_is_read_or_written_past_the_tensors() -> None:
    """Tensors that end where their memory page ends: one float too many would end the process."""
    script = """
for isa in cpu.isas():
    for channels in (1, 3, 15, 17, 24, 33):
        for kind, stride in (("stem", 2), ("depthwise", 1), ("depthwise", 2), ("pointwise", 1)):
            cin = 3 if kind == "stem" else channels
            spec = LayerSpec(kind, kind, "", cin, channels, stride, True)
            tensors = [(torch.randn(spec.weight_shape), torch.randn(channels))]
            for h, w in ((1, 1), (2, 3), (7, 5), (1, 16)):
                x = torch.randn(2, cin, h, w)
                network = cpu.Network([spec], tensors, pool=False, isa=isa)
                assert torch.equal(network.run(guarded_nhwc(x), 1), network.run(x, 1))
print("done")
"""
    run_guarded(script)


def test_several_python_threads_share_a_network(small: tuple[list[LayerSpec], cpu.Network]) -> None:
    _, network = small
    images = [torch.randn(n, 3, 40 + 8 * n, 56) for n in range(1, 5)]
    expected = [network.run(x, 1) for x in images]
    share_between_threads(network.run, images, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_child_of_fork_runs() -> None:
    """libgomp would wait for ever in a child for threads that only its parent has."""
    script = """
import os, signal, sys, torch
from mnv2_fast import arch
from mnv2_fast.backends import cpu
layers = list(arch.network(4, 0.35))
torch.manual_seed(0)
network = cpu.Network(layers, [(torch.randn(s.weight_shape) * 0.05, torch.zeros(s.cout)) for s in layers])
x = torch.randn(5, 3, 64, 64)
before = network.run(x, 2)
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that waits for ever ends and is seen
    os._exit(0 if torch.equal(network.run(x, 2), before) else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert torch.equal(network.run(x, 2), before)
sys.exit(status)
"""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("isa", ISAS)
def test_isa_can_be_forced(isa: str) -> None:
    script = "from mnv2_fast.backends import cpu; print(cpu.isa())"
    env = {**os.environ, "MNV2_FORCE_ISA": isa.upper()}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert done.stdout.strip() == isa, done.stderr


def test_unknown_isa_lists_the_ones_that_run() -> None:
    script = "from mnv2_fast.backends import cpu; cpu.isa()"
    env = {**os.environ, "MNV2_FORCE_ISA": "neon"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "MNV2_FORCE_ISA='neon'" in last
    assert all(isa in last for isa in ISAS)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "at least one layer"),
        (
            [LayerSpec("pointwise", "a", "", 4, 8), LayerSpec("pointwise", "b", "", 9, 8)],
            "takes 9 channels but gets 8",
        ),
        ([LayerSpec("depthwise", "a", "", 4, 8)], "keeps its channels"),
        ([LayerSpec("stem", "a", "", 4, 8, 2)], "3 channels and stride 2"),
        ([LayerSpec("pointwise", "a", "", 4, 8, 2)], "stride 1 only"),
        ([LayerSpec("pointwise", "a", "", 4, 8, 1, False, 1)], "no block to come from"),
        ([LayerSpec("linear", "a", "", 4, 8), LayerSpec("pointwise", "b", "", 8, 8)], "is the last one"),
        ([LayerSpec("depthwise", "a", "", 4, 4, 3)], "stride 1 or 2"),
        ([LayerSpec("depthwise", "a", "", 4, 4)], "only a pointwise layer can be pooled"),
        (block(4, 8, 5, 1, True), "no block to come from"),
        (block(4, 8, 4, 2, True), "no block to come from"),
    ],
)
def test_layers_that_do_not_chain_are_refused(layers: list[LayerSpec], message: str) -> None:
    tensors = [(torch.zeros(spec.weight_shape), torch.zeros(spec.cout)) for spec in layers]
    with pytest.raises(ValueError, match=message):
        cpu.Network(layers, tensors)


def test_a_block_may_be_pooled() -> None:
    layers = block(4, 8, 5, 1, False)[1:]
    tensors = folded(layers)
    x = torch.randn(2, 8, 9, 7)
    torch.testing.assert_close(
        cpu.Network(layers, tensors).run(x).double(), twin(layers, tensors, x, True)[0], rtol=1e-5, atol=1e-5
    )


def test_input_that_does_not_fit_is_refused(small: tuple[list[LayerSpec], cpu.Network]) -> None:
    pointwise = [LayerSpec("pointwise", "a", "", 3, 8)]
    linear = [LayerSpec("linear", "a", "", 3, 8)]
    added = [LayerSpec("pointwise", "a", "", 3, 8, 1, False, -1)]
    x, images = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    for layers, pool, args, message in [
        (pointwise, False, (torch.randn(1, 4, 4, 4),), "takes 3 channels"),
        (pointwise, False, (images,), "begins with a stem|normalization"),
        (pointwise, False, (x, 1, torch.randn(1, 8, 4, 4)), "residual of shape None"),
        (added, False, (x,), "got None"),
        (added, False, (x, 1, torch.randn(1, 8, 4, 5)), "residual of shape"),
        (linear, True, (x,), "H = W = 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpu.Network(layers, folded(layers), pool=pool).run(*args)
    with pytest.raises(ValueError, match="normalization"):
        small[1].run(images)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("h", "w"), [(1, 1), (7, 7), (14, 14), (64, 64), (250, 250)])
def test_pool_keeps_its_digits_on_large_maps(isa: str, h: int, w: int) -> None:
    layers = [LayerSpec("pointwise", "head", "", 2, 5, 1, True)]
    tensors = [(torch.ones(5, 2, 1, 1), torch.zeros(5))]
    network = cpu.Network(layers, tensors, isa=isa)
    for x in (torch.full((1, 2, h, w), 0.55), torch.rand(1, 2, h, w)):
        expected = twin(layers, tensors, x, True)[0]
        # Twice torch's 2.4e-7 and 4 eps, of values near 1.1.
        torch.testing.assert_close(network.run(x).double(), expected, rtol=9e-7, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_bytes_on_every_isa(isa: str) -> None:
    layers = list(arch.network(5, 0.35))
    tensors, table = folded(layers), torch.randn(3, 256)
    network = cpu.Network(layers, tensors, table=table, isa=isa)
    images = torch.randint(0, 256, (3, 33, 20, 3), dtype=torch.uint8)
    floats = torch.stack([table[c][images[..., c].long()] for c in range(3)], 1)
    assert torch.equal(network.run(images, 2), network.run(floats, 1))


def test_fewer_openmp_threads_than_asked() -> None:
    script = """
import torch
from mnv2_fast import arch
from mnv2_fast.backends import cpu
layers = list(arch.network(4, 0.35))
network = cpu.Network(layers, [(torch.randn(s.weight_shape) * 0.05, torch.zeros(s.cout)) for s in layers])
for n in (1, 2, 3, 5, 9):
    x = torch.randn(n, 3, 50, 40)
    one = network.run(x, 1)
    assert all(torch.equal(network.run(x, threads), one) for threads in (2, 4, 7))
print("done")
"""
    for limit in ("1", "2", "3"):
        env = {**os.environ, "OMP_THREAD_LIMIT": limit}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=120, check=False
        )
        assert done.stdout.strip() == "done", done.stderr[-2000:]


def test_weights_of_the_wrong_shape_are_refused() -> None:
    spec = LayerSpec("pointwise", "expand", "", 4, 8)
    with pytest.raises(ValueError, match=r"expand: weight .* do not fit"):
        cpu.Network([spec], [(torch.zeros(8, 5, 1, 1), torch.zeros(8))])


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_positive(small: tuple[list[LayerSpec], cpu.Network], threads: int) -> None:
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        small[1].run(torch.randn(1, 3, 8, 8), threads)
