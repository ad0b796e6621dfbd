"""What modules in train mode on a GPU leave to torch, and what they refuse: in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from training_scenes import IMAGES, PIXELS, block, compare, counted, lenient, model, play

from mnv2_fast.autograd import TWICE
from mnv2_fast.backends import chains, triton_train
from mnv2_fast.errors import UserError
from mnv2_fast.nn import ConvBNReLU6
from mnv2_fast.reading import Declined


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
    x = torch.randn(IMAGES)
    with counted() as nodes:
        wrong = compare(ours, x, 1e-5)
    whys = ours.why_not(x), ours.eval().why_not(x)
    if not all(why and "eager backend" in why for why in whys):
        return f"why_not: {whys}"
    return wrong or ("" if nodes == [1, 2, 3, 1] else f"nodes of {nodes} layers")


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


SCENES = {
    scene.__name__: scene
    for scene in (
        a_block_that_declines_is_an_error,
        a_hook_is_called,
        why_features_are_not_joined_is_remembered,
        what_cannot_be_watched_is_asked_anew,
        a_block_asks_for_its_own_backend,
        a_graph_of_gradients_is_refused,
        what_backward_reads_may_not_change,
        synchronised_norms_decline,
        tensors_on_two_devices_decline,
        too_large_an_input_is_torchs,
        one_value_a_channel_is_torchs_error,
    )
}


@pytest.mark.parametrize("scene", SCENES)
def test_interpreted(scene: str, verdicts: dict[str, str]) -> None:
    assert verdicts[scene] == ""


if __name__ == "__main__":
    play(SCENES)
