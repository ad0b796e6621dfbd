"""MobileNetV2, as torchvision defines it, fast by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import env, training, training_head
from .arch import LAST_CHANNELS, SETTING, STEM_CHANNELS, make_divisible
from .backends.cpu import DTYPES
from .errors import UserError
from .nn import Automatic, ConvBNReLU6, InvertedResidual, Trained, log
from .packs import HOOKS
from .plans import train_chain
from .reading import (
    Declined,
    Part,
    Reading,
    autocast_dtype,
    check_module,
    decline_call,
    decline_training,
    device_type,
    read_linear,
)
from .weights import (
    ENGINE_FORMAT,
    HEAD,
    Preprocessing,
    check_state_dict,
    infer_width,
    labels_of,
    load_state_dict,
    num_classes,
    preprocessing_of,
)


def accelerate(model: nn.Module, *, backend: str = "auto") -> MobileNetV2:
    """A fast MobileNetV2 that holds the Parameter objects and buffers of `model`, which is unchanged.

    Its `state_dict` has torchvision's names. Training either trains both.

    Args:
        model: torchvision's MobileNetV2 (with any classifier), one of timm's `mobilenetv2_*`, or ours.
        backend: as for `MobileNetV2`.

    Raises:
        UserError: the model is none of these, or differs from them; the message names the layer.
        TypeError: model is no module.
    """
    from .adopt import adopt

    return adopt(model, backend)


class InputError(UserError, RuntimeError):
    """An input that is no batch of images. Both of the classes that torch raises for one."""


class MobileNetV2(Automatic):
    """MobileNetV2: [N, 3, H, W] -> [N, num_classes], on the kernels.

    In eval mode the whole network is one call of them, and so are features in eval mode that want no
    gradients, before a classifier that does. Else, in train mode, each element of `features` is one node of
    autograd, and pool and classifier are one.

    Source: Sandler et al., arXiv:1801.04381; structure, names and initialization are torchvision's.

    Args:
        num_classes: outputs of the classifier.
        width_mult: factor on every layer's channels.
        inverted_residual_setting: rows (t, c, n, s): expansion, channels, repeats, stride of the first.
        round_nearest: channels are a multiple of this; 1 turns rounding off.
        block: class of the blocks, by default `InvertedResidual`.
        norm_layer: class of the norms, by default `nn.BatchNorm2d`.
        dropout: before the linear layer.
        backend: "auto", "eager" (plain torch always), "cpu" or "triton"; `MNV2_BACKEND` where it is "auto".

    Raises:
        ValueError: a setting is empty or no row of four; the backend is none.
    """

    __jit_unused_properties__ = ["labels"]  # noqa: RUF012 (TorchScript's way to skip a property)

    def __init__(  # noqa: PLR0917 (torchvision's signature)
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        block: Callable[..., nn.Module] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        dropout: float = 0.2,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = env.check_backend(backend)
        setting = SETTING if inverted_residual_setting is None else inverted_residual_setting
        if len(setting) == 0 or len(setting[0]) != 4:
            raise ValueError(
                "inverted_residual_setting should be non-empty or a 4-element list, "
                f"got {inverted_residual_setting}"
            )
        block, norm_layer = block or InvertedResidual, norm_layer or nn.BatchNorm2d
        channels = make_divisible(STEM_CHANNELS * width_mult, round_nearest)
        self.last_channel = make_divisible(LAST_CHANNELS * max(1.0, width_mult), round_nearest)
        features: list[nn.Module] = [ConvBNReLU6(3, channels, stride=2, norm_layer=norm_layer)]
        for t, c, n, s in setting:
            cout = make_divisible(c * width_mult, round_nearest)
            for repeat in range(n):
                stride = s if repeat == 0 else 1
                features.append(block(channels, cout, stride, expand_ratio=t, norm_layer=norm_layer))
                channels = cout
        features.append(ConvBNReLU6(channels, self.last_channel, kernel_size=1, norm_layer=norm_layer))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(p=dropout), nn.Linear(self.last_channel, num_classes))
        self.preprocessing = Preprocessing()
        self._labels: list[str] | None = None
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits.

        Args:
            x: [N, 3, H, W], any N >= 0, H and W >= 1, any strides, on the parameters' device.

        Returns:
            [N, num_classes], of the dtype that torchvision's model returns.

        Raises:
            ValueError, RuntimeError: x is no batch of images (the error is both).
            TypeError: x is no tensor.
        """
        if torch.jit.is_scripting():
            return self._forward_impl(x)
        else:  # noqa: RET505 (TorchScript compiles what follows an `if` without `else`)
            return self._automatic(x)

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes; None where they are not known, and after a change of their number."""
        last = next(reversed(self.classifier._modules.values()), None)
        fits = self._labels is not None and getattr(last, "out_features", None) == len(self._labels)
        return self._labels if fits else None

    @labels.setter
    def labels(self, value: Sequence[str] | None) -> None:
        self._labels = None if value is None else list(value)

    @torch.jit.unused
    def _automatic(self, x: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            return self._compiled(x)
        return super()._automatic(x)

    def _compiled(self, x: Tensor) -> Tensor:
        """Under torch.compile: one operator that takes the weights and finds its pack at run time.

        What is read of the modules here is what a later change of makes torch compile again. On a GPU plain
        torch is compiled.
        """
        plain = x.dtype in DTYPES and x.device.type == "cpu" and x.dim() == 4
        if self.training or not plain or torch.is_autocast_enabled("cpu"):
            return self._run_eager(x)
        spec, keys, settings = _graph_constants(self)
        if not spec:
            return self._run_eager(x)
        for now, then in zip(_graph_settings(self), settings, strict=True):
            if now != then:  # never while tracing: the comparison is what guards the graph
                return self._run_eager(x)
        tensors: list[Tensor] = []
        for key in keys:
            owner: Any = self
            for name in key.split("."):
                owner = getattr(owner, name)
            tensors.append(owner)
        y = torch.ops.mnv2.network(x, tensors, spec)
        return y if keys[-1].startswith(HEAD) else self.classifier(y)

    def why_not(self, x: Any) -> str | None:
        why = super().why_not(x)
        if why is not None or not self.training or self._in_one_call(x) is not None:
            return why
        try:
            decline_call(x)
            decline_training(x, self._asked())
            for name, child in self.features.named_children():
                if not isinstance(child, Trained):
                    raise Declined(
                        f"features.{name} is a {type(child).__name__}, which trains in plain torch"
                    )
                child.decline_backend(device_type(x))
                chain = child.train_chain()
                if name == "0":
                    training.decline_input(x, chain)
        except Declined as reason:
            return str(reason)
        return None

    def _server(self, x: Any) -> Callable[[Tensor], Tensor]:
        if not self.training:
            return super()._server(x)
        self.decline_backend(device_type(x))
        try:
            self.decline_changes()
        except Declined as reason:
            log.debug("a model in train mode runs its own forward: %s", reason)
            return self._run_eager
        return self._in_one_call(x) or self._train  # what else may be amiss its children find themselves

    def _in_one_call(self, x: Any) -> Callable[[Tensor], Tensor] | None:
        """What serves a call in train mode whose features answer as in eval mode; None: nothing does."""
        if self.features.training or self._wants_features(x):
            return None
        try:
            return super()._server(x)
        except Declined as reason:
            log.debug("features in eval mode run one by one: %s", reason)
            return None

    def _wants_features(self, x: Any) -> bool:
        """Whether gradients of the features, or of what is before them, are asked for."""
        if not torch.is_grad_enabled():
            return False
        before = isinstance(x, Tensor) and x.requires_grad
        return before or any(p.requires_grad for p in self.features.parameters())

    def is_cut(self, x: Any) -> bool:
        # Else each step of the classifier would make a new pack, and its gradient compute the features again.
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in self.classifier.parameters()):
            return False
        return not self._wants_features(x)

    def decline_changes(self) -> None:
        super().decline_changes()
        if "_forward_impl" in self.__dict__:
            raise Declined("the model has a _forward_impl of its own")
        if type(self)._forward_impl is not _FORWARD_IMPL:
            raise Declined(f"{type(self).__name__} has a _forward_impl of its own")

    def decline_wrapped(self) -> None:
        """Look whether a call of the model is more than what `read` tells: a forward of its own, a hook.

        Raises:
            Declined: it is.
        """
        self.decline_changes()
        if "forward" in self.__dict__ or "_call_impl" in self.__dict__:
            raise Declined("the model has a forward of its own: del it")
        if type(self).forward is not _FORWARD:
            raise Declined(f"{type(self).__name__} has a forward of its own: give a plain MobileNetV2")
        if any(self.__dict__[hooks] for hooks in HOOKS):
            raise Declined("the model has a hook: remove it first")

    def _train(self, x: Tensor) -> Tensor:
        """In train mode: the elements of `features` by themselves, then the head."""
        self._check(x)
        y = self._train_features(x)
        if not y.requires_grad:  # the node is for its gradient
            return self._classify(y)
        try:
            weight, bias, dropout = self._train_head(y)
        except Declined as reason:
            log.debug("pool and classifier train in plain torch: %s", reason)
            return self._classify(y)
        return training_head.run(y, weight, bias, dropout)

    def _train_features(self, x: Tensor) -> Tensor:
        """Their elements by themselves, or joined where that is faster and nobody looks between them."""
        if training.joins(x) and self._wants_features(x):
            try:
                return training.run_joined(x, self._train_chain(x))
            except Declined as reason:
                log.debug("features train one by one: %s", reason)
        y: Tensor = self.features(x)
        return y

    def _train_chain(self, x: Tensor) -> training.TrainChain:
        """All features for the training kernels.

        Raises:
            Declined: these cannot serve x, or a module between them is to be called.
        """
        decline_call(x)
        decline_training(x, self._asked())
        chain = train_chain(self, self._holder, lambda: self._read_features(any_mode=True))
        training.decline_input(x, chain)
        return chain

    def _train_head(self, y: Tensor) -> tuple[Tensor, Tensor | None, float]:
        """Weight, bias and dropout of the classifier for such feature maps.

        Raises:
            Declined: pool and classifier are not what `training_head` knows, or torch has an error to raise.
        """
        decline_call(y)
        decline_training(y, self._asked())
        _, (weight, *rest) = self._read_classifier(y.shape[1], any_mode=True)
        if autocast_dtype(y.device) is None and any(t.dtype is not y.dtype for t in (weight, *rest)):
            raise Declined(f"classifier.1 is of another dtype than its input, {y.dtype}")
        dropout = self.classifier[0]
        assert isinstance(dropout, nn.Dropout)
        return weight, (rest[0] if rest else None), dropout.p if dropout.training else 0.0

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self._classify(self.features(x))

    def _classify(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        y: Tensor = self.classifier(x)
        return y

    def _run_eager(self, x: Tensor) -> Tensor:
        self._check(x)
        return self._forward_impl(x)

    def _check(self, x: Any) -> None:
        check_input(x, next(self.parameters(), None))

    def read(self, prefix: str = "", any_mode: bool = False) -> Reading:
        found = self._read_features(prefix, any_mode)
        try:
            linear = self._read_classifier(found.parts[-1][0].spec.cout, any_mode)
        except Declined:
            return found
        return Reading([*found.parts, linear], [*found.modules, self.classifier, *self.classifier])

    def read_cut(self) -> Reading:
        return self._read_features()

    def _read_features(self, prefix: str = "", any_mode: bool = False) -> Reading:
        """The features and their mean over H and W, before a classifier that is torch's."""
        check_module(self.features, "features", nn.Sequential, any_mode)
        parts: list[Part] = []
        modules: list[nn.Module] = [self.features]
        for i, child in enumerate(self.features):
            if type(child) not in (ConvBNReLU6, InvertedResidual):
                kind = type(child).__name__
                raise Declined(f"features.{i} is a {kind}, not a ConvBNReLU6 or InvertedResidual")
            check_module(child, f"features.{i}", type(child), any_mode)
            assert isinstance(child, Automatic)
            inner = child.read(f"{prefix}features.{i}.", any_mode)
            if parts and parts[-1][0].spec.cout != inner.parts[0][0].spec.cin:
                raise Declined(f"features.{i} does not take what features.{i - 1} gives")
            parts += inner.parts
            modules += [child, *inner.modules]
        if parts[0][0].spec.kind != "stem" or parts[-1][0].spec.kind != "pointwise":
            raise Declined("features do not begin with a stem and end with a pointwise layer")
        return Reading(parts, modules, True, self.classifier)

    def _read_classifier(self, features: int, any_mode: bool) -> Part:
        check_module(self.classifier, "classifier", nn.Sequential, any_mode)
        if len(self.classifier) != 2:
            raise Declined("classifier is not (Dropout, Linear)")
        dropout, linear = self.classifier
        check_module(dropout, "classifier.0", nn.Dropout, any_mode)
        return read_linear(linear, features, "classifier.1")


_FORWARD, _FORWARD_IMPL = MobileNetV2.forward, MobileNetV2._forward_impl  # as defined


def _graph_settings(model: nn.Module) -> list[object]:
    """What a compiled graph takes for constant, besides the classes of the modules.

    A forward put on a module after the first call is not among it: torch guards no such attribute.
    """
    settings: list[object] = [model.backend]
    for module in model.modules():
        settings.append(module.training)
        if isinstance(module, nn.BatchNorm2d):
            settings += [module.eps, module.track_running_stats]
        elif isinstance(module, nn.Conv2d):
            settings += [*module.stride, *module.padding, *module.dilation, module.groups]
            settings.append(module.padding_mode)
        elif isinstance(module, nn.ReLU6):
            settings += [module.min_val, module.max_val]
        elif isinstance(module, nn.Sequential):
            settings.append(len(module))
        elif isinstance(module, InvertedResidual):
            settings.append(module.use_res_connect)
    return settings


def _graph_constants(model: MobileNetV2) -> tuple[str, tuple[str, ...], tuple[object, ...]]:
    """What a compiled graph holds of a model: the chain, its tensors' names, the settings it stands on.

    The chain is empty where the model declines.
    """
    try:
        model.decline_backend("cpu")
        model.decline_changes()
        reading = model.read()
    except Declined as reason:
        log.debug("MobileNetV2 compiles to plain torch: %s", reason)
        return "", (), ()
    chain = replace(reading.chain, holder=model._holder.number)
    keys = tuple(key for link in chain.links for key in link.keys)
    return chain.encode(), keys, tuple(_graph_settings(model))


# As torch.compiler.assume_constant_result marks it, without the second that importing torch._dynamo takes.
_graph_constants._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_input(x: Any, weight: Tensor | None) -> None:
    """Say in one line what is wrong with an input that torch would refuse, or that is no image.

    Args:
        x: the input.
        weight: of the model, whose dtype and device the input must have; None: not compared.

    Raises:
        InputError: wrong rank, channels, size, dtype or device.
        TypeError: no tensor.
    """
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
        return  # a size is no number there
    if not isinstance(x, Tensor):
        raise TypeError(
            f"expected a tensor [N, 3, H, W], got a {type(x).__name__}: convert with torch.as_tensor"
        )
    if x.dim() != 4:
        raise InputError(
            f"expected 4D input [N, 3, H, W] (got {x.dim()}D input of shape {tuple(x.shape)}): "
            "add the batch dimension to one image with x[None]"
        )
    if x.shape[1] != 3:
        raise InputError(
            f"expected input[{', '.join(map(str, x.shape))}] to have 3 channels, "
            f"but got {x.shape[1]} channels instead: the layout is [N, 3, H, W]"
        )
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise InputError(f"H and W must be at least 1, got the shape {tuple(x.shape)}")
    if x.layout is not torch.strided:
        raise InputError(f"the input has the layout {x.layout}: convert with x.to_dense()")
    if weight is None:
        return
    if x.device != weight.device:
        raise InputError(
            f"the input is on {x.device}, the model on {weight.device}: move one of them with .to()"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        bytes_too = (
            ", or use mnv2_fast.compile(model), which takes uint8 images" if x.dtype == torch.uint8 else ""
        )
        raise InputError(
            f"input type {x.dtype} and weight type {weight.dtype} should be the same: "
            f"convert with x.to({weight.dtype}){bytes_too}"
        )


def _initialize(model: nn.Module) -> None:
    """torchvision's initialization, drawn in its order."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
            nn.init.zeros_(m.bias)


def mobilenet_v2(
    weights: object = None, pretrained: bool = False, progress: bool = True, **kwargs: Any
) -> MobileNetV2:
    """A MobileNetV2, with trained weights where they are asked for.

    Args:
        weights: None, "IMAGENET1K_V1", "IMAGENET1K_V2", "DEFAULT" (V2), a member of torchvision's enum, or
            the path of a file. True is the older spelling of "IMAGENET1K_V1", as `pretrained=True` is.
        pretrained: the older spelling.
        progress: draw a bar while downloading.
        **kwargs: of `MobileNetV2`. By default the class count and width are those of the weights.

    Raises:
        UserError: the weights are not to be had, or do not fit the network asked for.
    """
    if weights is None or isinstance(weights, bool):
        weights = "IMAGENET1K_V1" if weights or pretrained else None
    if weights is None:
        return MobileNetV2(**kwargs)
    state, metadata = load_state_dict(weights, progress)
    source = str(weights)
    if metadata.get("format") == ENGINE_FORMAT:
        raise UserError(f"{source} is an engine, which has no modules: use mnv2_fast.load({source!r})")
    classes = num_classes(state)
    wanted = kwargs.setdefault("num_classes", 1000 if classes is None else classes)
    if classes is not None and wanted != classes:
        raise UserError(
            f"{source} has {classes} classes, {wanted} are wanted: use num_classes={classes}, "
            f"then model.classifier[1] = nn.Linear(model.last_channel, {wanted})"
        )
    if "width_mult" not in kwargs and "inverted_residual_setting" not in kwargs:
        kwargs["width_mult"] = infer_width(state, source)
    model = MobileNetV2(**kwargs)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check_state_dict(state, expected, source)
    model.load_state_dict(state)
    model.preprocessing = preprocessing_of(metadata)
    model.labels = labels_of(metadata, wanted)
    return model
