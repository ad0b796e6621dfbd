"""Modules in eval mode on a GPU, as far as they go without one: `gpu_stand_in` takes the CPU for it."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from gpu_stand_in import NO_TRAINING, StandIn
from helpers import SMALL, TOLERANCE, changed, check, eager, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import mnv2_fast.nn
from mnv2_fast import MobileNetV2, UserError, arch, info, ops, packs, reading, training, training_head
from mnv2_fast.backends import chains, replay
from mnv2_fast.backends import triton as backend
from mnv2_fast.nn import ConvBNReLU6, InvertedResidual

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(autouse=True)
def gpu(one_thread: None, model: MobileNetV2, monkeypatch: pytest.MonkeyPatch) -> StandIn:  # noqa: F811
    """After `model`, which is calibrated in train mode."""
    return StandIn(monkeypatch)


@pytest.mark.parametrize("grad", [False, True])
def test_serves_by_itself_as_graphs(model: MobileNetV2, x: Tensor, gpu: StandIn, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        check(model, x)
        y = model(torch.cat((x, 2 * x[:1])))
        assert y.requires_grad == grad
    assert gpu.captured.sizes == [2, 4]
    kinds = {"stem", "depthwise", "pointwise", "head"}
    assert set(gpu.launches) == {name + ":tf32" * (name != "depthwise") for name in kinds}


@pytest.mark.parametrize("n", [0, 1, 3, 33])
def test_any_batch_and_layout(model: MobileNetV2, n: int) -> None:
    x = torch.randn(n, 3, 33, 34)
    wide = torch.randn(n, 4, 33, 68)
    for images in (x, x.contiguous(memory_format=torch.channels_last), wide[:, 1:, :, ::2]):
        assert check(model, images).shape == (n, 7)


def near(model: MobileNetV2, x: Tensor, dtype: torch.dtype) -> None:
    """Served, in the dtype that torch answers in, and at most 1.5 times as far from float64 as torch."""
    assert model.why_not(x) is None, model.why_not(x)
    x = torch.cat([x * scale for scale in torch.linspace(0.5, 2, 3).to(x.dtype)])
    with torch.autocast("cpu", enabled=False):
        exact = copy.deepcopy(model).double()._forward_impl(x.double())
    ours, torchs = model(x), eager(model, x)
    assert ours.dtype == torchs.dtype == model._plan(x).pack._network.run(x).dtype == dtype
    assert (ours - exact).norm() <= 1.5 * (torchs - exact).norm() + 1e-5 * exact.norm()


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("what is another device's was called")


HALVES = (torch.float16, torch.bfloat16)
# Of the parameters, and autocast's. (On a CPU torch itself refuses autocast to the other half type.)
HELD_AND_CAST = [(held, None) for held in (torch.float32, *HALVES)]
HELD_AND_CAST += [(held, cast) for cast in HALVES for held in (torch.float32, cast)]


@pytest.mark.parametrize(("held", "cast"), HELD_AND_CAST, ids=str)
def test_dtypes_are_torchs(
    model: MobileNetV2, x: Tensor, held: torch.dtype, cast: torch.dtype | None
) -> None:
    model.to(held)
    with torch.no_grad():
        for images in (x.to(held), x) if cast else (x.to(held),):
            with torch.autocast("cpu", cast, enabled=cast is not None):
                near(model, images, cast or held)
        if held is not torch.float32:
            assert f"the input is torch.float32, the weights are {held}" in str(model.why_not(x))


def test_other_dtypes_are_torchs_business(model: MobileNetV2, x: Tensor) -> None:
    model.double()
    assert "float64" in str(model.why_not(x.double()))
    assert model(x.double()).dtype == torch.float64
    model.float().features[3].half()
    assert "several dtypes" in str(model.why_not(x))


def test_a_classifier_of_ones_own_follows_the_features(model: MobileNetV2, x: Tensor, gpu: StandIn) -> None:
    model.classifier = nn.Sequential(nn.Linear(1280, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    assert check(model, x).shape == (2, 3)
    assert "features:tf32" in gpu.launches
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        near(model, x, torch.float16)


def test_frozen_features_before_a_classifier_that_trains(
    model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.features.requires_grad_(False)
    model.train()
    model.features.eval()
    made = []
    pack = packs.Pack.__init__
    monkeypatch.setattr(packs.Pack, "__init__", lambda *a, **k: (made.append(1), pack(*a, **k))[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert model.classifier[1].weight.grad is not None
        optimizer.step()
    assert len(made) == 1


@pytest.mark.parametrize("precision", ["tf32", "none", "ieee"])
def test_float32_is_multiplied_as_torchs_convolutions_are(
    model: MobileNetV2, x: Tensor, gpu: StandIn, precision: str
) -> None:
    check(model, x)
    gpu.launches.clear()
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = precision
    try:
        check(model, x)
    finally:
        conv.fp32_precision = before
    assert ("pointwise:tf32" in gpu.launches) == (precision == "tf32")
    assert ("pointwise" in gpu.launches) == (precision != "tf32")


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "pointwise": lambda: ConvBNReLU6(8, 17, kernel_size=1),
    "depthwise": lambda: ConvBNReLU6(8, 8, stride=2, groups=8),
    "linear pointwise with a bias": lambda: ConvBNReLU6(8, 5, 1, activation_layer=None, bias=True),
    "residual": lambda: InvertedResidual(8, 8, 1, 6),
    "residual of no expansion": lambda: InvertedResidual(8, 8, 1, 1),
    "stride 2": lambda: InvertedResidual(8, 12, 2, 6),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_single_modules_are_launches_without_a_graph(name: str, gpu: StandIn) -> None:
    block = BLOCKS[name]()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.normal_(norm.weight, 1, 0.2)
    block.eval()
    x = torch.randn(3, 8, 9, 10)
    for images in (x, x.contiguous(memory_format=torch.channels_last), x[..., ::2], x[:0]):
        assert block.why_not(images) is None, block.why_not(images)
        with torch.no_grad():
            y = block(images)
            torch.testing.assert_close(y, block._run_eager(images), **TOLERANCE)
        layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else None
        assert y.is_contiguous(memory_format=layout or torch.contiguous_format)
    assert gpu.launches
    assert not gpu.captured.sizes


def test_a_residual_that_autocast_would_widen_is_torchs() -> None:
    block, x = InvertedResidual(8, 8, 1, 6).eval(), torch.randn(1, 8, 5, 5)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert block.why_not(x) == "autocast adds a float32 input to a float16 answer"
        assert block(x).dtype == torch.float32
        assert block.why_not(x.half()) is None
        assert block(x.half()).dtype == torch.float16


def test_features_that_end_without_relu6_are_torchs(model: MobileNetV2, x: Tensor) -> None:
    model.features[18] = ConvBNReLU6(112, 1280, kernel_size=1, activation_layer=None).eval()
    assert "mean is of a pointwise layer with ReLU6" in str(model.why_not(x))
    check(model, x, served=False)


def test_whatever_torch_records_is_seen(model: MobileNetV2, x: Tensor) -> None:
    weight, norm = model.classifier[1].weight, model.features[0][1]

    def train() -> None:
        model.train()(x)
        model.eval()

    def fused_step() -> None:
        optimizer = torch.optim.SGD([weight], 0.5, fused=True)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        weight.grad = None

    other = {k: v * 1.5 if k.startswith("features.0.0") else v.clone() for k, v in model.state_dict().items()}
    third = {k: v * 1.5 if k.startswith("classifier") else v.clone() for k, v in other.items()}
    with torch.no_grad():
        changed(model, x, lambda: weight[0, 1:9].add_(5))
        changed(model, x, lambda: norm.running_var.mul_(4))
        changed(model, x, lambda: setattr(norm, "running_mean", norm.running_mean + 0.5))
        changed(model, x, lambda: setattr(weight, "data", weight.data * 2))
        changed(model, x, fused_step)
        changed(model, x, train)
        changed(model, x, lambda: model.load_state_dict(other))
        changed(model, x, lambda: model.load_state_dict(third, assign=True))
        changed(model, x, lambda: setattr(model.features[3], "use_res_connect", False))


def test_a_write_through_data_is_seen_after_refresh(model: MobileNetV2, x: Tensor) -> None:
    """Of every element: no value is looked at, since that would wait for a GPU."""
    before = check(model, x)
    model.classifier[1].weight.data.mul_(2)
    assert torch.equal(model(x), before)
    model.refresh()
    assert not torch.equal(check(model, x), before)
    assert not packs._sample_addresses([model.classifier[1].weight])


def test_weights_of_inference_mode_are_torchs(x: Tensor) -> None:
    """They have no version, and no value is looked at."""
    with torch.inference_mode():
        model = MobileNetV2(**SMALL).eval()
        assert model.why_not(x) == chains.UNSEEN
        model(x)
        model.classifier[1].weight.add_(1)
        check(model, x, served=False)
        counter = model.features[0][1].num_batches_tracked.clone()
    model = MobileNetV2(**SMALL).eval()
    check(model, x)
    model.features[0][1].num_batches_tracked = counter  # which alone tells of a batch norm's moves
    assert model.why_not(x) == chains.UNSEEN


def test_functional_call(model: MobileNetV2, x: Tensor) -> None:
    for i in range(3):
        weights = {name: p.detach() * (1 + 0.02 * i) for name, p in model.named_parameters()}
        y = torch.func.functional_call(model, weights, (x,))
        model.backend = "eager"
        torch.testing.assert_close(y, torch.func.functional_call(model, weights, (x,)), **TOLERANCE)
        model.backend = "auto"
        del weights


def test_what_the_kernels_would_hide_from_declines(model: MobileNetV2, x: Tensor) -> None:
    calls: list[object] = []
    handle = model.features[3].register_forward_hook(lambda *args: calls.append(args))
    assert model.why_not(x) == "features.3 has a hook"
    check(model, x, served=False)
    assert calls
    handle.remove()
    model.features[3].conv[0][1].train()
    assert "train mode" in str(model.why_not(x))
    model.eval()
    torch.func.vmap(lambda image: model(image[None]))(x)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 1e6
    parametrizations.weight_norm(model.features[3].conv[0][0])
    check(model, x, served=False)
    assert "ParametrizedConv2d" in str(model.why_not(x))


def test_launches_without_a_graph_record_nothing_for_backward(model: MobileNetV2) -> None:
    block = model.features[3]
    x = torch.randn(2, block.conv[0][0].in_channels, 9, 10, requires_grad=True)
    assert not block._plan(x).pack._network.run(x).requires_grad


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
def test_gradients_are_plain_torchs(
    model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch, cast: torch.dtype | None
) -> None:
    monkeypatch.setattr(training, "run", never)
    found = []
    for name in ("auto", "eager"):
        model.backend = name
        model.zero_grad()
        images = x.clone().requires_grad_()
        with torch.autocast("cpu", cast, enabled=cast is not None):
            y = model(images)
        assert y.dtype == (cast or torch.float32)
        (y * torch.linspace(-1, 1, 7)).sum().backward()  # the same gradient of y on both
        found.append([images.grad, *(p.grad for p in model.parameters())])
    for ours, torchs in zip(*found, strict=True):
        assert torch.equal(ours, torchs)
    model.backend = "auto"
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.autograd.grad(model(x).sum(), list(model.parameters()), create_graph=True)


def test_training_is_torchs_and_says_so(
    model: MobileNetV2, x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_head, "run", never)
    model.train()
    assert model.why_not(x) == NO_TRAINING
    model(x).sum().backward()
    assert model.features[0][0].weight.grad is not None
    assert not gpu.launches
    monkeypatch.setenv("MNV2_STRICT", "1")
    with pytest.raises(UserError, match=f"no kernel serves ConvBNReLU6: {NO_TRAINING}"):
        model(x)


def test_off_until_proven(
    model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch, gpu: StandIn
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    assert str(model.why_not(x)).startswith("the network kernel has not run on a GPU yet: set MNV2_BACKEND=")
    model(x)
    assert not gpu.launches
    monkeypatch.setenv("MNV2_STRICT", "1")
    with pytest.raises(UserError, match="no kernel serves MobileNetV2: the network kernel has not run"):
        model(x)
    model.backend = "triton"  # the model's own wish is as good as the variable
    check(model, x)
    assert gpu.launches
    model.backend = "cpu"
    assert model.why_not(x) == "the cpu backend was asked for"
    model.backend = "auto"
    monkeypatch.setattr(backend, "PROVEN", frozenset({"network", *backend.OPERATORS}))
    assert model.why_not(x) is None


def test_an_operator_that_is_off_runs_in_torch_among_the_others(
    model: MobileNetV2,
    x: Tensor,
    gpu: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    monkeypatch.setattr(backend, "PROVEN", frozenset({"network", "stem", "pointwise", "head"}))
    with caplog.at_level(logging.DEBUG, "mnv2_fast"):
        check(model, x)
    assert "a depthwise layer runs in plain torch: the depthwise kernel has not run on a GPU" in caplog.text
    assert {name.partition(":")[0] for name in gpu.launches} == {"stem", "pointwise", "head"}
    assert gpu.captured.sizes == [2]
    monkeypatch.setenv("MNV2_STRICT", "1")
    with pytest.raises(UserError, match="no kernel serves MobileNetV2: the depthwise kernel has not run"):
        model(x)
    monkeypatch.setattr(backend, "PROVEN", frozenset({"network", *backend.OPERATORS}))
    model.refresh()
    model(x)


@pytest.mark.parametrize("op", backend.OPERATORS)
def test_each_operator_may_be_the_one_that_is_off(
    model: MobileNetV2, x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    monkeypatch.setattr(backend, "PROVEN", frozenset({"network", *backend.OPERATORS} - {op}))
    for head in (model.classifier, nn.Linear(1280, 5).eval()):
        model.classifier = head
        check(model, x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        near(model, x, torch.bfloat16)
    launched = {name.partition(":")[0] for name in gpu.launches}
    assert launched == {"stem", "depthwise", "pointwise", "head", "features"} - {
        op,
        "features" if op == "head" else op,
    }


def test_a_row_too_long_for_its_kernel_runs_in_torch(
    model: MobileNetV2, x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mnv2_fast.kernels import depthwise

    check(model, x)
    model.refresh()
    count = gpu.launches.count("depthwise")
    gpu.launches.clear()
    monkeypatch.setattr(depthwise, "ROW_LIMIT", 900)  # the first blocks have longer ones
    check(model, x)
    assert 0 < gpu.launches.count("depthwise") < count
    monkeypatch.setenv("MNV2_STRICT", "1")
    model.refresh()
    with pytest.raises(UserError, match="MNV2_STRICT=1, and a depthwise layer would run in plain torch"):
        model(x)


def test_a_kernel_that_does_not_fit_on_the_gpu_gives_way_to_torch(
    model: MobileNetV2, x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with less shared memory than its tiles take."""
    from mnv2_fast.kernels import network
    from triton.runtime.errors import OutOfResources

    tried = []

    def too_large(*args: object, **kwargs: object) -> None:
        tried.append(True)
        raise OutOfResources(166912, 101376, "shared memory")

    monkeypatch.setattr(network, "depthwise", too_large)
    check(model, x)
    assert len(tried) == 1  # of all layers, and of all calls
    assert list(model._plan(x).pack.in_torch) == ["depthwise"]
    assert "pointwise:tf32" in gpu.launches
    monkeypatch.setenv("MNV2_STRICT", "1")
    with pytest.raises(
        UserError, match="the depthwise kernel does not run on this GPU: out of resource: sha"
    ):
        model(x)
    model.refresh()
    with pytest.raises(
        UserError, match="MNV2_STRICT=1, and a depthwise layer would run in plain torch: the d"
    ):
        model(x)
    with pytest.raises(OutOfResources):  # where nothing can take its place
        network.Network(list(arch.network()), _zeros(), torch.float32, x.device)(x)


def _zeros() -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(spec.weight_shape), torch.zeros(spec.cout)) for spec in arch.network()]


def test_in_a_capture_of_the_callers(model: MobileNetV2, x: Tensor, gpu: StandIn) -> None:
    """No pack is made in it, since weights go by way of the host; one that is there is launched, for batches
    that it has served.
    """
    gpu.captured.capturing = True
    assert "call the model once before" in str(model.why_not(x))
    check(model, x, served=False)
    gpu.captured.capturing = False
    model(x)
    gpu.captured.sizes.clear()
    gpu.captured.capturing = True
    check(model, x)
    with pytest.raises(RuntimeError, match=r"call once with 4 images of \[3, 48, 40\] before the capture"):
        model(torch.cat((x, x)))
    assert not gpu.captured.sizes


def test_a_lack_of_memory_is_torchs_error_in_one_line(
    model: MobileNetV2, x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(x)

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(replay, "capture", full)
        for kind in (torch.OutOfMemoryError, MemoryError):
            with pytest.raises(
                kind, match=r"4 images of \[3, 48, 40\] need more memory than the GPU has: use"
            ):
                model(torch.cat((x, x)))
    check(model, torch.cat((x, x)))


def test_tensors_in_other_places(model: MobileNetV2, x: Tensor) -> None:
    elsewhere = x.to("meta")
    check(model, x)
    assert model.why_not(elsewhere) == "the input is on meta, the kernels are on cpu and cuda"
    with pytest.raises(
        ValueError, match=r"the input is on meta, the model on cpu: move one of them with .to"
    ):
        model(elsewhere)
    model.features[3].to("meta")
    assert "holds torch.float32 on meta, the kernels take" in str(model.why_not(x))
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(x)


@pytest.mark.parametrize("packed", [False, True])
def test_another_device_with_kernels_of_the_same_kind(
    model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """As a second GPU is: its calls would find the pack of the first one."""
    monkeypatch.setitem(chains.KERNELS, "meta", chains.KERNELS["cpu"])
    for module in (reading, mnv2_fast.nn):  # there is no autocast for meta
        monkeypatch.setattr(module, "autocast_dtype", lambda device: None)
    if packed:
        model(x)
    elsewhere = x.to("meta")
    assert model.why_not(elsewhere) == "the input is on meta, the weights are on cpu"
    with pytest.raises(ValueError, match="the input is on meta, the model on cpu"):
        model(elsewhere)
    model.features[3].to("meta")
    assert model.why_not(x) == "tensors are on several devices: cpu, meta"


def test_the_device_of_the_tensors_is_the_current_one_within(
    model: MobileNetV2, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream, a capture and a launch are otherwise those of the caller's device."""
    current: list[Tensor] = []

    class DeviceOf:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __enter__(self) -> None:
            current.append(self.x)

        def __exit__(self, *_: object) -> None:
            current.pop()

    def capturing(device: torch.device) -> bool:
        assert device == x.device
        assert any(t is x for t in current)
        return False

    model(x)
    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(replay, "capturing", capturing)
    with torch.no_grad():
        model(x)


def test_packs_of_what_a_model_was_go(model: MobileNetV2, x: Tensor) -> None:
    """With their graphs, which hold a GPU's memory."""
    model(x)
    pack = weakref.ref(model._plan(x).pack)
    gc.collect()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
        assert pack() is not None
        model.classifier[1].weight.mul_(2)
        model(x)
    assert pack() is None


def test_threads_share_a_pack(model: MobileNetV2, x: Tensor, gpu: StandIn) -> None:
    with torch.no_grad():
        want = [model(x * k) for k in range(4)]
    wrong = []

    def work(k: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(x * k), want[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert gpu.captured.sizes == [2]


def test_the_operator_of_a_network(x: Tensor, gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    op = next(op for op in ops.OPS if op.name == "network")
    args = next(iter(op.samples((8,), (8,), (2,))))
    assert ops.network_declines(*args) is None
    torch.testing.assert_close(
        torch.ops.mnv2.network(*args), op.reference(*args).float(), rtol=1e-4, atol=1e-4
    )
    assert gpu.launches
    assert "the input is torch.float16" in str(ops.network_declines(args[0].half(), *args[1:]))
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    assert "has not run on a GPU yet" in str(ops.network_declines(*args))


def test_info_tells_what_serves(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    network = next(op for op in ops.OPS if op.name == "network")
    assert info._backend(network, "cpu") == "triton"
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    assert info._backend(network, "cpu").startswith("eager (the network kernel has not run on a GPU yet: set")
    monkeypatch.setenv("MNV2_BACKEND", "cpu")
    assert "MNV2_BACKEND=cpu has no kernels on cpu: unset it, or set it to triton" in info._backend(
        network, "cpu"
    )
