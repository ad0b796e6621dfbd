"""Modules in train mode as on a GPU: in Triton's interpreter, with CPU tensors in the GPU's place."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
import triton_interpreter
from gpu_stand_in import graph, launch_in_torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from mnv2_fast.kernels import norm as norm_kernels
from mnv2_fast.kernels import (
    parts,
    train_depthwise,
    train_pointwise,
    train_pointwise_gradient,
    train_stem,
)

from mnv2_fast import MobileNetV2, training
from mnv2_fast.autograd import TWICE
from mnv2_fast.backends import chains, replay, triton, triton_train
from mnv2_fast.errors import UserError
from mnv2_fast.nn import ConvBNReLU6, InvertedResidual, eager_only
from mnv2_fast.reading import Declined

IMAGES = (2, 3, 11, 8)
# Of a tile of the depthwise kernels, and of a kernel that adds up parts.
ONE_OUTPUT, PARTS_AT_ONCE = {"rows": 1, "cols": 1}, 4
PIXELS = (2, 8, 3, 4)
BLOCKS = [[1, 8, 1, 1], [6, 8, 2, 2]]


def stand_in() -> None:
    """Have tensors on the CPU go the way of CUDA tensors, whose training kernels are interpreted.

    A module that declines in silence, which torch would serve as well, fails its scene: `lenient` lets it.
    """
    os.environ |= {"MNV2_BACKEND": "triton", "MNV2_STRICT": "1"}
    triton._device_reason = lambda device: None
    row = dataclasses.replace(chains.KERNELS["cuda"], unavailable=lambda: "")
    chains.KERNELS["cpu"] = row  # type: ignore[index]
    training._kernels = lambda x: triton_train
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    triton_train.empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    replay.capturing = lambda device: False
    replay.place = lambda x: 0
    replay.capture = graph
    launch_in_torch(pytest.MonkeyPatch(), [])
    # The interpreter takes time by the rows and columns of a tile, filled or not: so all scenes take half.
    # tests/test_triton_training.py has the tables' own tiles.
    tables = train_depthwise.tiles
    train_depthwise.tiles = lambda name, kernel: {  # type: ignore[assignment]
        row: {**tile, "rows": 3, "cols": 1} for row, tile in tables(name, kernel).items()
    }


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Within it a call that no kernel serves is torch's and no error."""
    os.environ["MNV2_STRICT"] = "0"
    try:
        yield
    finally:
        os.environ["MNV2_STRICT"] = "1"


def model(setting: list[list[int]] = BLOCKS) -> MobileNetV2:
    torch.manual_seed(0)
    made = MobileNetV2(5, inverted_residual_setting=setting, width_mult=0.5, round_nearest=4, dropout=0.0)
    # The last layer's 1280 channels would take half of the time.
    made.features[-1] = ConvBNReLU6(made.features[-1][0].in_channels, 24, 1)
    made.classifier[1] = nn.Linear(24, 5)
    return spread(made)


def block() -> InvertedResidual:
    torch.manual_seed(0)
    return spread(InvertedResidual(8, 8, 1, 2)).train()


Module = TypeVar("Module", bound=nn.Module)


def spread(of: Module) -> Module:
    """A module whose norms have other weights, biases and running statistics for each channel."""
    for norm in norms(of):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 1, 0.3)
        nn.init.normal_(norm.running_mean, 0, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return of


def norms(of: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in of.modules() if isinstance(module, nn.BatchNorm2d)]


def distance(ours: Tensor, right: Tensor, least: float = 0) -> float:
    """How far ours is off, beside the right one's size or the least one that matters."""
    return float((ours.detach().double() - right.detach()).norm() / max(float(right.norm()), least))


def step(of: nn.Module, x: Tensor, cast: torch.dtype | None = None) -> Tensor:
    of.zero_grad()
    with torch.autocast("cpu", cast, enabled=cast is not None):
        y = of(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y.double() * weights).sum().backward()
    return y


def compare(ours: nn.Module, x: Tensor, bound: float, cast: torch.dtype | None = None) -> str:
    """What is wrong with a step of ours beside the same network's in float64 and plain torch."""
    twin, wide = copy.deepcopy(ours).double(), x.detach().double().requires_grad_(x.requires_grad)
    y = step(ours, x, cast)
    with eager_only():
        right = step(twin, wide)
    off = {"answer": distance(y, right)}
    if x.grad is not None and wide.grad is not None:
        off["the input"] = distance(x.grad, wide.grad)
    elif x.requires_grad:
        return "the input has no gradient"
    # Some are zero but for rounding: a bias before a convolution that batch norm follows.
    least = 1e-2 * max((float(q.grad.norm()) for q in twin.parameters() if q.grad is not None), default=0)
    for (name, p), q in zip(ours.named_parameters(), twin.parameters(), strict=True):
        if (p.grad is None) != (q.grad is None):
            return f"{name} has a gradient, or should"
        if p.grad is not None and q.grad is not None:
            off[name] = distance(p.grad, q.grad, least)
    for (name, b), c in zip(ours.named_buffers(), twin.buffers(), strict=True):
        off[name] = distance(b, c.double(), 1e-2)
    return ", ".join(f"{name} is off by {value:.2g}" for name, value in off.items() if not value <= bound)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """How many layers each node of the training kernels has that is made within."""
    run, nodes = training.run, []

    def noted(x: Tensor, layers: list, tensors: list, residual: bool = False) -> Tensor:
        nodes.append(len(layers))
        return run(x, layers, tensors, residual)

    training.run = noted
    try:
        yield nodes
    finally:
        training.run = run


def a_step_is_torchs() -> str:
    ours = model().train()
    x = torch.randn(IMAGES)
    with counted() as nodes:
        wrong = ours.why_not(x) or compare(ours, x, 1e-5)
    # Stem, block and block of stride 2 are one node, the residual block and the last layer one each.
    return wrong or ("" if nodes == [6, 3, 1] else f"nodes of {nodes} layers")


def batches_are_counted_in_one_launch_a_node() -> str:
    ours, add, launches = model().train(), torch._foreach_add_, []

    def noted(counters: list[Tensor], times: list[int]) -> None:
        launches.append(len({counter.data_ptr() for counter in counters}))
        add(counters, times)

    torch._foreach_add_ = noted  # type: ignore[assignment]
    try:
        with torch.no_grad():  # each element of features is a node
            ours(torch.randn(IMAGES))
    finally:
        torch._foreach_add_ = add
    return "" if launches == [1, 2, 3, 3, 1] else f"launches for {launches} counters"


def a_shared_block() -> str:
    """Twice in one node: its norms are moved, and its batches counted, twice."""
    ours = model([[1, 8, 1, 1], [2, 8, 1, 2], [2, 8, 1, 2]]).train()
    ours.features[3] = ours.features[2]
    ours.features[2].conv[0][1].momentum = None
    x = torch.randn(4, 3, 9, 8)
    with counted() as nodes:
        wrong = compare(ours, x, 1e-5)
    return wrong or ("" if nodes == [10] else f"nodes of {nodes} layers")


def batches_are_counted_as_far_as_torch_gets() -> str:
    """One value a channel, in the second of three blocks."""
    ours = model().train()
    ours.features[2].conv[0][1].momentum = None
    twin = copy.deepcopy(ours)
    x = torch.randn(1, 3, 4, 4)
    for of, context in ((ours, contextlib.nullcontext()), (twin, eager_only())):
        try:
            with context:
                of(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                return str(error)
        else:
            return "no error"
    wrong = [
        f"{name} is {a}, not {b}"
        for (name, a), b in zip(ours.named_buffers(), twin.buffers(), strict=True)
        if distance(a, b.double(), 1e-2) > 1e-5
    ]
    counts = [int(b) for name, b in ours.named_buffers() if name.endswith("tracked")]
    return "; ".join(wrong) or ("" if counts == [1] * 5 + [0] * 5 else f"counted {counts}")


def sliced_images() -> str:
    n, c, h, w = IMAGES
    return compare(model().train(), torch.randn(n, c, h, 2 * w)[..., ::2], 1e-5)


def a_block_that_declines_is_an_error() -> str:
    ours, x = block(), torch.randn(PIXELS)
    ours.conv[2].bias = nn.Parameter(torch.zeros(8))
    with lenient():
        if wrong := compare(ours, x, 1e-5):
            return wrong
    try:
        ours(x)
    except UserError as error:
        return "" if "conv.2 has a bias" in str(error) else str(error)
    return "no error"


def a_hook_is_called() -> str:
    ours, seen = model().train(), []
    ours.features[1].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    with counted() as nodes:
        wrong = compare(ours, torch.randn(IMAGES), 1e-5)
    if len(seen) != 2:  # by ours and by the twin, which has it, too
        return f"called {len(seen)} times"
    return wrong or ("" if nodes == [1, 2, 3, 3, 1] else f"nodes of {nodes} layers")


def why_features_are_not_joined_is_remembered() -> str:
    """Until it changes: a network is not read anew at every step for the hook that it has."""
    ours, x = model().train(), torch.randn(IMAGES)
    read, read_features = [], ours._read_features

    def counting(*args: object, **named: object) -> object:
        read.append(1)
        return read_features(*args, **named)  # type: ignore[arg-type]

    ours._read_features = counting  # type: ignore[assignment, method-assign]

    def refusal() -> str:
        try:
            ours._train_chain(x)
        except Declined as reason:
            return str(reason)
        return ""

    norm = ours.features[-1][1]
    found = [refusal()]
    hook = norm.register_forward_pre_hook(lambda module, args: None)
    found += [refusal(), refusal()]
    hook.remove()
    found += [refusal(), refusal()]
    norm.weight.data = norm.weight.data.double()
    found += [refusal(), refusal()]
    norm.weight.data = norm.weight.data.float()
    found += [refusal(), refusal()]
    norm.forward = norm.forward
    found += [refusal(), refusal()]
    del norm.forward
    found += [refusal()]
    expected = ["", *["has a hook"] * 2, "", "", *["float32"] * 2, "", "", *["forward of its own"] * 2, ""]
    if not all(want in why and bool(why) == bool(want) for want, why in zip(expected, found, strict=True)):
        return f"refusals: {found}"
    return "" if len(read) == 7 else f"read {len(read)} times"


def blocks_ask_for_their_models_backend() -> str:
    ours = model().train()
    ours.backend = "triton"
    ours.features[1].register_forward_hook(lambda module, args, y: None)  # so that they run one by one
    os.environ["MNV2_BACKEND"] = "auto"
    try:
        return compare(ours, torch.randn(IMAGES), 1e-5)
    finally:
        os.environ["MNV2_BACKEND"] = "triton"


def what_cannot_be_watched_is_asked_anew() -> str:
    ours, x = model().train(), torch.randn(IMAGES)
    ours.features.add_module("5", torch.jit.script(nn.Identity()))
    for _ in range(2):
        try:
            ours._train_chain(x)
        except Declined as reason:
            if "features.5" not in str(reason):
                return str(reason)
        else:
            return "the features are joined"
    del ours.features[5]
    ours._train_chain(x)
    return ""


def a_block_asks_for_its_own_backend() -> str:
    ours = model().train()
    ours.features[2].backend = "eager"
    ours.features[3].backend = "triton"
    with counted() as nodes:
        wrong = compare(ours, torch.randn(IMAGES), 1e-5)
    return wrong or ("" if nodes == [1, 2, 3, 1] else f"nodes of {nodes} layers")


def frozen_norms() -> str:
    ours = model().train()
    for norm in norms(ours):
        norm.eval()
    return compare(ours, torch.randn(IMAGES), 1e-5)


def eval_mode() -> str:
    ours = model().eval()
    with counted() as nodes:
        wrong = compare(ours, torch.randn(IMAGES), 1e-5)
    return wrong or ("" if nodes else "the training kernels were not asked")


def some_layers_frozen() -> str:
    ours = model().train()
    ours.features[:2].requires_grad_(False)
    ours.features[2].conv[0][1].weight.requires_grad_(False)
    return compare(ours, torch.randn(IMAGES), 1e-5)


def momentum_none_and_no_statistics() -> str:
    ours, x = block(), torch.randn(PIXELS)
    ours.conv[0][1].momentum = None
    ours.conv[1][1] = nn.BatchNorm2d(16, affine=False)
    ours.conv[3] = nn.BatchNorm2d(8, track_running_stats=False)
    return compare(ours, x, 1e-5) or compare(ours, x, 1e-5)


def gradient_of_the_images() -> str:
    return compare(model().train(), torch.randn(IMAGES, requires_grad=True), 1e-5)


def gradient_of_the_images_alone() -> str:
    ours = model().eval().requires_grad_(False)
    with counted() as nodes:
        wrong = compare(ours, torch.randn(IMAGES, requires_grad=True), 1e-5)
    return wrong or ("" if nodes == [6, 3, 1] else f"nodes of {nodes} layers")


def a_residual_block_without_expansion() -> str:
    ours = model([[1, 8, 2, 1]]).train()
    with counted() as nodes:
        wrong = compare(ours, torch.randn(IMAGES), 1e-5)
    return wrong or ("" if nodes == [3, 2, 1] else f"nodes of {nodes} layers")


def statistics_with_gaps() -> str:
    ours, x = block(), torch.randn(PIXELS)
    for norm in norms(ours):
        norm.running_mean = norm.running_mean.repeat_interleave(2)[::2]
        norm.running_var = norm.running_var.repeat_interleave(2)[::2]
    versions = [b._version for b in ours.buffers()]
    if wrong := compare(ours, x, 1e-5):
        return wrong
    if any(b._version == before for b, before in zip(ours.buffers(), versions, strict=True)):
        return "not all versions have moved"
    norms(ours)[1].eval()
    return compare(ours, x, 1e-5)


def statistics_made_in_inference_mode() -> str:
    """Moved within it; outside of it torch forbids that."""
    ours, x = block(), torch.randn(PIXELS)
    twin = copy.deepcopy(ours).double()
    with torch.inference_mode():
        for norm in norms(ours):
            norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()
        y = ours(x)
        with eager_only():
            right = twin(x.double())
    moved = [distance(a, b.double()) for a, b in zip(ours.buffers(), twin.buffers(), strict=True)]
    if max(*moved, distance(y, right)) > 1e-5:
        return f"off by {max(moved)}, {distance(y, right)}"
    try:
        ours(x)
    except RuntimeError as error:
        return "" if "inference" in str(error).lower() else str(error)
    return "no error"


def backward_twice() -> str:
    """The first one leaves what was kept as it was."""
    for ours in (block(), spread(InvertedResidual(8, 8, 1, 1)).train()):  # an expansion first, or none
        x = torch.randn(PIXELS, requires_grad=True)
        y = ours(x)
        g = torch.randn(y.shape)
        y.backward(g, retain_graph=True)
        once = [t.grad.clone() for t in (x, *ours.parameters())]
        y.backward(g)
        if not all(torch.equal(t.grad, 2 * of) for t, of in zip((x, *ours.parameters()), once, strict=True)):
            return "gradients are not twice as large"
    return ""


def a_graph_of_gradients_is_refused() -> str:
    ours = block()
    y = ours(torch.randn(PIXELS))
    try:
        torch.autograd.grad(y.sum(), list(ours.parameters()), create_graph=True)
    except RuntimeError as error:
        return "" if str(error) == TWICE and "\n" not in TWICE else str(error)
    return "no error"


def what_backward_reads_may_not_change() -> str:
    x = torch.randn(PIXELS).contiguous(memory_format=torch.channels_last)
    for ours in (ConvBNReLU6(8, 12, 1), ConvBNReLU6(8, 8, 3, groups=8)):
        unseen = []
        for name, tensor in {"the input": x, **dict(ours.train().named_parameters())}.items():
            y = ours(x)
            with torch.no_grad():
                tensor.mul_(1)
            try:
                y.sum().backward()
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    return str(error)
            else:
                unseen.append(name)
        if unseen != ["1.bias"]:  # which no backward pass reads, torch's neither
            return f"unseen: {unseen}"
    return ""


def functional_call() -> str:
    """With other weights than the module's, which are its own again afterwards."""
    ours, x = model().train(), torch.randn(IMAGES)
    other = {
        name: (p.detach() * 1.5 + 0.1).requires_grad_(p.dim() > 1) for name, p in ours.named_parameters()
    }
    twin = copy.deepcopy(ours).double()
    wide = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in other.items()}
    ours._train_chain(x)  # and remember it
    with counted() as nodes:
        y = torch.func.functional_call(ours, other, (x,))
    with eager_only():
        right = torch.func.functional_call(twin, wide, (x.double(),))
    weights = torch.randn(y.shape)
    y.backward(weights)
    right.backward(weights.double())
    off = {"answer": distance(y, right)} | {
        name: distance(other[name].grad, of.grad) for name, of in wide.items() if of.grad is not None
    }
    wrong = ", ".join(f"{name} is off by {value:.2g}" for name, value in off.items() if not value <= 1e-5)
    if wrong or nodes != [6, 3, 1] or any(p.grad is not None for p in ours.parameters()):
        return wrong or f"nodes of {nodes} layers, or the module's own weights have gradients"
    return "" if ours._train_chain(x).tensors[0] is ours.features[0][0].weight else "other weights stay"


@contextlib.contextmanager
def many_units() -> Iterator[None]:
    """Kernels as on a GPU with 132 multiprocessors; on small tiles, so that a little work is one for each."""
    kernels = norm_kernels, train_depthwise, train_pointwise, train_pointwise_gradient, train_stem
    with pytest.MonkeyPatch.context() as patch:
        for module in kernels:

            def small(name: str, kernel: str, tables: Any = module.tiles) -> dict[str, dict[str, int]]:
                return {row: {**tile, "m": 16} | ONE_OUTPUT for row, tile in tables(name, kernel).items()}

            patch.setattr(module, "device_of", lambda device: ("", 132))
            patch.setattr(module, "tiles", small)
        for module in (norm_kernels, parts):
            patch.setattr(module, "ROWS", PARTS_AT_ONCE)
        yield


def many_parts() -> str:
    """More parts of every sum than are read at once, and the same bits again."""
    ours, x = block(), torch.randn(5, 8, 2, 15, requires_grad=True)
    numbers: list[int] = []

    def noted(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(found: Tensor, *rest: Any, **named: Any) -> Any:
            numbers.append(len(found))
            return kernel(found, *rest, **named)

        return call

    bits = []
    with many_units(), pytest.MonkeyPatch.context() as patch:
        for name in ("normalize", "norm_gradient"):
            patch.setattr(norm_kernels, name, noted(getattr(norm_kernels, name)))
        for _ in range(2):
            twin, x.grad = copy.deepcopy(ours), None
            if wrong := compare(twin, x, 1e-5):
                return wrong
            bits.append([x.grad, *(p.grad for p in twin.parameters()), *twin.buffers()])
    if len(numbers) != 12 or min(numbers) <= PARTS_AT_ONCE:
        return f"numbers of parts: {numbers}"
    return "" if all(map(torch.equal, *bits)) else "other bits the second time"


def linear_chain(cast: torch.dtype) -> str:
    """Without ReLU6, whose bends make any two roundings differ."""
    torch.manual_seed(0)
    blocks = nn.Sequential(
        ConvBNReLU6(8, 24, 1, activation_layer=None),
        ConvBNReLU6(24, 24, 3, 2, groups=24, activation_layer=None),
        ConvBNReLU6(24, 12, 1, activation_layer=None),
    ).train()
    x = torch.randn(3, 8, 5, 6).to(cast).float()
    with torch.no_grad(), torch.autocast("cpu", cast):
        y = blocks(x)
    wrong = compare(blocks, x, 16 * torch.finfo(cast).eps, cast)
    if y.dtype != cast or any(p.grad is None or p.grad.dtype != torch.float32 for p in blocks.parameters()):
        return "the answer is not of autocast's dtype, or a gradient not of the weight's"
    return wrong


def a_network_under_autocast(cast: torch.dtype) -> str:
    """As near to float64 as plain torch under autocast is: the median over parameters, of two batches.

    Between the bends of ReLU6, past which one value of so few takes a gradient further than all roundings.
    """
    ours = model().train()
    for norm in norms(ours):
        nn.init.uniform_(norm.weight, 0.3, 0.7)
        nn.init.constant_(norm.bias, 3)
    errors = []
    for _ in range(2):  # in bfloat16 one batch is off by up to twice as much as another
        x = torch.randn(IMAGES)
        plain, twin = copy.deepcopy(ours), copy.deepcopy(ours).double()
        step(ours, x, cast)
        with eager_only():
            step(plain, x, cast)
            step(twin, x.double())
        errors += [
            [distance(p.grad, q.grad) for p, q in zip(net.parameters(), twin.parameters(), strict=True)]
            for net in (ours, plain)
        ]
    mine, torchs = (float(torch.tensor(errors[of::2]).median(1).values.mean()) for of in (0, 1))
    return "" if mine <= 1.5 * torchs else f"gradients are off by {mine:.2g}, torch's by {torchs:.2g}"


def a_scale_that_overflows_skips_the_step() -> str:
    ours = block()
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    before = [p.detach().clone() for p in ours.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", torch.float16):
        loss = ours(torch.randn(PIXELS).half()).float().square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    if not all(map(torch.equal, before, ours.parameters())):
        return "the step was made"
    return "" if scaler.get_scale() == 2.0**39 else f"the scale is {scaler.get_scale()}"


def synchronised_norms_decline() -> str:
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(model()).train()
    why = ours.why_not(torch.randn(IMAGES))
    return "" if why and "SyncBatchNorm" in why else f"why_not: {why}"


def tensors_on_two_devices_decline() -> str:
    ours, x = model().train(), torch.randn(IMAGES)
    chains.KERNELS["meta"] = chains.KERNELS["cuda"]  # type: ignore[index]
    norm = ours.features[2].conv[1][1]
    norm.running_mean = norm.running_mean.to("meta")
    try:
        if "several devices: cpu, meta" not in (why := str(ours.why_not(x))):
            return f"why_not: {why}"
        ours._train_chain(x)
    except Declined as reason:
        return "" if "several devices: cpu, meta" in str(reason) else str(reason)
    finally:
        del chains.KERNELS["meta"]  # type: ignore[attr-defined]
    return "the features are joined"


def too_large_an_input_is_torchs() -> str:
    """In train mode, and in eval mode where gradients are asked for."""
    limit, x = triton_train.limit, torch.randn(IMAGES)
    wrong = []
    try:
        for ours in (model().train(), model().eval()):
            triton_train.limit = lambda shape, layers: "too large" if shape[2] == IMAGES[2] else None
            if ours.training and "too large" not in (why := str(ours.why_not(x))):
                wrong.append(f"why_not: {why}")
            with lenient(), counted() as nodes:
                wrong.append(compare(ours, x, 1e-5))
            # What the stem's answer goes into is served again, in train mode, where each module asks.
            if nodes != ([2, 3, 3, 1] if ours.training else []):
                wrong.append(f"nodes of {nodes} layers")
    finally:
        triton_train.limit = limit
    return "; ".join(filter(None, wrong))


def one_value_a_channel_is_torchs_error() -> str:
    block = ConvBNReLU6(8, 8, 1).train()
    try:
        block(torch.randn(1, 8, 1, 1))
    except ValueError as error:
        return "" if "more than 1 value per channel" in str(error) else str(error)
    return "no error"


def without_gradients_statistics_move() -> str:
    ours = model().train()
    twin = copy.deepcopy(ours).double()
    x = torch.randn(IMAGES)
    with torch.no_grad():
        y = ours(x)
        with eager_only():
            right = twin(x.double())
    moved = [distance(a, b.double()) for a, b in zip(ours.buffers(), twin.buffers(), strict=True)]
    return "" if max(*moved, distance(y, right)) <= 1e-5 else f"off by {max(moved)}, {distance(y, right)}"


SCENES: dict[str, Callable[[], str]] = {
    scene.__name__: scene
    for scene in (
        a_step_is_torchs,
        batches_are_counted_in_one_launch_a_node,
        a_shared_block,
        batches_are_counted_as_far_as_torch_gets,
        sliced_images,
        a_block_that_declines_is_an_error,
        a_hook_is_called,
        why_features_are_not_joined_is_remembered,
        blocks_ask_for_their_models_backend,
        what_cannot_be_watched_is_asked_anew,
        a_block_asks_for_its_own_backend,
        gradient_of_the_images,
        gradient_of_the_images_alone,
        a_residual_block_without_expansion,
        statistics_with_gaps,
        statistics_made_in_inference_mode,
        backward_twice,
        a_graph_of_gradients_is_refused,
        what_backward_reads_may_not_change,
        functional_call,
        many_parts,
        frozen_norms,
        eval_mode,
        some_layers_frozen,
        momentum_none_and_no_statistics,
        a_scale_that_overflows_skips_the_step,
        synchronised_norms_decline,
        tensors_on_two_devices_decline,
        too_large_an_input_is_torchs,
        one_value_a_channel_is_torchs_error,
        without_gradients_statistics_move,
    )
}
for _scene in (linear_chain, a_network_under_autocast):
    for _cast in (torch.float16, torch.bfloat16):
        SCENES[f"{_scene.__name__} {_cast}"] = lambda scene=_scene, cast=_cast: scene(cast)


def verdict(scene: str) -> str:
    """What is wrong with a scene, an error's traceback too, so that the other scenes are still played."""
    try:
        return SCENES[scene]()
    except Exception:
        return traceback.format_exc()


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    return triton_interpreter.verdicts(__file__)


@pytest.mark.parametrize("scene", SCENES)
def test_interpreted(scene: str, verdicts: dict[str, str]) -> None:
    assert verdicts[scene] == ""


if __name__ == "__main__":
    stand_in()
    triton_interpreter.print_verdicts(SCENES, verdict)
