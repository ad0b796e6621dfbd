"""What a module says of itself to the kernels: the chain that it is, or why they cannot serve it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .arch import LayerSpec
from .backends import chains
from .chain import Chain, Link
from .packs import HOOKS, METHODS, methods_of, within_storage

# What the classes run as they are defined.
_METHODS: dict[type[nn.Module], tuple[object, ...]] = {}


def remember(*kinds: type[nn.Module]) -> None:
    """Take what the classes run now for theirs: `check_module` declines what comes in its place."""
    _METHODS.update({kind: methods_of(kind) for kind in kinds})


remember(nn.Conv2d, nn.BatchNorm2d, nn.ReLU6, nn.Linear, nn.Dropout, nn.Sequential)


class Declined(Exception):  # noqa: N818 (a reason, not an error: the eager path serves the call)
    """The kernels do not serve a call; the message says why."""


def decline_call(x: Any) -> None:
    """Look at the input and at what surrounds the call.

    Raises:
        Declined: the kernels cannot serve it.
    """
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        raise Declined(f"the input is a {type(x).__name__}, not a plain tensor")
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        raise Declined("a torch mode watches the calls")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Declined("a functorch transform is active")
    if torch._C._get_tracing_state() is not None:
        raise Declined("the call is traced")
    if forward_ad._current_level >= 0:
        raise Declined("forward-mode differentiation is active")
    if _has_any_global_hook():
        raise Declined("a global module hook is registered")
    kernels = chains.KERNELS.get(x.device.type)
    if kernels is None:
        raise Declined(f"the input is on {x.device}, the kernels are on {' and '.join(chains.KERNELS)}")
    cast = autocast_dtype(x.device)
    if cast is not None and cast not in kernels.casts:
        raise Declined(f"autocast to {cast} is on, the kernels have {' or '.join(map(str, kernels.casts))}")
    if x.dtype not in kernels.dtypes or x.layout is not torch.strided or x.is_neg():
        raise Declined(f"the input is {x.dtype}, {x.layout}: the kernels take plain {kernels.names}")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise Declined(f"the input has the shape {tuple(x.shape)}, the kernels take [N, C, H, W]")


def decline_training(x: Tensor, asked: str) -> None:
    """Look whether there are training kernels where an input is that `decline_call` has let pass.

    Raises:
        Declined: there are none for a model that has asked for a backend.
    """
    if reason := chains.KERNELS[x.device.type].declines_training(x.device, asked):
        raise Declined(reason)


def device_type(x: Any) -> str:
    """Where a call with x is; of what is no tensor, where most are."""
    return x.device.type if isinstance(x, Tensor) else "cpu"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of tensors on a device now, or None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def word(dtype: torch.dtype) -> str:
    """A dtype's own name, such as float32."""
    return str(dtype).removeprefix("torch.")


def check_module(module: nn.Module, name: str, kind: type[nn.Module], any_mode: bool = False) -> None:
    """Look whether a module within a chain is the one the chain stands for, in eval mode or in `any_mode`.

    Raises:
        Declined: it is of another class, has hooks, is in train mode, has a forward of its own or is to run
            in plain torch.
    """
    if type(module) is not kind:
        raise Declined(f"{name} is a {type(module).__name__}, not a {kind.__name__}")
    state = module.__dict__
    if module.training and not any_mode:
        raise Declined(f"{name} is in train mode")
    if any(state[hooks] for hooks in HOOKS):
        raise Declined(f"{name} has a hook")
    if state.get("backend") == "eager":
        raise Declined(f"{name} asks for the eager backend")
    own = own_attribute(module)
    if own is not None:
        raise Declined(f"{name} has a {own} of its own")
    if methods_of(kind) != _METHODS[kind]:
        raise Declined(f"{name} has a forward of its own: the class {kind.__name__} was patched")


def own_attribute(module: nn.Module) -> str | None:
    """An attribute of the instance that takes the place of what its class runs or of what its slots hold."""
    state = module.__dict__
    names = (*METHODS, *module._parameters, *module._buffers, *module._modules)
    return next((name for name in names if name in state), None)


def _check_tensors(name: str, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    found = [t for t in tensors if t is not None]
    for t in found:
        if type(t) is not Tensor and type(t) is not nn.Parameter:
            raise Declined(f"{name} holds a {type(t).__name__}, not a plain tensor")
        kernels = chains.KERNELS.get(t.device.type)
        if kernels is None or t.dtype not in kernels.dtypes or t.layout is not torch.strided:
            take = " and ".join(f"{known.names} on {device}" for device, known in chains.KERNELS.items())
            raise Declined(f"{name} holds {t.dtype} on {t.device}, the kernels take {take}")
        if not within_storage(t):
            raise Declined(f"{name} holds a tensor whose memory was taken away")
    return found


def _slot(module: nn.Module, name: str, where: str, slots: str = "_parameters") -> Tensor | None:
    """The tensor in a slot, which parametrization and pruning take away."""
    try:
        value: Tensor | None = module.__dict__[slots][name]
    except KeyError:
        raise Declined(f"{where}.{name} is no plain {slots[1:-1]}") from None
    return value


def conv_kind(conv: nn.Conv2d) -> str | None:
    """The kind of layer that a convolution is, one of `arch.KINDS`, or None where no kernel is for it."""
    geometry = conv.kernel_size, conv.stride, conv.padding
    plain = conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    if not plain:
        return None
    if geometry == ((1, 1), (1, 1), (0, 0)) and conv.groups == 1:
        return "pointwise"
    if geometry in (((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1))):
        if conv.groups == conv.in_channels == conv.out_channels:
            return "depthwise"
        if conv.groups == 1 and conv.in_channels == 3 and conv.stride == (2, 2):
            return "stem"
    return None


Part = tuple[Link, list[Tensor]]


def read_conv(
    conv: nn.Module,
    norm: nn.Module | None,
    relu6: bool,
    where: str,
    norm_at: str,
    *,
    any_mode: bool = False,
) -> Part:
    """One link of a chain and its tensors; `where` and `norm_at` are the two modules' names.

    In `any_mode` the norm may be in train mode, and without running statistics.

    Raises:
        Declined: the kernels have no such layer, or not exactly this one.
    """
    check_module(conv, where, nn.Conv2d, any_mode)
    assert isinstance(conv, nn.Conv2d)
    kind = conv_kind(conv)
    if kind is None:
        raise Declined(
            f"{where}: no kernel for kernel_size={conv.kernel_size}, stride={conv.stride}, "
            f"padding={conv.padding}, dilation={conv.dilation}, groups={conv.groups}, "
            f"padding_mode={conv.padding_mode!r}"
        )
    weight, bias = _slot(conv, "weight", where), _slot(conv, "bias", where)
    tensors = [weight, bias]
    affine, eps = False, 0.0
    if norm is not None:
        check_module(norm, norm_at, nn.BatchNorm2d, any_mode)
        assert isinstance(norm, nn.BatchNorm2d)
        stats = [_slot(norm, name, norm_at, "_buffers") for name in ("running_mean", "running_var")]
        if None in stats and not any_mode:
            raise Declined(f"{norm_at} has no running statistics")
        scale = [_slot(norm, name, norm_at) for name in ("weight", "bias")]
        if (scale[0] is None) != (scale[1] is None):
            raise Declined(f"{norm_at} has a weight or a bias, not both")
        affine, eps = scale[0] is not None, norm.eps
        tensors += [*scale, *stats]
    found = _check_tensors(where, tensors)
    shape = tuple(weight.shape) if weight is not None else ()
    spec = LayerSpec(
        kind,
        where,
        norm_at if norm is not None else "",
        conv.in_channels,
        conv.out_channels,
        conv.stride[0],
        relu6,
    )
    if shape != spec.weight_shape or any(t.shape != (spec.cout,) for t in found[1:]):
        raise Declined(f"{where}: its tensors' shapes are not those of {conv}")
    return Link(spec, bias is not None, norm is not None, affine, eps), found


def read_linear(linear: nn.Module, features: int, where: str) -> Part:
    """The linear link that ends a chain and its tensors.

    Raises:
        Declined: it is not a plain `nn.Linear` of `features` inputs.
    """
    check_module(linear, where, nn.Linear, any_mode=True)  # a fresh head in an eval model is in train mode
    tensors = _check_tensors(where, [_slot(linear, name, where) for name in ("weight", "bias")])
    weight = tensors[0]
    if (
        weight.dim() != 2
        or weight.shape[0] == 0
        or weight.shape[1] != features
        or any(t.shape != weight.shape[:1] for t in tensors[1:])
    ):
        raise Declined(f"{where}: its tensors' shapes are not those of a linear layer of {features} inputs")
    spec = LayerSpec("linear", where, "", features, weight.shape[0])
    return Link(spec, len(tensors) == 2, norm=False, affine=False, eps=0.0), tensors


@dataclass
class Reading:
    """What a module tells of itself: links with their tensors, and the modules that they stand for."""

    parts: list[Part]
    modules: list[nn.Module]
    pool: bool = False
    rest: nn.Module | None = None

    @property
    def chain(self) -> Chain:
        """The links as a chain."""
        return Chain(tuple(link for link, _ in self.parts), self.pool)

    @property
    def tensors(self) -> list[Tensor]:
        """The chain's tensors, in its order."""
        return [t for _, tensors in self.parts for t in tensors]

    @property
    def dtype(self) -> torch.dtype:
        """The one dtype of the chain's tensors.

        Raises:
            Declined: they are of several.
        """
        found = {t.dtype for t in self.tensors}
        if len(found) > 1:
            raise Declined(f"tensors are of several dtypes: {', '.join(sorted(map(str, found)))}")
        return found.pop()

    @property
    def device(self) -> torch.device:
        """The one device of the chain's tensors.

        Raises:
            Declined: they are on several.
        """
        found = {t.device for t in self.tensors}
        if len(found) > 1:
            raise Declined(f"tensors are on several devices: {', '.join(sorted(map(str, found)))}")
        return found.pop()
