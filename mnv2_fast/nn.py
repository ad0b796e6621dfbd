"""Modules that are torch's in structure, meaning and `state_dict`, and run on the kernels.

Each looks at every call whether the kernels can serve it exactly; where they cannot, its children run as they
are.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from . import env, training
from .backends import chains
from .errors import UserError
from .packs import Holder, ModuleWatch, Pack, TensorWatch
from .plans import Kind, Plan, in_format_of, requires_grad, train_chain
from .reading import (
    Declined,
    Part,
    Reading,
    autocast_dtype,
    check_module,
    decline_call,
    decline_training,
    device_type,
    read_conv,
    remember,
)

log = logging.getLogger("mnv2_fast")


class _Thread(local):
    eager = False


_thread = _Thread()


@contextmanager
def eager_only() -> Iterator[None]:
    """Within it, in this thread, every module runs in plain torch."""
    before, _thread.eager = _thread.eager, True
    try:
        yield
    finally:
        _thread.eager = before


def tracing(x: object) -> bool:
    """Whether a call records a graph and not an answer: export, ONNX, fx, jit, compile, fake tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or isinstance(x, torch.fx.Proxy)
        or torch._C._len_torch_dispatch_stack() > 0
    )


class Automatic(nn.Module):
    """A module that is fast by itself. Subclasses say what chain they are."""

    backend = "auto"
    watched: tuple[str, ...] = ()  # attributes, besides children, that its answer depends on

    def __init__(self, *children: nn.Module) -> None:
        super().__init__(*children)
        self._holder = Holder()

    def read(self, prefix: str = "", any_mode: bool = False) -> Reading:
        """The chain that this module is, in eval mode or in `any_mode`.

        Its layers are named as in the `state_dict`, after `prefix`.

        Raises:
            Declined: it is none that the kernels know.
        """
        raise NotImplementedError

    def is_cut(self, x: Any) -> bool:
        """Whether a call with `x` leaves the end of the chain to torch, for its gradients alone are asked."""
        return False

    def read_cut(self) -> Reading:
        """The chain of a call that `is_cut`, as `read` has it."""
        raise NotImplementedError

    def _run_eager(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def refresh(self) -> None:
        """Forget the packed weights: needed after a write through `.data` or numpy that moved few values."""
        for module in self.modules():
            if isinstance(module, Automatic):
                module._holder.clear()

    def why_not(self, x: Any) -> str | None:
        """Why the kernels would not serve a call with `x`, or None where they would."""
        try:
            self._server(x)
        except Declined as reason:
            return str(reason)
        return None

    def decline_backend(self, device: str) -> None:
        """Look at which backend is asked for and whether that of a type of device is there.

        Raises:
            Declined: another one is asked for, or it is not.
        """
        asked, kernels = self._asked(), chains.KERNELS.get(device)
        if asked == "eager" or (kernels is not None and asked not in ("auto", kernels.backend)):
            raise Declined(f"the {asked} backend was asked for")
        if kernels is not None and (reason := kernels.unavailable()):
            raise Declined(reason)

    def decline_changes(self) -> None:
        """Look whether something was put on the module itself that it runs in the place of what `read` tells.

        Raises:
            Declined: it was.
        """
        if not self.__dict__.keys().isdisjoint(self._modules):
            raise Declined("an attribute of the module hides a child")

    def _asked(self) -> str:
        own: str = self.__dict__.get("backend", "auto")
        return "eager" if _thread.eager else env.backend() if own == "auto" else own

    def _plan(self, x: Any) -> Plan:
        """The plan for a call in eval mode, as it holds now.

        Raises:
            Declined: the kernels cannot serve the call.
        """
        self.decline_backend(device_type(x))
        decline_call(x)
        self.decline_changes()
        kernels, asked = chains.KERNELS[x.device.type], self._asked()
        if reason := kernels.declines(x.device, asked):
            raise Declined(reason)
        kind = autocast_dtype(x.device), self.is_cut(x), kernels.settings(asked)
        plans: dict[Kind, Plan] = self._holder.value or {}
        plan = plans.get(kind)
        if plan is None or plan.changed(self):
            plan = self._make_plan(x.device, kind)
            # Others that are stale go, too, with their memory on a GPU.
            others = {k: p for k, p in plans.items() if k != kind and not p.changed(self)}
            self._holder.value = {**others, kind: plan}
        plan.decline_input(x)
        return plan

    def _make_plan(self, device: torch.device, kind: Kind) -> Plan:
        autocast, cut, settings = kind
        reading = self.read_cut() if cut else self.read()
        dtype, chain, kernels = reading.dtype, reading.chain, chains.KERNELS[device.type]
        if reading.device != device:
            raise Declined(f"the input is on {device}, the weights are on {reading.device}")
        if reason := kernels.declines_chain(chain, device):
            raise Declined(reason)
        modules = ModuleWatch(self, reading.modules)
        if not kernels.samples and any(t.is_inference() for t in modules.tensors):
            raise Declined(chains.UNSEEN)
        # The watch comes before the weights are read: a write in between is seen at the next call.
        watch = TensorWatch(modules.tensors)
        pack = Pack(chain, reading.tensors, dtype, autocast=autocast, settings=settings)
        trains = kernels.declines_training(device, self._asked()) is None
        return Plan(modules, watch, tuple(reading.tensors), pack, trains, reading.rest)

    def _server(self, x: Any) -> Callable[[Tensor], Tensor]:
        """What serves a call.

        Raises:
            Declined: the kernels cannot.
        """
        return self._plan(x).run

    @torch.jit.unused
    def _automatic(self, x: Tensor) -> Tensor:
        if tracing(x):
            return self._run_eager(x)
        try:
            serve = self._server(x)
        except Declined as reason:
            return self._declined(x, str(reason))
        return serve(x)

    def _check(self, x: Any) -> None:
        """Refuse an input in one line where torch would in several."""

    def _declined(self, x: Tensor, reason: str) -> Tensor:
        self._check(x)
        if self._asked() != "eager":
            log.debug("%s runs in eager: %s", type(self).__name__, reason)
            if env.strict():
                raise UserError(f"{env.STRICT.name}=1 and no kernel serves {type(self).__name__}: {reason}")
            return self._run_eager(x)
        with eager_only():
            return self._run_eager(x)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


class Trained(Automatic):
    """Convolutions in a row with their norms: fast where gradients are to come, too.

    In train mode, and in eval mode where a gradient is wanted, the raw outputs of its convolutions are kept
    for backward. In train mode the answer is in channels_last whatever the input is in: the next module
    wants it so.
    """

    def _server(self, x: Any) -> Callable[[Tensor], Tensor]:
        if self.training:
            return self._trainer(x)
        if torch.is_grad_enabled() and self._wants_gradients(x):
            with suppress(Declined):
                train = self._trainer(x)
                return lambda x: in_format_of(x, train(x))
        return super()._server(x)

    def _wants_gradients(self, x: Any) -> bool:
        return (isinstance(x, Tensor) and x.requires_grad) or any(map(requires_grad, self.parameters()))

    def _trainer(self, x: Any) -> Callable[[Tensor], Tensor]:
        """What serves a call whose gradients may be asked for.

        Raises:
            Declined: the training kernels cannot.
        """
        self.decline_backend(device_type(x))
        decline_call(x)
        decline_training(x, self._asked())
        self.decline_changes()
        chain = self.train_chain()
        training.decline_input(x, chain)
        return lambda x: training.run(x, chain.layers, chain.tensors, chain.residual)

    def train_chain(self) -> training.TrainChain:
        """Its layers for the training kernels.

        Raises:
            Declined: they have none for it.
        """
        return train_chain(self, self._holder, lambda: self.read(any_mode=self.training))


class ConvBNReLU6(Trained, nn.Sequential):
    """Convolution, batch norm, ReLU6: `torchvision.ops.Conv2dNormActivation` with ReLU6 for the activation.

    [N, in_channels, H, W] -> [N, out_channels, Ho, Wo], in the memory format of the input, in train mode in
    channels_last. The kernels serve 1x1 convolutions, depthwise 3x3 of stride 1 or 2 (groups = in_channels =
    out_channels) and 3x3 of stride 2 from 3 channels; everything else runs as its children do.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, dilation, bias: of the `Conv2d`; a bias by
            default only where there is no norm.
        padding: by default what keeps the size at stride 1.
        norm_layer: called with out_channels; None for no norm.
        activation_layer: called with `inplace`; None for no activation.
        inplace: of the activation; None: not passed.
    """

    def __init__(  # noqa: PLR0917 (torchvision's signature)
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU6,
        dilation: int | tuple[int, int] = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        if padding is None:
            sizes, steps = _pair(kernel_size), _pair(dilation)
            padding = ((sizes[0] - 1) // 2 * steps[0], (sizes[1] - 1) // 2 * steps[1])
        layers: list[nn.Module] = [
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation=dilation,
                groups=groups,
                bias=norm_layer is None if bias is None else bias,
            )
        ]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer(**({} if inplace is None else {"inplace": inplace})))
        super().__init__(*layers)
        self.out_channels = out_channels

    def read(self, prefix: str = "", any_mode: bool = False) -> Reading:
        children = list(self)
        if not children:
            raise Declined(f"{prefix}0 is missing")
        modules = list(children)
        relu6 = len(children) > 1 and isinstance(children[-1], nn.ReLU6)
        if relu6:
            at = f"{prefix}{len(children) - 1}"
            act = children.pop()
            check_module(act, at, nn.ReLU6, any_mode)
            if (act.min_val, act.max_val) != (0.0, 6.0):
                raise Declined(f"{at} clamps to {act.min_val}..{act.max_val}, not 0..6")
        if len(children) > 2:
            raise Declined(f"{prefix}2 follows a convolution and its norm, where only ReLU6 may")
        norm = children[1] if len(children) == 2 else None
        part = read_conv(children[0], norm, relu6, f"{prefix}0", f"{prefix}1", any_mode=any_mode)
        return Reading([part], modules)

    def forward(self, input: Tensor) -> Tensor:
        """Shapes as the class says. Errors as torch's."""
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        else:  # noqa: RET505 (TorchScript compiles what follows an `if` without `else`)
            return self._automatic(input)

    def _run_eager(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


class InvertedResidual(Trained):
    """MobileNetV2's block, as `torchvision.models.mobilenetv2.InvertedResidual`.

    A 1x1 expansion (left out where expand_ratio is 1), a depthwise 3x3, a linear 1x1 projection, and the
    input added where its shape is the output's. [N, inp, H, W] -> [N, oup, Ho, Wo], in the memory format of
    the input, or in channels_last in train mode.

    Raises:
        ValueError: stride is neither 1 nor 2.
    """

    watched = ("use_res_connect",)

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        expand_ratio: float,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2 instead of {stride}")
        self.stride = stride
        norm_layer = norm_layer or nn.BatchNorm2d
        hidden = round(inp * expand_ratio)
        self.use_res_connect = stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvBNReLU6(inp, hidden, kernel_size=1, norm_layer=norm_layer))
        layers += [
            ConvBNReLU6(hidden, hidden, stride=stride, groups=hidden, norm_layer=norm_layer),
            nn.Conv2d(hidden, oup, 1, 1, 0, bias=False),
            norm_layer(oup),
        ]
        self.conv = nn.Sequential(*layers)
        self.out_channels = oup
        self._is_cn = stride > 1

    def read(self, prefix: str = "", any_mode: bool = False) -> Reading:
        prefix = f"{prefix}conv"
        check_module(self.conv, prefix, nn.Sequential, any_mode)
        children = list(self.conv)
        if len(children) not in (3, 4):
            raise Declined(f"{prefix} has {len(children)} children, not 3 or 4")
        modules: list[nn.Module] = [self.conv, *children]
        parts: list[Part] = []
        for i, child in enumerate(children[:-2]):
            check_module(child, f"{prefix}.{i}", ConvBNReLU6, any_mode)
            assert isinstance(child, ConvBNReLU6)
            inner = child.read(f"{prefix}.{i}.", any_mode)
            modules += inner.modules
            parts += inner.parts
        at = len(children) - 2
        names = f"{prefix}.{at}", f"{prefix}.{at + 1}"
        parts.append(read_conv(children[at], children[at + 1], False, *names, any_mode=any_mode))
        for (before, _), (after, _) in itertools.pairwise(parts):
            if before.spec.cout != after.spec.cin:
                raise Declined(f"{prefix}: {before.spec.cout} channels meet {after.spec.cin}")
        if self.use_res_connect:
            link, tensors = parts[-1]
            steps = [part.spec.stride for part, _ in parts]
            if max(steps) > 1 or parts[0][0].spec.cin != link.spec.cout:
                raise Declined(f"{prefix}: its input and its output do not add")
            parts[-1] = replace(link, spec=replace(link.spec, residual=len(parts) - 1)), tensors
        return Reading(parts, modules)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as the class says. Errors as torch's."""
        if torch.jit.is_scripting():
            if self.use_res_connect:
                return x + self.conv(x)
            else:  # noqa: RET505
                return self.conv(x)
        else:
            return self._automatic(x)

    def _run_eager(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


remember(ConvBNReLU6, InvertedResidual)
