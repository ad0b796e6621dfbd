"""The int8 kernels against `int8.reference`, bit for bit, on every instruction set that runs here."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers import share_between_threads
from torch import Tensor

from mnv2_fast import arch, int8
from mnv2_fast.arch import LayerSpec
from mnv2_fast.backends import cpu
from mnv2_fast.errors import UserError
from mnv2_fast.int8 import QuantizedLayer, QuantizedNetwork

ISAS = cpu.isas() if cpu.available() else []
# Channels that are no multiple of four, stride 2 on odd sizes, residuals that follow one another.
ODD = ((1, 5, 1, 1), (3, 7, 3, 2), (2, 9, 2, 1), (5, 17, 2, 2))
# The same with enough of them for matrix tiles: 8, 6, 10 and 17 times four inputs, and a stem of two vectors.
ODD_WIDE = ((3, 21, 2, 1), (2, 37, 2, 2), (2, 66, 2, 1))
odd_networks = pytest.mark.parametrize(("width", "blocks"), [(0.3, ODD), (1.0, ODD_WIDE)])


def layer_of(spec: LayerSpec, rng: torch.Generator, inputs: float, largest: int = 127) -> QuantizedLayer:
    """Random tensors whose outputs fill the range of their type. inputs: the usual size of an input."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(spec.cout).uniform_(low, high, generator=rng)

    weight = torch.randint(-largest, largest + 1, spec.weight_shape, generator=rng).to(torch.int8)
    spread = largest / 3**0.5 * inputs * int8.depth(spec) ** 0.5  # of the accumulators
    bias = (uniform(-0.5, 1) * spread).round().to(torch.int32)
    if not int8.is_linear(spec):
        return QuantizedLayer(weight, bias, uniform(60, 160) / spread)
    zero = torch.randint(0, 256, (spec.cout,), generator=rng).to(torch.uint8)
    return QuantizedLayer(weight, bias, uniform(0.5, 1.5) / spread, uniform(30, 80), zero)


def network_of(specs: Sequence[LayerSpec], seed: int = 0, largest: int = 127) -> QuantizedNetwork:
    """A random valid network."""
    rng = torch.Generator().manual_seed(seed)
    layers = []
    for spec in specs:
        inputs = 90.0 * (int8.feature_steps(spec.cin) if spec.kind == "linear" else 1)
        layers.append(layer_of(spec, rng, inputs, largest))
    scale = torch.empty(3).uniform_(40, 70, generator=rng)
    zero = torch.randint(90, 140, (3,), generator=rng).to(torch.uint8)
    return QuantizedNetwork(tuple(specs), tuple(layers), scale, zero)


def images(n: int, h: int, w: int, seed: int = 0) -> Tensor:
    """Noise around a colour of each image's own."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, h, w, generator=rng) + 1.5 * torch.randn(n, 3, 1, 1, generator=rng)


def check(
    network: QuantizedNetwork,
    x: Tensor,
    isas: Sequence[str] = ISAS,
    threads_of: Sequence[int] = (1, 2, 3),
    live: bool = True,
) -> None:
    """Every answer is the twin's. live: images differ, so must answers: a dead one proves nothing."""
    expected = int8.reference(network, x)
    assert not live or all((a != b).any() for a, b in itertools.pairwise(expected))
    for isa in isas:
        kernels = cpu.Int8Network(network, isa=isa)
        assert kernels.isa == isa
        for threads in threads_of:
            assert torch.equal(kernels.run(x, threads), expected), (isa, threads)


@pytest.mark.parametrize("isa", ISAS)
@odd_networks
def test_odd_channels_and_sizes(isa: str, width: float, blocks: Sequence[Sequence[int]]) -> None:
    network = network_of(arch.network(11, width, blocks, round_nearest=1))
    sizes = [(1, 1, 1), (1, 2, 7), (3, 7, 2), (2, 8, 15), (1, 15, 8), (1, 6, 18), (3, 33, 33), (1, 65, 64)]
    for n, h, w in sizes:
        check(network, images(n, h, w), [isa], live=h * w > 1000)  # of a few pixels little is left at the end


@pytest.mark.parametrize("isa", ISAS)
@odd_networks
def test_rings_that_wrap(isa: str, width: float, blocks: Sequence[Sequence[int]]) -> None:
    """Maps so wide that the hidden rows of a block do not fit its ring at once."""
    network = network_of(arch.network(11, width, blocks, round_nearest=1))
    check(network, images(2, 40, 1000 if blocks is ODD else 500), [isa], [1, 2] if isa != "scalar" else [2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("inputs", [16, 17, 19, 20, 136])
def test_inputs_on_both_sides_of_where_tiles_begin(isa: str, inputs: int) -> None:
    network = network_of(arch.network(11, 1.0, ((1, inputs, 1, 1), (2, 24, 1, 2)), round_nearest=1))
    check(network, images(2, 21, 38), [isa])


@pytest.mark.parametrize(("width", "classes"), [(0.35, 1), (0.5, 7), (0.75, 101), (1.0, 1000), (1.4, 10)])
def test_widths(width: float, classes: int) -> None:
    network = network_of(arch.network(classes, width), seed=int(100 * width))
    for n, h, w in [(1, 64, 47), (3, 33, 32)]:
        check(network, images(n, h, w), ISAS if width < 0.7 else [isa for isa in ISAS if isa != "scalar"])


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_full_size(isa: str) -> None:
    network = network_of(arch.network())
    check(network, images(2, 224, 224), [isa])


def test_answers_depend_on_the_image() -> None:
    """The networks of these tests carry the signal through: equal answers prove something."""
    for specs in (arch.network(1000), arch.network(11, 0.3, ODD, round_nearest=1)):
        a, b = int8.reference(network_of(specs), images(2, 64, 64))
        assert (a != b).float().mean() > 0.9


def test_answer_does_not_depend_on_batch_threads_or_strides() -> None:
    network = network_of(arch.network(10, 0.35))
    x = images(17, 70, 50)
    expected = int8.reference(network, x)
    wide = torch.randn(17, 3, 70, 100)
    wide[..., ::2] = x
    layouts = [
        x,
        x.contiguous(memory_format=torch.channels_last),
        wide[..., ::2],
        x.transpose(2, 3).contiguous().mT,
        x.flip(3).flip(3),
    ]
    for isa in ISAS:
        kernels = cpu.Int8Network(network, isa=isa)
        for threads in (1, 2, 3, 5, 8):
            for layout in layouts:
                assert torch.equal(kernels.run(layout, threads), expected)
            for n in (1, 2, 4, 7, 10):
                assert torch.equal(kernels.run(x[:n], threads), expected[:n])
        assert torch.equal(kernels.run(x[:1].expand(3, -1, -1, -1), 2), expected[:1].expand(3, -1))
        assert kernels.run(x[:0]).shape == (0, 10)


@pytest.mark.parametrize("isa", ISAS)
def test_both_forms_of_a_block_give_the_same_answer(isa: str) -> None:
    """Of a network's every block, also where a block's rows are made in several chunks."""
    for specs, (h, w) in [(arch.network(10, 0.35), (70, 50)), (arch.network(10), (61, 230))]:
        network = network_of(specs)
        x = images(1, h, w)
        expected = int8.reference(network, x)
        kernels = cpu.Int8Network(network, isa=isa)
        for form in ("", *kernels.block_forms):
            for threads in (1, 2, 3, 8):
                y, times = kernels.time_steps(x, threads, form)
                assert torch.equal(y, expected), (form, threads)
                assert [i for step in times for i in step.layers] == list(range(len(specs)))
                assert all(step.seconds > 0 for step in times)
                # The stem makes a block's hidden tensor by rows alone.
                ran = {step.form for step in times if len(step.layers) == 3 and step.layers[0] > 0}
                assert ran == {form} or not form


def test_steps_are_timed_for_one_image_of_numbers() -> None:
    kernels = cpu.Int8Network(network_of(arch.network(10, 0.35)))
    with pytest.raises(ValueError, match="by-rows or by-channels"):
        kernels.time_steps(images(1, 32, 32), 1, "fused")
    with pytest.raises(ValueError, match="one image"):
        kernels.time_steps(images(2, 32, 32), 1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        kernels.time_steps(torch.full((1, 3, 32, 32), float("nan")), 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("identity", [True, False])
def test_bytes_are_looked_up(isa: str, identity: bool) -> None:
    network = network_of(arch.network(5, 0.35))
    rng = torch.Generator().manual_seed(1)
    table = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    if not identity:
        table = torch.randint(0, 256, (3, 256), generator=rng, dtype=torch.uint8)
    kernels = cpu.Int8Network(network, table=table, isa=isa)
    for n, h, w in [(3, 33, 20), (1, 1, 1), (2, 15, 67)]:
        x = torch.randint(0, 256, (n, h, w, 3), generator=rng, dtype=torch.uint8)
        grid = torch.stack([table[c][x[..., c].long()] for c in range(3)], 1)
        expected = int8.reference(network, grid)
        assert torch.equal(kernels.run(x, 2), expected)
        assert torch.equal(kernels.run(x.transpose(1, 2).contiguous().transpose(1, 2), 1), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_extremes(isa: str) -> None:
    """Weights of +-127 and images at both ends of the grid: everything saturates, nothing overflows."""
    specs = arch.network(3, 0.35)
    random = network_of(specs)
    black, white = torch.full((1, 3, 40, 40), -1e4), torch.full((1, 3, 40, 40), 1e30)
    x = torch.cat([black, white, torch.where(images(1, 40, 40) > 0, white, black)])
    for fill in (lambda w: torch.full_like(w, 127), lambda w: torch.full_like(w, -127), _checkers):
        layers = [replace(layer, weight=fill(layer.weight)) for layer in random.layers]
        check(replace(random, layers=tuple(layers)), x, [isa], live=False)


def _checkers(weight: Tensor) -> Tensor:
    signs = torch.arange(weight.numel()).reshape(weight.shape) % 2 * 2 - 1
    return (127 * signs).to(torch.int8)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sign", [1, -1])
def test_accumulators_near_their_limit(isa: str, sign: int) -> None:
    """Products and biases as large as `int8.check` lets them be."""
    specs = arch.network(7, 0.35)
    random = network_of(specs)
    layers = []
    for spec, layer in zip(specs, random.layers, strict=True):
        steps = int8.feature_steps(spec.cin) if spec.kind == "linear" else 1
        weight = torch.full_like(layer.weight, 127 * sign)
        bias = torch.full_like(layer.bias, 2**31 - 1 - int8.LARGEST_PRODUCT * steps * int8.depth(spec))
        scale = torch.full_like(layer.scale, 255 / 2**31)
        output_scale = None if layer.output_scale is None else torch.full_like(layer.output_scale, 1.5)
        layers.append(replace(layer, weight=weight, bias=bias * sign, scale=scale, output_scale=output_scale))
    network = replace(random, layers=tuple(layers))
    check(network, torch.cat([torch.full((1, 3, 32, 32), 1e4), images(1, 32, 32)]), [isa], live=False)


@pytest.mark.parametrize("isa", ISAS)
def test_halves_round_to_even(isa: str) -> None:
    """A grid and scales on which every second value lies between two integers."""
    random = network_of(arch.network(3, 0.35))
    layers = [
        replace(
            layer,
            weight=(layer.weight.to(torch.int32) // 32).to(torch.int8),
            bias=layer.bias // 64 * 2 + 1,
            scale=torch.full_like(layer.scale, 0.5**8),
            output_scale=None if layer.output_scale is None else torch.full_like(layer.output_scale, 0.5),
        )
        for layer in random.layers
    ]
    halves = torch.full((3,), 0.5)
    network = replace(random, layers=tuple(layers), input_scale=halves)
    check(network, torch.randint(-300, 301, (2, 3, 45, 38)).float(), [isa], live=False)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(isa: str, value: float) -> None:
    network = network_of(arch.network(3, 0.35))
    kernels = cpu.Int8Network(network, isa=isa)
    good = images(3, 33, 21)
    expected = int8.reference(network, good)
    for n, c, h, w in [(0, 0, 0, 0), (2, 2, 32, 20), (1, 1, 15, 16), (0, 2, 32, 3)]:
        bad = good.clone()
        bad[n, c, h, w] = value
        for x in (bad, bad.contiguous(memory_format=torch.channels_last)):
            for threads in (1, 2):
                with pytest.raises(ValueError, match="hold NaN or infinite values") as raised:
                    kernels.run(x, threads)
                assert str(raised.value) == int8.NOT_FINITE
        with pytest.raises(ValueError, match="hold NaN or infinite values"):
            int8.reference(network, bad)
    largest = good.clone()
    largest[0, 0, 0, 0] = torch.finfo(torch.float32).max
    assert kernels.run(largest).isfinite().all()
    assert torch.equal(kernels.run(good), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_of_earlier_calls_is_read(isa: str) -> None:
    """Memory of a larger call is used again, full of its values: what a call does not write would show."""
    network = network_of(arch.network(5, 0.35))
    kernels = cpu.Int8Network(network, isa=isa)
    white = torch.full((4, 3, 90, 90), 1e4)
    for h, w in [(1, 1), (5, 9), (33, 34), (64, 31)]:
        x = images(1, h, w)
        expected = int8.reference(network, x)
        for threads in (1, 2, 3):
            kernels.run(white, threads)
            assert torch.equal(kernels.run(x, threads), expected)
    assert kernels.kept()[1] > 0


@pytest.mark.parametrize("isa", ISAS)
def test_pool_of_a_wide_map(isa: str) -> None:
    """Sums over more than 2**16 columns are made in parts."""
    _check_pool(isa, 2, 2**17 + 14)


@pytest.mark.slow
def test_pool_of_a_large_map() -> None:
    """So are sums over more than 2**22 pixels."""
    _check_pool(ISAS[0], 130, 2**17 + 14)


def _check_pool(isa: str, h: int, w: int) -> None:
    specs = arch.network(2, 0.35)[:1]
    specs += (LayerSpec("pointwise", "head", "", 16, 9, 1, True), LayerSpec("linear", "classifier", "", 9, 2))
    network = network_of(specs)
    x = images(1, h, 64).repeat(1, 1, 1, w // 64 + 1)[..., :w]
    assert torch.equal(cpu.Int8Network(network, isa=isa).run(x, 2), int8.reference(network, x))


def test_several_python_threads_share_a_network() -> None:
    network = network_of(arch.network(6, 0.35))
    kernels = cpu.Int8Network(network)
    batches = [images(n, 40 + 8 * n, 56) for n in range(1, 5)]
    expected = [int8.reference(network, x) for x in batches]
    share_between_threads(kernels.run, batches, expected)


SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_int8_kernels import arch, cpu, images, int8, network_of
network = network_of(arch.network(4, 0.35))
kernels, x = cpu.Int8Network(network), images(5, 64, 64)
expected = int8.reference(network, x)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_child_of_fork_runs() -> None:
    done = _run(
        """
assert torch.equal(kernels.run(x, 2), expected)
child = os.fork()
if child == 0:
    signal.alarm(100)  # a child that waits for ever ends and is seen
    os._exit(0 if torch.equal(kernels.run(x, 2), expected) else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert torch.equal(kernels.run(x, 2), expected)
sys.exit(status)
"""
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("isa", ISAS)
def test_isa_can_be_forced(isa: str) -> None:
    script = "assert torch.equal(kernels.run(x, 2), expected); print(kernels.isa)"
    done = _run(script, MNV2_FORCE_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr[-2000:]


def test_fewer_openmp_threads_than_asked() -> None:
    script = """
for n in (1, 2, 3, 5):
    assert all(torch.equal(kernels.run(x[:n], threads), expected[:n]) for threads in (1, 2, 4, 7))
print("done")
"""
    for limit in ("1", "2", "3"):
        done = _run(script, OMP_THREAD_LIMIT=limit)
        assert done.stdout.strip() == "done", done.stderr[-2000:]


def _run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(tests=os.path.dirname(__file__)) + script
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240, check=False
    )


def test_layers_that_int8_has_no_step_for_are_refused() -> None:
    stem = LayerSpec("stem", "stem", "", 3, 8, 2, True)
    last = LayerSpec("pointwise", "last", "", 8, 16, 1, True)
    linear = LayerSpec("linear", "classifier", "", 16, 5)
    twice = [stem, replace(last, cout=8), last, linear]  # two 1x1 layers with ReLU6
    for specs in (twice, [stem, replace(linear, cin=8)]):
        with pytest.raises(UserError, match="out of place: int8 runs a stem, inverted residuals"):
            cpu.Int8Network(network_of(specs))


def test_input_that_does_not_fit_is_refused() -> None:
    kernels = cpu.Int8Network(network_of(arch.network(3, 0.35)))
    for x, message in [
        (torch.randn(1, 4, 8, 8), r"got the shape \(1, 4, 8, 8\)"),
        (torch.randn(3, 8, 8), r"got the shape \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"got the shape \(1, 3, 8, 8\)"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "uint8 images need the network's normalization"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "float32 or uint8"),
        (torch.zeros(1, 3, 0, 8), "H and W must be 1 or more"),
        (torch.zeros(1, 3, 1, 1).expand(1, 3, 2**20, 2**20), "more than 2\\*\\*36 pixels"),
    ]:
        with pytest.raises(UserError, match=message):
            kernels.run(x)
        with pytest.raises(UserError, match=message):
            kernels.time_steps(x, 1)
    for threads in (0, -1):
        with pytest.raises(UserError, match="threads must be 1 or more"):
            kernels.run(torch.randn(1, 3, 8, 8), threads)
    with pytest.raises(UserError, match="the table is"):
        cpu.Int8Network(network_of(arch.network(3, 0.35)), table=torch.zeros(3, 255, dtype=torch.uint8))


def test_a_batch_that_memory_is_too_small_for() -> None:
    kernels = cpu.Int8Network(network_of(arch.network(3, 0.35)))
    with pytest.raises(MemoryError, match="use smaller batches or images"):
        kernels.run(torch.zeros(1, 3, 1, 1).expand(1, 3, 2**18, 2**18), 1)
    with pytest.raises(MemoryError, match="use smaller batches or images"):
        kernels.time_steps(torch.zeros(1, 3, 1, 1).expand(1, 3, 2**18, 2**18), 1)


def test_nothing_is_read_past_the_image() -> None:
    """Images that end where their memory page ends: one element too many would end the process."""
    done = _run(
        """
from guard import guarded
table = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
for isa in cpu.isas():
    kernels = cpu.Int8Network(network, table=table, isa=isa)
    for h, w in ((1, 1), (2, 3), (7, 5), (1, 16), (33, 47)):
        planes, nhwc = images(2, h, w), torch.randint(0, 256, (2, h, w, 3), dtype=torch.uint8)
        last = planes.permute(0, 2, 3, 1).contiguous()
        for x in (guarded(planes), guarded(last).permute(0, 3, 1, 2)):
            assert torch.equal(kernels.run(x, 1), kernels.run(planes, 1))
        assert torch.equal(kernels.run(guarded(nhwc), 1), kernels.run(nhwc, 1))
print("done")
"""
    )
    assert done.stdout.strip() == "done", done.stderr[-2000:]
