"""`mnv2_fast.nn`: modules for other networks, torchvision's in constructor, state and answer."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mnv2_fast import _torchvision
from mnv2_fast.nn import ConvBNReLU6, InvertedResidual

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def tv() -> Any:
    """torchvision."""
    if not _torchvision.installed():
        pytest.skip("torchvision is not installed: pip install torchvision")
    return _torchvision.torchvision()


def settle(module: nn.Module) -> nn.Module:
    """Batch norms away from the identity, in eval mode."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.normal_(norm.bias, 0, 0.3)
    return module.eval()


CONVS: dict[str, tuple[tuple[Any, ...], dict[str, Any], bool]] = {
    "pointwise": ((8, 17), {"kernel_size": 1}, True),
    "pointwise of one": ((1, 1), {"kernel_size": (1, 1)}, True),
    "depthwise": ((12, 12), {"groups": 12}, True),
    "depthwise, stride 2": ((33, 33, 3, 2), {"groups": 33}, True),
    "depthwise of one": ((1, 1, 3, (2, 2)), {"padding": 1}, True),
    "stem": ((3, 16, 3, 2), {}, True),
    "bias": ((8, 8), {"kernel_size": 1, "bias": True}, True),
    "no norm": ((8, 8), {"kernel_size": 1, "norm_layer": None}, True),
    "no activation": ((8, 8), {"kernel_size": 1, "activation_layer": None}, True),
    "bare": ((8, 8), {"kernel_size": 1, "norm_layer": None, "activation_layer": None}, True),
    "not in place": ((8, 8), {"kernel_size": 1, "inplace": False}, True),
    "norm without affine": ((8, 8, 1), {"norm_layer": lambda c: nn.BatchNorm2d(c, affine=False)}, True),
    "full 3x3": ((8, 8), {}, False),
    "5x5": ((8, 8, 5), {"groups": 8}, False),
    "dilated": ((8, 8, 3), {"groups": 8, "dilation": 2}, False),
    "grouped": ((8, 8, 1), {"groups": 2}, False),
    "uneven": ((8, 8, (3, 1), (1, 2)), {"groups": 8}, False),
    "same": ((8, 8, 3), {"padding": "same", "groups": 8}, False),
    "silu": ((8, 8, 1), {"activation_layer": nn.SiLU}, False),
    "group norm": ((8, 8, 1), {"norm_layer": lambda c: nn.GroupNorm(2, c)}, False),
    "batch statistics": (
        (8, 8, 1),
        {"norm_layer": lambda c: nn.BatchNorm2d(c, track_running_stats=False)},
        False,
    ),
}


@pytest.mark.parametrize("name", CONVS)
def test_conv_bn_relu6(tv: Any, name: str) -> None:
    args, kwargs, served = CONVS[name]
    torch.manual_seed(1)
    ours = ConvBNReLU6(*args, **kwargs)
    torch.manual_seed(1)
    theirs = tv.ops.Conv2dNormActivation(*args, **{"activation_layer": nn.ReLU6, **kwargs})
    assert str(list(ours.children())) == str(list(theirs.children()))
    assert ours.out_channels == theirs.out_channels
    theirs.load_state_dict(ours.state_dict(), strict=True)
    settle(ours)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()
    x = 3 * torch.randn(2, args[0], 9, 10)
    assert (ours.why_not(x) is None) == served, ours.why_not(x)
    for image in (x, x.contiguous(memory_format=torch.channels_last), x[..., ::2]):
        y, expected = ours(image), theirs(image)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert y.is_contiguous(memory_format=torch.channels_last) or expected.is_contiguous()
        assert not expected.is_contiguous() or y.is_contiguous()


def test_signatures(tv: Any) -> None:
    ours = inspect.signature(ConvBNReLU6.__init__).parameters
    theirs = inspect.signature(tv.ops.Conv2dNormActivation.__init__).parameters
    assert list(ours) == list(theirs)
    changed = {name for name in ours if ours[name].default != theirs[name].default}
    assert changed == {"activation_layer"}
    theirs = inspect.signature(tv.models.mobilenetv2.InvertedResidual.__init__).parameters
    assert list(inspect.signature(InvertedResidual.__init__).parameters) == list(theirs)


BLOCKS = [
    (16, 16, 1, 6),
    (16, 24, 1, 6),
    (16, 16, 2, 6),
    (12, 20, 2, 1),
    (9, 9, 1, 1),
    (7, 7, 1, 3),
    (8, 8, 1, 2.5),
]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_inverted_residual(tv: Any, block: tuple[int, int, int, float]) -> None:
    torch.manual_seed(1)
    ours = InvertedResidual(*block)
    torch.manual_seed(1)
    theirs = tv.models.mobilenetv2.InvertedResidual(*block)
    for name in ("stride", "use_res_connect", "out_channels", "_is_cn"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    settle(ours)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()
    x = torch.randn(2, block[0], 9, 7)
    assert ours.why_not(x) is None
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    found = []
    for module in (ours, theirs):
        image = x.clone().requires_grad_()
        module(image).square().sum().backward()
        found.append([image.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_wrong_stride() -> None:
    with pytest.raises(ValueError, match="stride should be 1 or 2 instead of 3"):
        InvertedResidual(8, 8, 3, 6)


def test_within_another_network() -> None:
    """Trained for a step, then in eval mode: the weights of now, on the kernels."""
    net = nn.Sequential(
        ConvBNReLU6(3, 8, stride=2),
        InvertedResidual(8, 8, 1, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        net.eval()(x)
    net.train()(x).square().sum().backward()
    optimizer.step()
    net.eval()
    y = net(x)
    assert net[0].why_not(x) is None
    copied = in_torch(net)
    torch.testing.assert_close(y, copied(x), rtol=1e-4, atol=1e-4)


def in_torch(net: nn.Sequential) -> nn.Module:
    """The same network, whose modules of ours are told to run in torch."""
    twin = copy.deepcopy(net)
    for module in twin.modules():
        if isinstance(module, ConvBNReLU6 | InvertedResidual):
            module.backend = "eager"
    return twin


def test_input_of_other_channels_is_torchs_error() -> None:
    module = ConvBNReLU6(8, 8, 1).eval()
    module(torch.zeros(1, 8, 4, 4))
    with pytest.raises(RuntimeError, match="channels"):
        module(torch.zeros(1, 9, 4, 4))


def test_decline_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    module = ConvBNReLU6(8, 8, 5).eval()
    with caplog.at_level(logging.DEBUG, "mnv2_fast"):
        module(torch.zeros(1, 8, 8, 8))
    assert "kernel_size=(5, 5)" in caplog.text


def randomized(block: nn.Module) -> Any:
    """In eval mode, with batch norms away from the identity."""
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 1.0)
    return block.eval()


def test_blocks_in_bf16() -> None:
    modules = [
        randomized(InvertedResidual(9, 9, 1, 3)),
        randomized(InvertedResidual(9, 12, 2, 1)),
        randomized(ConvBNReLU6(9, 17, 1)),
        randomized(ConvBNReLU6(9, 9, 3, groups=9)),
    ]
    x = torch.randn(2, 9, 15, 8).bfloat16()
    for module, cast in itertools.product(modules, (True, False)):
        with torch.no_grad():
            exact = copy.deepcopy(module).double()._run_eager(x.double())
            if not cast:
                module.bfloat16()
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                assert module.why_not(x) is None
                y, torchs = module(x), module._run_eager(x)
        assert (y.dtype, y.stride()) == (torchs.dtype, torchs.stride())
        step = 2.0**-8 * exact.abs().max()
        assert (y.double() - exact).abs().max() <= 2 * (torchs.double() - exact).abs().max() + step


def test_autocast_adds_a_float32_input_in_float32() -> None:
    block, x = randomized(InvertedResidual(9, 9, 1, 3)), torch.randn(2, 9, 15, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast adds a float32 input" in str(block.why_not(x))
        assert block(x).dtype == torch.float32


def test_empty_batch_and_pixel() -> None:
    module = InvertedResidual(8, 8, 1, 6).eval()
    assert module(torch.zeros(0, 8, 5, 5)).shape == (0, 8, 5, 5)
    x: Tensor = torch.randn(1, 8, 1, 1)
    assert module.why_not(x) is None
    assert module(x).shape == (1, 8, 1, 1)
