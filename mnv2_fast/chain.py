"""A chain: convolutions in a row, each with its batch norm, ReLU6 and residual, and perhaps a pooled linear
layer.

It is the form in which modules hand their work to kernels: `MobileNetV2` is one chain, so is each of its
blocks. A chain names no tensor; the tensors it works on come beside it as one flat list, in the order of
`Chain.names`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from .arch import LayerSpec

_CONV = ("weight", "bias")
_NORM = ("running_mean", "running_var")
_AFFINE = ("norm_weight", "norm_bias")


def weight_dtype(kind: str, dtype: str) -> torch.dtype:
    """How a network of `dtype` keeps the weight of a layer of `kind`; biases are float32.

    In bf16 the stem and the depthwise layers keep float32: they are 2% of the weights, multiply in float32,
    and rounded they doubled the logits' error (0.087 root mean square on 200 photos, 0.041 so).
    """
    return torch.bfloat16 if dtype == "bf16" and kind in ("pointwise", "linear") else torch.float32


@dataclass(frozen=True)
class Link:
    """One layer as its modules have it, before batch norm is folded in.

    `bias`: the convolution (or linear layer) has one. `norm`: batch norm follows, with `eps`; `affine`: and
    scales.
    """

    spec: LayerSpec
    bias: bool = False
    norm: bool = True
    affine: bool = True
    eps: float = 1e-5

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors in order, those it has of weight, bias, norm_weight, norm_bias, running_mean/_var."""
        return (
            *(_CONV if self.bias else _CONV[:1]),
            *(_AFFINE if self.norm and self.affine else ()),
            *(_NORM if self.norm else ()),
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors' names in the `state_dict`, in the same order."""
        return tuple(
            f"{self.spec.conv}.{name}" if name in _CONV else f"{self.spec.bn}.{name.removeprefix('norm_')}"
            for name in self.names
        )

    def fold(self, tensors: dict[str, Tensor], dtype: str = "fp32") -> tuple[Tensor, Tensor]:
        """The layer's weight of `weight_dtype` and its float32 bias, batch norm folded in, rounded once from
        float64.

        Both are new memory. By numpy: torch would share each of these small products among its threads, which
        on busy cores takes 20 times as long as the work (350 ms for the network, 12 so).
        """
        weight = _array(tensors["weight"])
        wide = {
            name: _array(tensor).astype(np.float64) for name, tensor in tensors.items() if name != "weight"
        }
        shift, scale = wide.get("bias", np.zeros(weight.shape[0])), np.ones(1)
        if self.norm:
            scale = 1 / np.sqrt(wide["running_var"] + self.eps)
            if self.affine:
                scale = scale * wide["norm_weight"]
            shift = (shift - wide["running_mean"]) * scale
            if self.affine:
                shift = shift + wide["norm_bias"]
        folded = np.empty(weight.shape, np.float32)
        column = scale.reshape(-1, *(1,) * (weight.ndim - 1))
        # In the precision of `dtype`, a few thousand numbers at a time: no float64 copy of the weights.
        np.multiply(weight, column, out=folded, dtype=np.float64, casting="same_kind")
        bias = torch.from_numpy(shift.astype(np.float32))
        if weight_dtype(self.spec.kind, dtype) is torch.float32:
            return torch.from_numpy(folded), bias
        _break_ties(folded, weight, column)
        return torch.from_numpy(_upper_halves(folded)).view(torch.bfloat16), bias


@dataclass(frozen=True)
class Chain:
    """Links, first to last. `pool`: a chain that ends in a convolution gives its mean over H and W."""

    links: tuple[Link, ...]
    pool: bool = False
    holder: int = 0  # number of the `packs.Holder` that keeps its pack where a graph names the chain; 0: none

    @property
    def specs(self) -> list[LayerSpec]:
        """The layers as the backends take them."""
        return [link.spec for link in self.links]

    @property
    def pooled(self) -> bool:
        """Whether the result is [N, C], not [N, C, H, W]."""
        return self.pool or self.links[-1].spec.kind == "linear"

    @property
    def count(self) -> int:
        """Number of tensors that the chain reads."""
        return sum(len(link.names) for link in self.links)

    def split(self, tensors: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The flat list as one dict per link."""
        it = iter(tensors)
        return [{name: next(it) for name in link.names} for link in self.links]

    def fold(self, tensors: Sequence[Tensor], dtype: str = "fp32") -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of every link with batch norm folded in, of `weight_dtype`, in torch's layout."""
        return [link.fold(named, dtype) for link, named in zip(self.links, self.split(tensors), strict=True)]

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the result for an input of `shape`, [N, C, H, W]."""
        n, _, h, w = shape
        for link in self.links:
            h, w = (h - 1) // link.spec.stride + 1, (w - 1) // link.spec.stride + 1
        channels = self.links[-1].spec.cout
        return (n, channels) if self.pooled else (n, channels, h, w)

    def encode(self) -> str:
        """The chain as JSON; `decode` reads it."""
        return json.dumps(
            {"pool": self.pool, "holder": self.holder, "links": [asdict(link) for link in self.links]}
        )

    @staticmethod
    def decode(text: str) -> Chain:
        """The chain that `encode` wrote."""
        return _decode(text)


def _array(tensor: Tensor) -> np.ndarray:
    """The values of a tensor for numpy, which has no bfloat16."""
    plain = tensor.detach().resolve_neg()
    known = plain if plain.dtype in (torch.float32, torch.float64) else plain.float()
    return np.from_dlpack(known)  # Tensor.numpy would forbid resizing the model's own storage for good


def _upper_halves(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16, ties to even; by numpy for the reason of `fold`."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = bits[nan] >> 16 | 0x40
    return rounded.astype(np.uint16).view(np.int16)


def _break_ties(folded: np.ndarray, weight: np.ndarray, column: np.ndarray) -> None:
    """Move products that float32 rounded to halfway between two bfloat16 to the side where they were."""
    low = folded.reshape(-1).view(np.uint32) & 0xFFFF
    ties = np.unravel_index(np.flatnonzero(low == 0x8000), folded.shape)
    exact = weight[ties].astype(np.float64) * np.broadcast_to(column, weight.shape)[ties]
    rounded = folded[ties]
    side = np.where(exact > rounded, np.inf, -np.inf).astype(np.float32)
    folded[ties] = np.where(exact == rounded, rounded, np.nextafter(rounded, side))


@functools.lru_cache(maxsize=64)
def _decode(text: str) -> Chain:
    data = json.loads(text)
    links = tuple(Link(**{**link, "spec": LayerSpec(**link["spec"])}) for link in data["links"])
    return Chain(links, data["pool"], data["holder"])
