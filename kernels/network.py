"""The whole network on a GPU, batch norm folded: which kernel makes which layers, and the launches in order.

On sm_90, in fp16 and bf16, whole blocks are one launch each where they have a geometry and fit on the chip
(`fuse`); everywhere else, and for every other size, each layer is one. Nothing here waits for the GPU but the
packing of weights, which are packed for the form that a call needs when it first comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from . import head, inverted_residual, pointwise
from .common import arithmetic, device_of, tiles
from .depthwise import depthwise, pack_weight
from .inverted_residual import STEM_SIZE, Form, Packed
from .stem import stem


class Spec(Protocol):
    """What a layer is: as `mnv2_fast.arch.LayerSpec` has it."""

    @property
    def kind(self) -> str: ...
    @property
    def stride(self) -> int: ...
    @property
    def relu6(self) -> bool: ...
    @property
    def residual(self) -> int: ...


@dataclass(frozen=True)
class Launch:
    """Layers that one kernel makes. `first`: their number; `count`: how many they are; `form`: by what."""

    form: str
    first: int
    count: int


Pair = tuple[torch.Tensor, torch.Tensor]


class Network:
    """A chain from the stem to the classifier, as `Chain.fold` gives its layers.

    Args:
        specs: the layers; the last two are a pointwise one and the classifier.
        tensors: weight and bias of each, float32, batch norm folded in, in torch's layout.
        dtype: float32, float16 or bfloat16, of activations and weights.
        device: to run on.
        norm: [2, 3], what makes a number of a byte, see `stem.stem`.
        tf32: multiply float32 as TF32; in full precision otherwise.
        fuse: whole blocks in one launch where there is a form for them.

    Raises:
        ValueError: a layer is none that the kernels know, or whole blocks are asked for in float32.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        tensors: Sequence[Pair],
        dtype: torch.dtype,
        device: torch.device,
        *,
        norm: torch.Tensor,
        tf32: bool = False,
        fuse: bool = False,
    ) -> None:
        kinds = [spec.kind for spec in specs]
        if kinds[0] != "stem" or kinds[-2:] != ["pointwise", "linear"] or not specs[-2].relu6:
            raise ValueError(f"a network goes from a stem to a head, not {kinds[0]} to {kinds[-2:]}")
        if any(spec.residual and spec.kind != "pointwise" for spec in specs):
            raise ValueError("only a pointwise layer adds a residual")
        if fuse and dtype not in inverted_residual.DTYPES:
            raise ValueError(f"whole blocks are of float16 and bfloat16, not {dtype}: leave fuse out")
        self.specs, self.dtype, self.tf32, self.fuse = tuple(specs), dtype, tf32, fuse
        self.device, self.norm = device, norm.to(device)
        # Packed here and copied in one piece: what arrives is there for all streams.
        self._wide = [tuple(t.detach().to("cpu", torch.float32, copy=True) for t in pair) for pair in tensors]
        self._forms = dict(self._whole_blocks()) if fuse else {}
        self._layers: dict[int, Pair] = {}
        self._blocks: dict[int, Packed] = {}
        in_blocks = {first + j for first in self._forms for j in range(3)}
        for i in set(range(len(specs))) - in_blocks:
            self._layer(i)
        if not in_blocks:
            self._wide.clear()

    def _whole_blocks(self) -> Iterator[tuple[int, Form]]:
        """The blocks that one launch could make, by the number of their first layer."""
        name, size = device_of(self.device)[0], 224
        for i, (a, b, c) in enumerate(zip(self.specs, self.specs[1:], self.specs[2:], strict=False)):
            before, size = size, (size - 1) // a.stride + 1
            kinds = a.kind, b.kind, c.kind, a.relu6, b.relu6, c.relu6
            residual, stem = c.residual == 2, a.kind == "stem"
            if kinds[1:] != ("depthwise", "pointwise", True, True, False) or c.residual not in (0, 2):
                continue
            if a.kind == "pointwise" or (stem and b.stride == 1 and not residual):
                # The slab of its map in photos of 224 x 224, and of other maps with the same.
                tile = (
                    tiles(name, "block")["stem"]
                    if stem
                    else inverted_residual.choose_tile(name, before, b.stride)
                )
                cin, cout = self._wide[i][0].shape[1], len(self._wide[i + 2][0])
                yield i, Form(cin, cout, b.stride, residual, tile["slab"], stem)

    def _layer(self, i: int) -> Pair:
        """Weight and bias of a layer as a launch of its own reads them."""
        if i not in self._layers:
            weight, bias = (t.to(self.dtype) for t in self._wide[i])
            weight = pack_weight(weight) if self.specs[i].kind == "depthwise" else weight
            self._layers.setdefault(i, (weight.to(self.device), bias.to(self.device)))
        return self._layers[i]

    def _whole_block(self, i: int) -> Packed:
        """The weights of the block that begins with layer i."""
        if i not in self._blocks:
            form, names = self._forms[i], ("expand", "depthwise", "project")
            weights = {key: self._wide[i + j][0] for j, key in enumerate(names)}
            weights |= {f"{key}_bias": self._wide[i + j][1] for j, key in enumerate(names)}
            packed = inverted_residual.pack(weights, form.stride, form.residual, self.dtype, form.slab)
            self._blocks.setdefault(i, packed.to(self.device))
        return self._blocks[i]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights and biases that are packed by now, for whole blocks and for single layers."""
        packed = [block.tensors for block in self._blocks.values()]
        return sum(t.numel() * t.element_size() for some in (*self._layers.values(), *packed) for t in some)

    def plan(self, h: int, w: int) -> list[Launch]:
        """The launches for photos of h x w, in order. The last one is of the head: two kernels."""
        launches, i, last = [], 0, len(self.specs) - 2
        while i < last:
            count = 3 if self._whole(i, h, w) else 1
            spec = self.specs[i]
            launches.append(Launch("block" if count == 3 else spec.kind, i, count))
            for spec in self.specs[i : i + count]:
                h, w = (h - 1) // spec.stride + 1, (w - 1) // spec.stride + 1
            i += count
        return [*launches, Launch("head", last, 2)]

    def _whole(self, i: int, h: int, w: int) -> bool:
        """Whether one launch makes the block that begins with layer i, whose input is h x w."""
        form = self._forms.get(i)
        if form is None:
            return False
        name = device_of(self.device)[0]
        if form.stem:
            h, w, tile = (h + 1) // 2, (w + 1) // 2, tiles(name, "block")["stem"]
        else:
            tile = inverted_residual.choose_tile(name, h, form.stride)
        return inverted_residual.declines(form, h, w, tile) is None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of photos.

        Args:
            x: [N, 3, H, W], of the network's dtype or float32, any strides; or uint8 [N, H, W, 3].

        Returns:
            [N, classes], float32.
        """
        from_bytes = x.dtype == torch.uint8
        norm = self.norm if from_bytes else None
        x = x.permute(0, 3, 1, 2) if from_bytes else x
        # A residual counts layers back; what is further back may be freed.
        kept = 1 + max(spec.residual for spec in self.specs)
        inputs = [x]
        for launch in self.plan(*x.shape[2:]):
            y = getattr(self, f"_{launch.form}")(launch, inputs, norm)
            inputs = [*inputs, *[y] * launch.count][-kept:]
        return inputs[-1].float()

    def _block(self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
        packed = self._whole_block(launch.first)
        if packed.stem:
            return inverted_residual.stem_block(inputs[-1], packed, norm=norm)
        return inverted_residual.block(inputs[-1], packed)

    def _stem(self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
        x = inputs[-1] if norm is not None else inputs[-1].to(self.dtype)
        return stem(x, *self._layer(0), self.specs[0].relu6, norm=norm, tf32=self.tf32)

    def _depthwise(
        self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None
    ) -> torch.Tensor:
        spec = self.specs[launch.first]
        return depthwise(inputs[-1], *self._layer(launch.first), spec.stride, spec.relu6)

    def _pointwise(
        self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None
    ) -> torch.Tensor:
        spec = self.specs[launch.first]
        residual = inputs[-spec.residual - 1] if spec.residual else None
        layer = self._layer(launch.first)
        return pointwise.pointwise(inputs[-1], *layer, residual, spec.relu6, tf32=self.tf32)

    def _head(self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
        return head.head(
            inputs[-1], *self._layer(launch.first), *self._layer(launch.first + 1), tf32=self.tf32
        )

    def traffic(self, n: int, h: int, w: int, item: int) -> int:
        """Bytes that all launches read and write for n photos of h x w, of `item` bytes a number.

        As the kernels' own `traffic` counts them: unique addresses of each program, weights included.

        Raises:
            ValueError: a layer of its own has no count.
        """
        total = 0
        kind = arithmetic(self.dtype, self.tf32)
        for launch in self.plan(h, w):
            if launch.form == "block":
                packed = self._whole_block(launch.first)
                size = STEM_SIZE if packed.stem else h
                total += sum(inverted_residual.traffic(packed, n, size, item if packed.stem else 2))
            elif launch.form == "head":
                total += head.traffic(
                    n, h * w, self._layer(launch.first)[0], self._layer(launch.first + 1)[0], kind
                )
            else:
                raise ValueError(f"{launch.form} as a layer of its own has no count")
            for spec in self.specs[launch.first : launch.first + launch.count]:
                h, w = (h - 1) // spec.stride + 1, (w - 1) // spec.stride + 1
        return total
