"""Models of torchvision and timm as ours: the same Parameter objects in fast modules.

Models are known by their structure, so that neither library is imported. What is not exactly MobileNetV2 is
refused, with the name of the layer that differs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .model import MobileNetV2
from .nn import ConvBNReLU6, InvertedResidual
from .packs import HOOKS
from .reading import conv_kind, own_attribute

_TORCHVISION_CONV = ("Conv2dNormActivation", "ConvBNReLU6")
_HOMES = ("torch", "torchvision", __package__)  # packages whose forwards are known


@dataclass(frozen=True)
class _Conv:
    """A convolution, its norm and whether ReLU6 follows, where the model has them."""

    name: str
    conv: nn.Module
    norm: nn.Module
    relu6: bool


@dataclass(frozen=True)
class _Net:
    """A model taken apart. A block is its convolutions and whether its input is added."""

    stem: _Conv
    blocks: list[tuple[str, list[_Conv], bool]]
    last: _Conv
    classifier: nn.Module


def adopt(model: nn.Module, backend: str) -> MobileNetV2:
    """See `mnv2_fast.accelerate`."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate takes a model, not {type(model).__name__}: "
            "load a file with mobilenet_v2(weights=...)"
        )
    kind = type(model).__name__
    _untouched(model, "the model")
    if kind == "MobileNetV2":
        net = _read_torchvision(model)
    elif kind == "EfficientNet" and hasattr(model, "conv_stem"):
        net = _read_timm(model)
    else:
        _refuse("the model", f"is a {kind}, not torchvision's MobileNetV2 or timm's mobilenetv2")
    with torch.device("meta"):  # no memory and no random numbers for what is then replaced
        built = _build(net, backend)
    built.training = built.features.training = model.training
    for name in ("preprocessing", "_labels"):
        if name in model.__dict__:
            setattr(built, name, getattr(model, name))
    return built


def _refuse(name: str, reason: str) -> Any:
    raise UserError(f"cannot accelerate this model: {name} {reason}")


def _child(module: nn.Module, name: str, where: str) -> nn.Module:
    child = module._modules.get(name)
    return child if child is not None else _refuse(f"{where}{name}", "is missing")


def _expect(module: nn.Module, name: str, *kinds: str) -> nn.Module:
    """`module` if it is of one of the classes and nothing is attached to it."""
    kind = type(module).__name__
    if kind not in kinds:
        _refuse(name, f"is a {kind}, not a {' or '.join(kinds)}")
    return _untouched(module, name)


def _untouched(module: nn.Module, name: str) -> nn.Module:
    """`module` if nothing is attached to it that a copy of its structure would leave out."""
    if any(module.__dict__[hooks] for hooks in HOOKS):
        _refuse(name, "has a hook: remove it first")
    inner = ("_forward_impl", "forward_features", "forward_head")
    own = own_attribute(module) or next((method for method in inner if method in module.__dict__), None)
    if own is not None:
        _refuse(name, f"has a {own} of its own: del it")
    return module


def _expect_known(module: nn.Module, name: str, *kinds: str) -> nn.Module:
    """As `_expect`, and the class runs torch's, torchvision's or our code, not another of the same name."""
    _expect(module, name, *kinds)
    for method in ("forward", "_forward_impl"):
        home = getattr(getattr(type(module), method, None), "__module__", __package__)
        if home.partition(".")[0] not in _HOMES:
            _refuse(name, f"has a {method} of its own, from {home}: give the class that it comes from")
    return module


def _check_conv(part: _Conv, kind: str, cin: int) -> int:
    """Its output channels, once it is of the kind and takes `cin` channels."""
    conv = _expect(part.conv, part.name, "Conv2d")
    assert isinstance(conv, nn.Conv2d)
    if conv_kind(conv) != kind or conv.in_channels != cin:
        _refuse(part.name, f"is {conv}, not MobileNetV2's {kind} layer of {cin} channels")
    if not isinstance(conv._parameters.get("weight"), nn.Parameter):
        _refuse(part.name, "has no plain weight (pruned or parametrized)")
    if not isinstance(part.norm, nn.BatchNorm2d) or part.norm.num_features != conv.out_channels:
        _refuse(part.name, f"is followed by {part.norm}, not by its BatchNorm2d")
    return conv.out_channels


def _build(net: _Net, backend: str) -> MobileNetV2:
    channels = _check_conv(net.stem, "stem", 3)
    features: list[nn.Module] = [_conv_module(net.stem)]
    for name, parts, adds in net.blocks:
        block, channels = _block_module(name, parts, adds, channels)
        features.append(block)
    channels = _check_conv(net.last, "pointwise", channels)
    features.append(_conv_module(net.last))
    model = MobileNetV2(1, 0.05, ((1, 1, 1, 1),), 1, backend=backend)  # a small one, to be filled
    model.last_channel = channels
    model.features = nn.Sequential(*features)
    model.classifier = net.classifier  # type: ignore[assignment]
    for part in (net.stem, net.last):
        if not part.relu6:
            _refuse(part.name, "has no ReLU6")
    return model


def _block_module(name: str, parts: list[_Conv], adds: bool, cin: int) -> tuple[InvertedResidual, int]:
    channels = cin
    kinds = ("pointwise", "depthwise", "pointwise")[3 - len(parts) :]
    for part, kind in zip(parts, kinds, strict=True):
        channels = _check_conv(part, kind, channels)
        if part.relu6 == (part is parts[-1]):
            _refuse(part.name, "has ReLU6 where MobileNetV2 has none, or none where it has")
    depthwise = parts[-2].conv
    assert isinstance(depthwise, nn.Conv2d)
    block = InvertedResidual(cin, channels, depthwise.stride[0], len(parts) - 1)
    if block.use_res_connect != adds:
        _refuse(name, "adds its input where MobileNetV2 does not, or does not where it does")
    *inner, last = parts
    block.conv = nn.Sequential(*map(_conv_module, inner), _share(last.conv), _norm(last.norm))
    for module in (block, block.conv):
        module.training = last.norm.training
    return block, channels


def _conv_module(part: _Conv) -> ConvBNReLU6:
    module = ConvBNReLU6(1, 1, 1)
    for name in list(module._modules):
        del module._modules[name]
    module.extend([_share(part.conv), _norm(part.norm), nn.ReLU6(inplace=True)])
    module.out_channels = part.conv.out_channels  # type: ignore[assignment]
    return module.train(part.norm.training)


def _share(module: nn.Module) -> Any:
    """A copy of a module and of those in it, holding the same tensors."""
    twin = copy.copy(module)
    state = twin.__dict__
    for name in ("_parameters", "_buffers", *HOOKS):
        state[name] = state[name].copy()
    state["_modules"] = {name: child and _share(child) for name, child in module._modules.items()}
    return twin


def _norm(norm: nn.Module) -> nn.BatchNorm2d:
    """A plain batch norm with the tensors and settings of one that may be of a subclass."""
    if type(norm) is nn.BatchNorm2d:
        twin: nn.BatchNorm2d = _share(norm)
        return twin
    assert isinstance(norm, nn.BatchNorm2d)
    plain = nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    plain._parameters, plain._buffers = norm._parameters.copy(), norm._buffers.copy()
    return plain.train(norm.training)


def _read_torchvision(model: nn.Module) -> _Net:
    _expect_known(model, "the model", "MobileNetV2")
    features = _expect(_child(model, "features", ""), "features", "Sequential")
    children = list(features.named_children())
    if len(children) < 3:
        _refuse("features", f"has {len(children)} children, not a stem, blocks and a last layer")
    blocks = []
    for name, block in children[1:-1]:
        where = f"features.{name}"
        _expect_known(block, where, "InvertedResidual")
        conv = _expect(_child(block, "conv", f"{where}."), f"{where}.conv", "Sequential")
        inner = list(conv.named_children())
        if len(inner) not in (3, 4):
            _refuse(f"{where}.conv", f"has {len(inner)} children, not 3 or 4")
        parts = [_torchvision_conv(child, f"{where}.conv.{at}") for at, child in inner[:-2]]
        (at, linear), (after, norm) = inner[-2:]
        _expect(norm, f"{where}.conv.{after}", "BatchNorm2d")
        parts.append(_Conv(f"{where}.conv.{at}", linear, norm, False))
        blocks.append((where, parts, bool(block.use_res_connect)))
    first, last = children[0], children[-1]
    return _Net(
        _torchvision_conv(first[1], f"features.{first[0]}"),
        blocks,
        _torchvision_conv(last[1], f"features.{last[0]}"),
        _share(_child(model, "classifier", "")),
    )


def _torchvision_conv(module: nn.Module, name: str) -> _Conv:
    _expect_known(module, name, *_TORCHVISION_CONV)
    children = list(module.children())
    if len(children) != 3:
        _refuse(name, f"has {len(children)} children, not a convolution, its norm and ReLU6")
    conv, norm, act = children
    _expect(norm, f"{name}.1", "BatchNorm2d")
    _expect(act, f"{name}.2", "ReLU6")
    return _Conv(f"{name}.0", conv, norm, True)


def _read_timm(model: nn.Module) -> _Net:
    blocks = []
    stages = _expect(_child(model, "blocks", ""), "blocks", "Sequential")
    for i, stage in enumerate(stages.children()):
        _expect(stage, f"blocks.{i}", "Sequential")
        for j, block in enumerate(stage.children()):
            where = f"blocks.{i}.{j}"
            kind = type(_expect(block, where, "InvertedResidual", "DepthwiseSeparableConv")).__name__
            pairs: tuple[tuple[str, str], ...] = (("conv_dw", "bn1"), ("conv_pw", "bn2"))
            if kind == "InvertedResidual":
                pairs = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
            known = {name for pair in pairs for name in pair}
            for name, child in block.named_children():
                if name not in known:
                    _expect(child, f"{where}.{name}", "Identity")
            parts = [_timm_conv(block, conv, norm, f"{where}.") for conv, norm in pairs]
            blocks.append((where, parts, bool(block.has_skip)))
    pool = _untouched(_child(model, "global_pool", ""), "global_pool")
    if getattr(pool, "pool_type", "avg") != "avg":
        _refuse("global_pool", f"is {pool}, not the average")
    linear = _expect(_child(model, "classifier", ""), "classifier", "Linear")
    classifier = nn.Sequential(nn.Dropout(float(getattr(model, "drop_rate", 0.0))), _share(linear))
    stem = _timm_conv(model, "conv_stem", "bn1", "")
    return _Net(stem, blocks, _timm_conv(model, "conv_head", "bn2", ""), classifier.train(model.training))


def _timm_conv(owner: nn.Module, conv: str, norm: str, where: str) -> _Conv:
    """A convolution and timm's `BatchNormAct2d`, which has the activation inside."""
    module = _expect(_child(owner, norm, where), f"{where}{norm}", "BatchNormAct2d")
    drop, act = module._modules.get("drop"), _child(module, "act", f"{where}{norm}.")
    if drop is not None:
        _expect(drop, f"{where}{norm}.drop", "Identity")
    _expect(act, f"{where}{norm}.act", "ReLU6", "Identity")
    return _Conv(f"{where}{conv}", _child(owner, conv, where), module, isinstance(act, nn.ReLU6))
