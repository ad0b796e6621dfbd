"""The whole network on a GPU, batch norm folded: which kernel makes which layers, and the launches in order.

On sm_90, in fp16 and bf16, whole blocks are one launch each where they have a geometry (`fuse`); everywhere
else, and for every other size, each layer is one, or depthwise and projection together are (`project`, which
has not been seen to be faster). Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from . import depthwise as depthwise_layer
from . import depthwise_project, head, inverted_residual, pointwise
from . import stem as stem_layer
from .common import arithmetic, device_of, tiles
from .depthwise import depthwise, pack_weight
from .inverted_residual import GEOMETRIES, STEM_SIZE, Packed
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
        project: a depthwise layer and the linear 1x1 layer behind it in one launch, outside of whole blocks.

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
        project: bool = False,
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
        self.project = project
        wide = [
            (weight.to(device, torch.float32), bias.to(device, torch.float32)) for weight, bias in tensors
        ]
        self._layers = [(weight.to(dtype), bias.to(dtype)) for weight, bias in wide]
        for i, spec in enumerate(specs):
            if spec.kind == "depthwise":
                self._layers[i] = pack_weight(self._layers[i][0]), self._layers[i][1]
        self._blocks = dict(self._pack(wide)) if fuse else {}

    def _pack(self, wide: Sequence[Pair]) -> Iterator[tuple[int, Packed]]:
        """The blocks that one launch could make, by the number of their first layer."""
        name = device_of(self.device)[0]
        for i, (a, b, c) in enumerate(zip(self.specs, self.specs[1:], self.specs[2:], strict=False)):
            kinds = a.kind, b.kind, c.kind, a.relu6, b.relu6, c.relu6
            residual = c.residual == 2
            if kinds[1:] != ("depthwise", "pointwise", True, True, False) or c.residual not in (0, 2):
                continue
            if a.kind == "pointwise" or (a.kind == "stem" and b.stride == 1 and not residual):
                names = ("expand", "depthwise", "project")
                weights = {key: wide[i + j][0] for j, key in enumerate(names)}
                weights |= {f"{key}_bias": wide[i + j][1] for j, key in enumerate(names)}
                # Sizes of one stride share a slab, or each would need weights of its own.
                row = "stem" if a.kind == "stem" else self._row(i, b.stride, wide[i][0].shape[0])
                slab = tiles(name, "block")[row]["slab"]
                yield i, inverted_residual.pack(weights, b.stride, residual, self.dtype, slab)

    def _row(self, i: int, stride: int, hidden: int) -> str:
        """The tile table's row for the block at layer i in photos of 224 x 224."""
        size = 224
        for spec in self.specs[:i]:
            size = (size - 1) // spec.stride + 1
        size = min((known for known, of in GEOMETRIES if of == stride), key=lambda known: abs(known - size))
        return f"{size}_s{stride}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and biases, those of whole blocks included."""
        packed = [
            (block.expand, block.depthwise, block.shift, block.project, block.out_shift)
            for block in self._blocks.values()
        ]
        return sum(t.numel() * t.element_size() for some in (*self._layers, *packed) for t in some)

    def plan(self, h: int, w: int) -> list[Launch]:
        """The launches for photos of h x w, in order. The last one is of the head: two kernels."""
        launches, i, last = [], 0, len(self.specs) - 2
        while i < last:
            count = 3 if self._whole(i, h, w) else 2 if self._projects(i) else 1
            form = {1: self.specs[i].kind, 2: "depthwise_project", 3: "block"}[count]
            launches.append(Launch(form, i, count))
            for spec in self.specs[i : i + count]:
                h, w = (h - 1) // spec.stride + 1, (w - 1) // spec.stride + 1
            i += count
        return [*launches, Launch("head", last, 2)]

    def _whole(self, i: int, h: int, w: int) -> bool:
        """Whether one launch makes the block that begins with layer i, whose input is h x w."""
        packed = self._blocks.get(i)
        if packed is None:
            return False
        if packed.stem:
            return ((h + 1) // 2, (w + 1) // 2) == (STEM_SIZE, STEM_SIZE)
        row = f"{h}_s{packed.stride}"
        table = tiles(device_of(self.device)[0], "block")
        return h == w and (h, packed.stride) in GEOMETRIES and table[row]["slab"] == packed.slab

    def _projects(self, i: int) -> bool:
        """Whether one launch makes layers i and i + 1, outside of a whole block."""
        kinds = [(spec.kind, spec.relu6) for spec in self.specs[i : i + 2]]
        return self.project and kinds == [("depthwise", True), ("pointwise", False)]

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
        packed = self._blocks[launch.first]
        if packed.stem:
            return inverted_residual.stem_block(inputs[-1], packed, norm=norm)
        return inverted_residual.block(inputs[-1], packed)

    def _stem(self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
        x = inputs[-1] if norm is not None else inputs[-1].to(self.dtype)
        return stem(x, *self._layers[0], self.specs[0].relu6, norm=norm, tf32=self.tf32)

    def _depthwise(
        self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None
    ) -> torch.Tensor:
        spec = self.specs[launch.first]
        return depthwise(inputs[-1], *self._layers[launch.first], spec.stride, spec.relu6)

    def _depthwise_project(
        self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None
    ) -> torch.Tensor:
        first, last = self.specs[launch.first : launch.first + 2]
        # Counted back from the input of the 1x1 layer, which is not among them.
        residual = inputs[-last.residual] if last.residual else None
        spread, project = self._layers[launch.first : launch.first + 2]
        return depthwise_project.depthwise_project(
            inputs[-1], spread, project, first.stride, residual, tf32=self.tf32
        )

    def _pointwise(
        self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None
    ) -> torch.Tensor:
        spec = self.specs[launch.first]
        residual = inputs[-spec.residual - 1] if spec.residual else None
        layer = self._layers[launch.first]
        return pointwise.pointwise(inputs[-1], *layer, residual, spec.relu6, tf32=self.tf32)

    def _head(self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
        return head.head(inputs[-1], *self._layers[-2], *self._layers[-1], tf32=self.tf32)

    def traffic(self, n: int, h: int, w: int, item: int) -> int:
        """Bytes that all launches read and write for n photos of h x w, of `item` bytes a number.

        As the kernels' own `traffic` counts them: unique addresses of each program, weights included.
        """
        total = 0
        kind = arithmetic(self.dtype, self.tf32)
        for launch in self.plan(h, w):
            if launch.form == "block":
                packed = self._blocks[launch.first]
                size = STEM_SIZE if packed.stem else h
                total += sum(inverted_residual.traffic(packed, n, size, item if packed.stem else 2))
            elif launch.form == "head":
                total += head.traffic(n, h * w, self._layers[-2][0], self._layers[-1][0], kind)
            else:
                total += self._layer_traffic(launch, (n, h, w), item)
            for spec in self.specs[launch.first : launch.first + launch.count]:
                h, w = (h - 1) // spec.stride + 1, (w - 1) // spec.stride + 1
        return total

    def _layer_traffic(self, launch: Launch, size: tuple[int, int, int], item: int) -> int:
        """Bytes of a launch of one or two layers, for N maps of H x W; `item`: of a photo's numbers."""
        i, (n, h, w) = launch.first, size
        spec, weight = self.specs[i], self._layers[i][0]
        own, kind = weight.element_size(), arithmetic(self.dtype, self.tf32)
        if spec.kind == "stem":
            tile = tiles(device_of(self.device)[0], "stem")[kind]
            return stem_layer.traffic((n, 3, h, w), len(weight), own, tile, from_bytes=item == 1)
        shape = n, len(weight), h, w
        if launch.count == 2:
            pixels = n * ((h - 1) // spec.stride + 1) * ((w - 1) // spec.stride + 1)
            cout = len(self._layers[i + 1][0])
            tile = depthwise_project.choose_tile(self.device, pixels, len(weight), cout, kind)
            # The input itself as a residual is read under the windows already.
            residual = self.specs[i + 1].residual > 1
            return depthwise_project.traffic(shape, cout, spec.stride, own, tile, residual=residual)
        if spec.kind == "depthwise":
            tile = depthwise_layer.choose_tile(self.device, shape, spec.stride)
            return depthwise_layer.traffic(shape, spec.stride, own, tile)
        cout, cin = weight.shape[:2]
        tile = pointwise.choose_tile(self.device, n * h * w, cin, cout, kind)
        return pointwise.traffic(n * h * w, cin, cout, own, tile, residual=spec.residual > 0)
