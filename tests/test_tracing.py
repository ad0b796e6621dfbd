"""Export, ONNX, fx and jit get the plain ATen graph, torch.compile one operator that sees later edits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrate
from torch import Tensor, nn

from mnv2_fast import MobileNetV2, _torchvision
from mnv2_fast.nn import ConvBNReLU6, InvertedResidual

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def quiet_dynamo() -> Iterator[None]:
    """One thread, and no graph of another test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> MobileNetV2:
    """A short network, so that graphs are made quickly."""
    setting = [[1, 8, 1, 1], [2, 12, 2, 2], [6, 16, 1, 2]]
    model = calibrate(MobileNetV2(7, 0.5, setting), (48, 40))
    nn.init.normal_(model.classifier[1].weight, 0, 0.1)
    return model


@pytest.fixture
def x() -> Tensor:
    """Two small images."""
    return torch.randn(2, 3, 48, 40)


class Counter:
    """A torch.compile backend that runs the graph as it is and counts graphs and operators of ours."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for the rounding of another order of operations."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(model: MobileNetV2, x: Tensor, strict: bool) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert "mnv2" not in str(program.graph)
    for n in (1, 2, 5):
        images = torch.randn(n, 3, 48, 40)
        close(program.module()(images), model(images))


def test_export_of_the_whole_network() -> None:
    model, x = MobileNetV2(width_mult=0.35).eval(), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert "mnv2" not in str(program.graph)
    assert len(program.state_dict) == 314
    close(program.module()(x[:1]), model(x[:1]))


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
def test_onnx(model: MobileNetV2, x: Tensor, tmp_path: Path) -> None:
    import onnxruntime

    path = str(tmp_path / "m.onnx")
    torch.onnx.export(model, (x,), path, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    for n in (1, 3):
        images = torch.randn(n, 3, 48, 40)
        (y,) = session.run(None, {name: images.numpy()})
        close(torch.from_numpy(y), model(images))


def test_fx(model: MobileNetV2, x: Tensor) -> None:
    graph = torch.fx.symbolic_trace(model)
    assert any(node.target == "features.0.0" for node in graph.graph.nodes)
    close(graph(x), model(x))


def test_feature_extractor() -> None:
    if not _torchvision.installed():
        pytest.skip("torchvision is not installed: pip install torchvision")
    tv = _torchvision.torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    ours, theirs = MobileNetV2(width_mult=0.35).eval(), tv.models.mobilenet_v2(width_mult=0.35).eval()
    theirs.load_state_dict(ours.state_dict())
    nodes = ["features.3.conv.1", "features.6.add", "features.18", "flatten"]
    x = torch.randn(1, 3, 64, 64)
    found, expected = (create_feature_extractor(m, nodes)(x) for m in (ours, theirs))
    for node in nodes:
        close(found[node], expected[node])


def test_jit_trace_and_script(model: MobileNetV2, x: Tensor, tmp_path: Path) -> None:
    for graph in (torch.jit.trace(model, x), torch.jit.script(model)):
        assert "mnv2::" not in str(graph.inlined_graph)
        graph.save(tmp_path / "m.pt")
        loaded = torch.jit.load(tmp_path / "m.pt")
        close(loaded(x), model(x))
        close(loaded(x[:1]), model(x[:1]))


def test_script_of_modules(x: Tensor) -> None:
    for module in (ConvBNReLU6(3, 8).eval(), InvertedResidual(3, 3, 1, 2).eval()):
        close(torch.jit.script(module)(x), module(x))


@pytest.mark.parametrize("backend", ["counter", "inductor"])
def test_compile_sees_edits(model: MobileNetV2, x: Tensor, backend: str) -> None:
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter if backend == "counter" else backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, fused=True)

    def step() -> None:
        model.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    def train_forward() -> None:
        model.train()
        model(x)
        model.eval()

    edits = (
        lambda: model.features[0][0].weight.mul_(1.5),
        lambda: model.features[0][0].weight.data.mul_(1.5),
        lambda: setattr(model.classifier[1].weight, "data", model.classifier[1].weight.data * 2),
        train_forward,
        lambda: model.load_state_dict(
            {k: v * 1.1 if "features.2" in k else v for k, v in model.state_dict().items()}
        ),
    )
    with torch.no_grad():
        before = compiled(x)
        close(before, model(x))
        for edit in edits:
            edit()
            after = compiled(x)
            close(after, model(x))
            assert not torch.allclose(after, before, rtol=1e-4, atol=1e-4)
            before = after
    step()
    with torch.no_grad():
        close(compiled(x), model(x))
    if backend == "counter":
        assert all("mnv2.network" in graph[0] for graph in counter.graphs)
        assert len(counter.graphs) == 1


@torch._dynamo.config.patch(recompile_limit=64)
def test_compile_sees_settings_and_modules(model: MobileNetV2, x: Tensor) -> None:
    compiled = torch.compile(model, fullgraph=True, backend=Counter())
    with torch.no_grad():
        for edit in (
            lambda: None,
            lambda: setattr(model.features[0][1], "eps", 0.5),
            lambda: setattr(model.features[0][1], "eps", 0.25),
            lambda: setattr(model.features[2].conv[1][0], "stride", (1, 1)),
            lambda: setattr(model.features[2].conv[1][0], "padding_mode", "reflect"),
            lambda: setattr(model.features[2].conv[1][0], "padding_mode", "zeros"),
            lambda: setattr(model.features[0][2], "max_val", 0.5),
            lambda: setattr(model.features[0][2], "max_val", 6.0),
            lambda: setattr(model.features[0][2], "min_val", 0.25),
            lambda: setattr(model.features[0][2], "min_val", 0.0),
            lambda: model.features[0].append(nn.Tanh()),
            lambda: model.features[0].__delitem__(-1),
            lambda: model.features.insert(2, InvertedResidual(8, 8, 1, 2).eval()),
            lambda: setattr(model.features[2], "use_res_connect", False),
            lambda: setattr(model, "backend", "eager"),
            lambda: setattr(model, "backend", "auto"),
            lambda: model.classifier.__setitem__(1, nn.Linear(1280, 3)),
            lambda: setattr(model, "classifier", nn.Linear(1280, 2)),
        ):
            edit()
            close(compiled(x), model(x))


def test_compile_with_gradients(model: MobileNetV2, x: Tensor) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, model):
        model.zero_grad()
        images = x.clone().requires_grad_()
        function(images).square().sum().backward()
        found.append([images.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_compile_with_a_dynamic_batch(model: MobileNetV2) -> None:
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for n, h in ((2, 48), (3, 33), (5, 64)):
            images = torch.randn(n, 3, h, 40)
            close(compiled(images), model(images))
    assert len(counter.graphs) == 1


def test_compile_in_train_mode_and_other_dtypes(model: MobileNetV2, x: Tensor) -> None:
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert compiled(x).dtype == torch.bfloat16
    model.double()
    with torch.no_grad():
        assert compiled(x.double()).dtype == torch.float64
    model.float().train()
    assert compiled(x).requires_grad
    assert not any("mnv2" in target for graph in counter.graphs for target in graph)


def test_compile_of_modules(x: Tensor) -> None:
    module = nn.Sequential(ConvBNReLU6(3, 8, stride=2), InvertedResidual(8, 8, 1, 2)).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(x), module(x))


def test_compiled_calls_share_one_pack(model: MobileNetV2, x: Tensor) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        kept = model._holder.compiled
        assert kept is not None
        compiled(x)
        assert model._holder.compiled is kept


def test_fake_tensors(model: MobileNetV2) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(4, 3, 32, 32)).shape == (4, 7)
