"""Steps of modules in train mode as on a GPU: in Triton's interpreter, beside plain torch in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
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
from training_scenes import (
    IMAGES,
    PIXELS,
    between_bends,
    block,
    compare,
    counted,
    distance,
    model,
    norms,
    play,
    scaled_step,
    spread,
    step,
)

from mnv2_fast.nn import ConvBNReLU6, InvertedResidual, eager_only

# Of a tile of the depthwise kernels, and of a kernel that adds up parts.
ONE_OUTPUT, PARTS_AT_ONCE = {"rows": 1, "cols": 1}, 4


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
    """As near to float64 as plain torch under autocast is: the median over parameters, of two batches."""
    ours = between_bends(model()).train()
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
    made, scale = scaled_step(block(), torch.randn(PIXELS).half(), 2.0**40)
    return "the step was made" if made else "" if scale == 2.0**39 else f"the scale is {scale}"


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
        frozen_norms,
        eval_mode,
        some_layers_frozen,
        momentum_none_and_no_statistics,
        gradient_of_the_images,
        gradient_of_the_images_alone,
        a_residual_block_without_expansion,
        statistics_with_gaps,
        statistics_made_in_inference_mode,
        backward_twice,
        functional_call,
        many_parts,
        a_scale_that_overflows_skips_the_step,
        without_gradients_statistics_move,
    )
}
for _scene in (linear_chain, a_network_under_autocast):
    for _cast in (torch.float16, torch.bfloat16):
        SCENES[f"{_scene.__name__} {_cast}"] = lambda scene=_scene, cast=_cast: scene(cast)


@pytest.mark.parametrize("scene", SCENES)
def test_interpreted(scene: str, verdicts: dict[str, str]) -> None:
    assert verdicts[scene] == ""


if __name__ == "__main__":
    play(SCENES)
