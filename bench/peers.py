"""PEERS: everyone who runs the network, one row each, every one in its own best configuration.

A row's `make` is called in a process of its own (bench.workers), pinned to as many cores as it has threads,
with its environment set before anything is imported and gradients off. It returns the call to time. A row
whose packages are not installed is named and left out.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Case:
    """One setting: `batch` images, `size` pixels squared, on `threads` threads; `folder` has the ONNX."""

    batch: int
    threads: int
    size: int = 224
    folder: str = ""


Call = Callable[[], object]


@dataclass(frozen=True)
class Peer:
    """One contender. `slow`: at batch 1 only, and not in a quick run; `onnx`: reads the ONNX file."""

    name: str
    needs: tuple[str, ...]
    make: Callable[[Case], Call]
    env: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False
    onnx: bool = False

    def missing(self) -> list[str]:
        """Packages it needs that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def images(case: Case) -> torch.Tensor:
    """The same normalized random images for everyone, [N, 3, H, W] contiguous."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(case.batch, 3, case.size, case.size, generator=generator)


def weights_source() -> str:
    """Which weights everyone runs: real ones where they are found without a download, else seeded ones."""
    from mnv2_fast import weights

    for row in weights.WEIGHTS:
        if weights.find_local(row) is not None:
            return row.name
    return "seeded"


def state_dict() -> dict[str, torch.Tensor]:
    """The tensors of `weights_source()`."""
    import torch

    from mnv2_fast import MobileNetV2, weights

    source = weights_source()
    if source != "seeded":
        return weights.load_state_dict(source)[0]
    torch.manual_seed(0)
    return MobileNetV2().state_dict()


def torchvision_model() -> torch.nn.Module:
    """torchvision's MobileNetV2 in eval mode."""
    from mnv2_fast._torchvision import torchvision

    model: torch.nn.Module = torchvision().models.mobilenet_v2()
    model.load_state_dict(state_dict())
    return model.eval()


def our_model() -> torch.nn.Module:
    """Our MobileNetV2 in eval mode."""
    from mnv2_fast import MobileNetV2

    model = MobileNetV2()
    model.load_state_dict(state_dict())
    return model.eval()


def channels_last(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its weights in channels_last: torch's faster layout for this network."""
    import torch

    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _engine(case: Case) -> Call:
    from mnv2_fast import compile

    engine = compile(our_model(), threads=case.threads)
    x = images(case)
    return lambda: engine(x)


def _automatic(case: Case) -> Call:
    model, x = our_model(), images(case)
    return lambda: model(x)


def _torch_eager(case: Case) -> Call:
    import torch

    model, x = torchvision_model(), images(case)
    model, x = channels_last(model), x.contiguous(memory_format=torch.channels_last)
    return lambda: model(x)


def _torch_compile(case: Case) -> Call:
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = True  # folds batch norm and packs the weights for oneDNN
    x = images(case).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(channels_last(torchvision_model()))
    compiled(x)
    return lambda: compiled(x)


ONNX_FILE = "mobilenet_v2.onnx"
ONNX_INPUT = "input"


def export_onnx(folder: str) -> None:
    """Write the network as ONNX with a dynamic batch, for those that read it."""
    import torch

    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own use of torch
        torch.onnx.export(
            torchvision_model(),
            (images(Case(2, 1)),),
            Path(folder) / ONNX_FILE,
            dynamo=True,
            external_data=False,
            input_names=[ONNX_INPUT],
            dynamic_shapes={"x": {0: batch}},
            verbose=False,
        )


def _onnxruntime(case: Case) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.add_free_dimension_override_by_name("batch", case.batch)
    session = onnxruntime.InferenceSession(
        Path(case.folder) / ONNX_FILE, options, providers=["CPUExecutionProvider"]
    )
    feed = {ONNX_INPUT: images(case).numpy()}
    return lambda: session.run(None, feed)


def _openvino(case: Case) -> Call:
    import openvino

    core = openvino.Core()
    model = core.read_model(Path(case.folder) / ONNX_FILE)
    model.reshape([case.batch, 3, case.size, case.size])
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": case.threads,
            "NUM_STREAMS": 1,
        },
    )
    request = compiled.create_infer_request()
    x = images(case).numpy()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))

    def call(keep: object = x) -> None:  # the request reads x's memory without owning it
        request.infer()

    return call


ENGINE = "mnv2_fast"
AUTOMATIC = "mnv2_fast model(x)"
ENGINE_AVX2 = "mnv2_fast avx2"
ENGINE_SCALAR = "mnv2_fast scalar"
TORCH_COMPILE = "torch.compile"

PEERS: tuple[Peer, ...] = (
    Peer(ENGINE, ("torch",), _engine),
    Peer(AUTOMATIC, ("torch",), _automatic),
    Peer(ENGINE_AVX2, ("torch",), _engine, {"MNV2_FORCE_ISA": "avx2"}),
    Peer(ENGINE_SCALAR, ("torch",), _engine, {"MNV2_FORCE_ISA": "scalar"}, slow=True),
    Peer(
        "ONNX Runtime", ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime"), _onnxruntime, onnx=True
    ),
    Peer("OpenVINO", ("torch", "torchvision", "onnx", "onnxscript", "openvino"), _openvino, onnx=True),
    Peer(TORCH_COMPILE, ("torch", "torchvision"), _torch_compile),
    Peer("torch eager", ("torch", "torchvision"), _torch_eager),
)


def by_name(name: str) -> Peer:
    """The row of that name."""
    for peer in PEERS:
        if peer.name == name:
            return peer
    raise ValueError(f"no contender {name!r}: one of {', '.join(peer.name for peer in PEERS)}")


def environment(peer: Peer) -> dict[str, str]:
    """What its process is started with: this environment, but of our own settings only those of its row."""
    ours = ("MNV2_FORCE_ISA", "MNV2_BACKEND", "MNV2_STRICT")
    return {**{name: value for name, value in os.environ.items() if name not in ours}, **peer.env}


def serve(peer: str, case: dict[str, Any]) -> Callable[[str], Call]:
    """For bench.workers: the contender's one call, whatever the key."""
    call = by_name(peer).make(Case(**case))
    return lambda key: call
