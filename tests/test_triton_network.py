"""The whole network on the Triton kernels: its launches, its answers when interpreted, its traffic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import triton_interpreter
from gpu_stand_in import graph
from torch import Tensor

from mnv2_fast import arch
from mnv2_fast.arch import LayerSpec, inverted_residual
from mnv2_fast.backends import eager, replay
from mnv2_fast.backends import triton as backend
from mnv2_fast.chain import Chain, Link

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from mnv2_fast.kernels import depthwise_project, head, pointwise
from mnv2_fast.kernels.common import tiles
from mnv2_fast.kernels.network import Launch, Network
from triton.runtime.errors import OutOfResources

CPU = torch.device("cpu")
NORM = torch.tensor([[0.0171, 0.0175, 0.0174], [-2.118, -2.036, -1.804]])


def small_specs() -> list[LayerSpec]:
    """Every kind of layer, a residual, and one over an expansion of 1."""
    specs = [LayerSpec("stem", "", "", 3, 8, 2, True)]
    specs += inverted_residual("", 8, 8, 1, 1)
    specs += inverted_residual("", 8, 17, 2, 3)
    specs += inverted_residual("", 17, 17, 1, 3)
    return [*specs, LayerSpec("pointwise", "", "", 17, 40, 1, True), LayerSpec("linear", "", "", 40, 5)]


def tensors(specs: list[LayerSpec] | tuple[LayerSpec, ...]) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    scale = {"stem": 0.3, "depthwise": 0.4}
    return [
        (
            torch.randn(spec.weight_shape) * scale.get(spec.kind, 1.4 * spec.cin**-0.5),
            torch.randn(spec.cout) * 0.3,
        )
        for spec in specs
    ]


@dataclass(frozen=True)
class Case:
    """A network's answer to two photos of 21 x 18, or the traffic of an operator on a shape."""

    what: str
    dtype: str = "float32"
    tf32: bool = False
    photos: str = "contiguous"
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "-".join(
            filter(
                None, (self.what, self.dtype, "tf32" * self.tf32, self.photos, "x".join(map(str, self.shape)))
            )
        )


KINDS = (("float32", False), ("float32", True), ("float16", False), ("bfloat16", False))
CASES = [
    Case("network", *kind, photos) for kind in KINDS for photos in ("contiguous", "channels_last", "uint8")
]
CASES += [Case("network", "float16", photos="float32"), Case("engine", "float16")]
CASES += [Case("by operator", *kind, photos) for kind in KINDS[1:3] for photos in ("contiguous", "uint8")]
CASES += [Case(what, *kind) for what in ("block", "features") for kind in KINDS]
CASES += [Case("projected network", *kind, "uint8") for kind in KINDS]
# N, pixels, Cin, Cout of the one; N, pixels, Cin, Cout, classes of the other.
CASES += [
    Case("pointwise traffic", shape=shape) for shape in ((1, 5, 16, 24), (3, 49, 40, 130), (2, 70, 33, 64))
]
CASES += [
    Case("head traffic", shape=shape)
    for shape in ((1, 1, 16, 24, 3), (5, 49, 40, 130, 10), (6, 70, 33, 64, 90))
]
CASES += [Case("network traffic", *kind, photos) for kind in KINDS[1:3] for photos in ("uint8", "contiguous")]
CASES += [Case("projected network traffic", "float16")]


def _network(case: Case) -> str:
    specs = small_specs()
    layers = tensors(specs)
    dtype = getattr(torch, case.dtype)
    off = dict.fromkeys(("depthwise", "head"), "a reason") if case.what == "by operator" else {}
    plain, project = {op: getattr(eager, op) for op in off}, case.what == "projected network"
    network = Network(
        specs, layers, dtype, CPU, norm=NORM, tf32=case.tf32, plain=plain, off=off, project=project
    )
    photos = torch.randint(0, 256, (2, 3, 21, 18), dtype=torch.uint8)
    seen = photos.double() * NORM[0].double().view(3, 1, 1) + NORM[1].double().view(3, 1, 1)
    if case.photos == "uint8":
        got = network(photos.permute(0, 2, 3, 1))
    else:
        x = seen.to(torch.float32 if case.photos == "float32" else dtype)
        got = network(
            x.contiguous(memory_format=torch.channels_last) if case.photos == "channels_last" else x
        )
    chain = Chain(tuple(Link(spec, bias=True, norm=False) for spec in specs))
    flat = [t for pair in layers for t in pair]

    def answer(kind: torch.dtype) -> Tensor:
        return eager.network(seen.to(kind), [t.to(kind) for t in flat], chain.encode()).double()

    want = answer(torch.float64)
    if got.dtype != torch.float32 or got.shape != want.shape:
        return f"the answer is {got.dtype} {tuple(got.shape)}"
    error, torchs = (got - want).abs().max(), (answer(dtype) - want).abs().max()
    # TF32 keeps as many bits of a factor as float16, and cuts off where that rounds: twice its error.
    torchs = 2 * (answer(torch.float16) - want).abs().max() if case.tf32 else torchs
    return "" if error <= 2 * torchs + 1e-6 else f"off by {error:.3g}, torch by {torchs:.3g}"


def _chain(case: Case) -> str:
    """A block by itself, or a network that ends in its features, of strided inputs; answers of the dtype."""
    pool = case.what == "features"
    specs = small_specs()[:-1] if pool else inverted_residual("", 17, 17, 1, 3)
    layers, dtype = tensors(specs), getattr(torch, case.dtype)
    network = Network(specs, layers, dtype, CPU, tf32=case.tf32, pool=pool, answer=dtype)
    x = torch.randn(2, specs[0].cin, 9, 20)[..., ::2].to(dtype)
    chain = Chain(tuple(Link(spec, bias=True, norm=False) for spec in specs), pool)
    flat = [t for pair in layers for t in pair]

    def answer(kind: torch.dtype, chain: Chain = chain) -> Tensor:
        return eager.network(x.to(kind), [t.to(kind) for t in flat], chain.encode()).double()

    got, want = network(x), answer(torch.float64)
    if got.dtype != dtype or got.shape != want.shape:
        return f"the answer is {got.dtype} {tuple(got.shape)}"
    if got.dim() == 4 and not got.is_contiguous(memory_format=torch.channels_last):
        return f"the answer has the strides {got.stride()}"
    error, torchs = (got - want).abs().max(), (answer(dtype) - want).abs().max()
    if case.tf32:  # as in `_network`; what is cut off has one sign, so that a mean makes it no smaller
        maps = Chain(chain.links)
        torchs = 2 * (answer(torch.float16, maps) - answer(torch.float64, maps)).abs().max()
    return "" if error <= 2 * torchs + 1e-6 else f"off by {error:.3g}, torch by {torchs:.3g}"


def _pointwise_traffic(case: Case) -> str:
    n, pixels, cin, cout = case.shape
    x, weight, bias = torch.randn(n, cin, pixels, 1), torch.randn(cout, cin, 1, 1), torch.randn(cout)
    x = x.contiguous(memory_format=torch.channels_last)
    residual = torch.randn(n, cout, pixels, 1).contiguous(memory_format=torch.channels_last)
    tile = pointwise.choose_tile(CPU, n * pixels, cin, cout, "ieee")
    with triton_interpreter.recorded() as found:
        pointwise.pointwise(x, weight, bias, residual)
    counted = pointwise.traffic(n * pixels, cin, cout, 4, tile, residual=True)
    return "" if found.total == counted else f"counted {counted}, moved {found.total}"


def _head_traffic(case: Case) -> str:
    n, pixels, cin, cout, classes = case.shape
    x = torch.randn(n, cin, pixels, 1).contiguous(memory_format=torch.channels_last)
    w1, w2 = torch.randn(cout, cin, 1, 1), torch.randn(classes, cout)
    with triton_interpreter.recorded() as found:
        head.head(x, w1, torch.randn(cout), w2, torch.randn(classes))
    counted = head.traffic(n, pixels, w1, w2, "ieee")
    return "" if found.total == counted else f"counted {counted}, moved {found.total}"


def _engine(case: Case) -> str:
    """The backend's network, whose graph is the launches themselves, for batches that fit and that do not."""
    specs = small_specs()
    layers = tensors(specs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        patch.setattr(replay, "place", lambda x: 0)
        patch.setattr(replay, "capturing", lambda device: False)
        patch.setattr(replay, "capture", graph)
        network = backend.Network(specs, layers, norm=NORM, dtype="fp16", device=CPU, asked="triton")
        direct = Network(specs, layers, torch.float16, CPU, norm=NORM)
        for n in (0, 1, 3, 4):
            photos = torch.randint(0, 256, (n, 9, 10, 3), dtype=torch.uint8)
            if not torch.equal(network.run(photos), direct(photos)):
                return f"{n} photos: not the answer of the launches"
    return (
        "" if network.weight_bytes == sum(t.numel() * 2 for pair in layers for t in pair) else "weight_bytes"
    )


def _network_traffic(case: Case) -> str:
    """All launches together, on photos of the network's dtype or of bytes."""
    specs, dtype = small_specs(), getattr(torch, case.dtype)
    project = case.what == "projected network traffic"
    network = Network(specs, tensors(specs), dtype, CPU, norm=NORM, tf32=case.tf32, project=project)
    from_bytes = case.photos == "uint8"
    x = torch.zeros(2, 21, 18, 3, dtype=torch.uint8) if from_bytes else torch.zeros(2, 3, 21, 18, dtype=dtype)
    with triton_interpreter.recorded() as moved:
        network(x)
    counted = network.traffic(2, 21, 18, x.element_size())
    return "" if counted == moved.total else f"counted {counted}, the kernels moved {moved.total}"


VERDICTS: dict[str, Callable[[Case], str]] = {
    "network": _network,
    "by operator": _network,
    "block": _chain,
    "features": _chain,
    "pointwise traffic": _pointwise_traffic,
    "head traffic": _head_traffic,
    "network traffic": _network_traffic,
    "projected network": _network,
    "projected network traffic": _network_traffic,
    "engine": _engine,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(case: Case, verdicts: dict[str, str]) -> None:
    assert verdicts[str(case)] == ""


@pytest.fixture(scope="module")
def fused() -> Network:
    specs = arch.network()
    return Network(specs, tensors(specs), torch.float16, CPU, norm=NORM, fuse=True)


def test_at_224_the_network_is_eighteen_launches(fused: Network) -> None:
    """The stem with the first block, sixteen blocks, and the head, whose classifier is another one."""
    plan = fused.plan(224, 224)
    assert plan == [Launch("block", first, 3) for first in range(0, 51, 3)] + [Launch("head", 51, 2)]


def test_other_sizes_go_layer_by_layer(fused: Network) -> None:
    plan = fused.plan(96, 128)
    assert [launch.form for launch in plan] == [spec.kind for spec in fused.specs[:-2]] + ["head"]
    assert [launch.first for launch in plan] == list(range(len(plan)))


def test_a_map_that_fits_in_between_is_one_launch(fused: Network) -> None:
    """At 112 x 112 later blocks have the maps that earlier ones have at 224, and some the same slabs."""
    plan = fused.plan(112, 112)
    assert [launch.form for launch in plan[:3]] == ["stem", "depthwise", "pointwise"]
    assert any(launch.form == "block" for launch in plan)
    assert sum(launch.count for launch in plan) == len(fused.specs)


def blocks(plan: list[Launch]) -> list[int]:
    return [launch.first for launch in plan if launch.form == "block"]


# Width of the network -> first layers of the blocks that one launch does not make at 224 x 224.
TOO_WIDE = {0.35: [], 0.5: [], 0.75: [], 1.0: [], 1.4: [39, 48], 2.0: [30, 33, 36, 39, 42, 45, 48]}


@pytest.mark.parametrize("width", TOO_WIDE)
def test_a_block_that_does_not_fit_on_the_chip_is_made_by_layers(width: float) -> None:
    specs = arch.network(5, width)
    network = Network(specs, tensors(specs), torch.float16, CPU, norm=NORM, fuse=True)
    plan = network.plan(224, 224)
    assert sorted({*range(0, 51, 3)} - {*blocks(plan)}) == TOO_WIDE[width]
    assert [i for launch in plan for i in range(launch.first, launch.first + launch.count)] == [*range(53)]


def test_weights_are_held_in_the_forms_in_use() -> None:
    """The head's from the start, a block's from its first launch on, a layer's where that is its own."""
    specs = arch.network(5, 0.35)
    layers = tensors(specs)
    network = Network(specs, layers, torch.float16, CPU, norm=NORM, fuse=True)
    alone = Network(specs, layers, torch.float16, CPU, norm=NORM)
    of_layers = [2 * (weight.numel() + bias.numel()) for weight, bias in layers]
    assert alone.weight_bytes == sum(of_layers)
    assert network.weight_bytes == sum(of_layers[51:])
    network.traffic(1, 224, 224, 2)
    packed = [network._whole_block(first) for first in range(0, 51, 3)]
    of_blocks = [sum(t.numel() * t.element_size() for t in block.tensors) for block in packed]
    assert network.weight_bytes == sum(of_layers[51:]) + sum(of_blocks)
    assert torch.equal(network._layer(1)[0], alone._layer(1)[0])
    assert network._layer(1)[0].stride() == alone._layer(1)[0].stride()
    assert network.weight_bytes == sum(of_layers[51:]) + sum(of_blocks) + of_layers[1]


def test_weights_are_those_that_were_given() -> None:
    """What the caller writes into his own after that is not seen, however late a block is packed."""
    specs = arch.network(5, 0.35)
    layers = tensors(specs)
    network = Network(specs, layers, torch.float16, CPU, norm=NORM, fuse=True)
    want = layers[3][0].half().flatten(1).T.clone()
    for weight, bias in layers:
        weight.zero_()
        bias.zero_()
    assert torch.equal(network._whole_block(3).expand[: len(want), : want.shape[1]], want)


def test_depthwise_and_projection_are_one_launch_where_asked() -> None:
    """Seventeen pairs of layers, of which the last one is not the head's; off unless asked for."""
    specs = arch.network()
    off, on = (
        Network(specs, tensors(specs), torch.float16, CPU, norm=NORM, project=project)
        for project in (False, True)
    )
    assert {launch.count for launch in off.plan(224, 224)[:-1]} == {1}
    plan = on.plan(224, 224)
    assert [launch.form for launch in plan[:3]] == ["stem", "depthwise_project", "pointwise"]
    assert sum(launch.form == "depthwise_project" for launch in plan) == 17
    assert sum(launch.count for launch in plan) == len(specs)
    assert on.traffic(256, 224, 224, 1) < off.traffic(256, 224, 224, 1)


@pytest.fixture
def by_table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Network]:
    """A network for a GPU whose tile table has "used" in some rows as they are given."""

    def make(specs: Sequence[LayerSpec], dtype: torch.dtype = torch.float16, **rows: int) -> Network:
        table = tiles("", "depthwise_project")
        common = {row: row.rpartition("_")[0] if "x" in row else row for row in rows}
        changed = {row: {**table[common[row]], "used": used} for row, used in rows.items()}
        monkeypatch.setattr(depthwise_project, "tiles", lambda *_: {**table, **changed})
        monkeypatch.setattr(depthwise_project, "device_of", lambda device: ("", 132))
        return Network(specs, tensors(specs), dtype, CPU, norm=NORM, project=None)

    return make


def pairs(plan: list[Launch]) -> list[int]:
    return [launch.first for launch in plan if launch.form == "depthwise_project"]


def test_the_table_says_which_layers_are_one_launch(by_table: Callable[..., Network]) -> None:
    """By channels, arithmetic, and whether large tiles would leave the GPU idle; nowhere by default."""
    specs = arch.network()
    default = by_table(specs)
    assert pairs(default.plan(224, 224, 256)) == []
    layer_by_layer = default.traffic(1024, 224, 224, 1)
    everything = pairs(by_table(specs, large_half=1, small_half=1).plan(224, 224))
    assert len(everything) == 17
    exact = by_table(specs, torch.float32, large_half=1, small_half=1)
    assert pairs(exact.plan(224, 224, 256)) == []
    network = by_table(specs, large_half=1, large_half_144x24=0, small_half_960x320=1)
    (left_out,) = (i for i in everything if (specs[i].cin, specs[i + 1].cout) == (144, 24))
    assert pairs(network.plan(224, 224, 1024)) == [i for i in everything if i != left_out]
    assert pairs(network.plan(224, 224, 1)) == everything[-1:]
    assert network.traffic(1024, 224, 224, 1) < layer_by_layer
    everywhere = Network(specs, tensors(specs), torch.float16, CPU, norm=NORM, project=True)
    network = by_table(specs, large_half=1)
    assert network.traffic(1024, 224, 224, 1) == everywhere.traffic(1024, 224, 224, 1)


def test_an_engine_follows_the_table(by_table: Callable[..., Network]) -> None:
    by_table(arch.network(), large_half_32x16=1)
    specs = arch.network()
    engine = backend.Network(specs, tensors(specs), dtype="fp16", device=CPU, fuse=False, asked="triton")
    assert pairs(engine._network.plan(224, 224, 256)) == [1]


def test_what_is_too_large_for_one_launch_is_two(by_table: Callable[..., Network]) -> None:
    network = by_table(arch.network(), large_half=1, small_half=1)
    assert pairs(network.plan(8, 224))[:2] == [1, 4]
    assert pairs(network.plan(8, 2**22))[:2] == [1, 13]  # 96 channels of 2**21 columns are past 2**27


def test_one_launch_that_does_not_fit_is_two(
    by_table: Callable[..., Network], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with less shared memory than its tile takes: from then on, with the same answer, residuals, too."""
    tried = []

    def fails(*_: object, **__: object) -> Tensor:
        tried.append(True)
        raise OutOfResources(166912, 101376, "shared memory")

    def in_torch(op: str) -> Callable[..., Tensor]:
        def call(*what: object, norm: None = None, tf32: bool = False) -> Tensor:
            return getattr(eager, op)(*what)

        return call

    for op in ("stem", "depthwise"):
        monkeypatch.setattr(f"mnv2_fast.kernels.network.{op}", in_torch(op))
    monkeypatch.setattr(pointwise, "pointwise", in_torch("pointwise"))
    monkeypatch.setattr(head, "head", in_torch("head"))
    network = by_table(small_specs(), torch.float32, large_ieee=1)
    x = torch.randn(2, 3, 21, 18)
    monkeypatch.setattr(depthwise_project, "device_of", lambda device: ("", 1))
    first = len(pairs(network.plan(21, 18, 1)))
    assert first < len(pairs(network.plan(21, 18, 2)))  # for which large tiles make programs enough
    monkeypatch.setattr(depthwise_project, "depthwise_project", fails)
    always = Network(small_specs(), tensors(small_specs()), torch.float32, CPU, project=True)
    with pytest.raises(OutOfResources):
        always(x)
    always.project = False
    tried.clear()
    with caplog.at_level("DEBUG"):
        torch.testing.assert_close(network(x), always(x), rtol=0, atol=0)
    assert len(tried) > first
    assert caplog.text.count("are two launches: out of resource") == len(tried)
    tried.clear()
    torch.testing.assert_close(network(x), always(x), rtol=0, atol=0)
    assert not tried


@pytest.mark.parametrize("item", [1, 2], ids=["bytes", "fp16"])
def test_an_image_moves_few_bytes(fused: Network, item: int) -> None:
    """Of a batch of 256, halo and weights included; layer by layer the activations alone are 27.5 MB."""
    megabytes = fused.traffic(256, 224, 224, item) / 256 / 1e6
    print(f"{megabytes:.2f} MB an image")
    assert megabytes == pytest.approx({1: 6.95, 2: 7.14}[item], abs=0.01)


def test_layer_by_layer_an_image_moves_more() -> None:
    """Halos, and inputs that several programs read, are counted once for each of them; L2 serves those."""
    specs = arch.network()
    network = Network(specs, tensors(specs), torch.float16, CPU, norm=NORM)
    megabytes = network.traffic(256, 224, 224, 1) / 256 / 1e6
    print(f"{megabytes:.2f} MB an image")
    assert megabytes == pytest.approx(41.39, abs=0.01)


def test_what_is_no_network_is_refused() -> None:
    specs = small_specs()
    turned = [*specs[1:], specs[0]]
    with pytest.raises(ValueError, match="a stem comes first and a linear layer last"):
        Network(turned, tensors(turned), torch.float16, CPU)
    with pytest.raises(ValueError, match="mean is of a pointwise layer with ReLU6"):
        Network(specs[:-2], tensors(specs[:-2]), torch.float16, CPU, pool=True)
    added = [*specs[:-1], replace(specs[1], residual=1)]
    with pytest.raises(ValueError, match="only a pointwise layer adds a residual"):
        Network(added, tensors(added), torch.float16, CPU)
    with pytest.raises(ValueError, match="give the network one"):
        Network(specs, tensors(specs), torch.float16, CPU)(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="leave fuse out"):
        Network(specs, tensors(specs), torch.float32, CPU, norm=NORM, fuse=True)


if __name__ == "__main__":
    triton_interpreter.print_verdicts(CASES, lambda case: VERDICTS[case.what](case))
