"""The whole network on a GPU, batch norm folded: which kernel makes which layers, and the launches in order.

On sm_90, in fp16 and bf16, whole blocks are one launch each where they have a geometry (`fuse`); everywhere
else, and for every other size, each layer is one. An operator whose kernel is off, or cannot take an input,
is the caller's function in plain torch, among the other launches. Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from triton.errors import TritonError

from . import head, inverted_residual, pointwise
from .common import arithmetic, device_of, tiles
from .depthwise import depthwise, limit, pack_weight
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
# An operator in plain torch: `(x, weight, bias, ...)`, as its launcher without what is passed by name.
Plain = Callable[..., torch.Tensor]


def refuses(specs: Sequence[Spec], pool: bool = False) -> str | None:
    """Why such layers are no chain that a `Network` makes, or None."""
    kinds = [spec.kind for spec in specs]
    if "stem" in kinds[1:] or "linear" in kinds[:-1]:
        return "a stem comes first and a linear layer last"
    if any(spec.residual and spec.kind != "pointwise" for spec in specs):
        return "only a pointwise layer adds a residual"
    if pool or kinds[-1] == "linear":
        last = specs[-2:-1] if kinds[-1] == "linear" else specs[-1:]
        if not last or last[0].kind != "pointwise" or not last[0].relu6 or last[0].residual:
            return "a head's mean is of a pointwise layer with ReLU6"
    return None


class Network:
    """A chain of layers as `Chain.fold` gives them, such as that from the stem to the classifier.

    Args:
        specs: the layers; a stem only as the first, a linear one only as the last.
        tensors: weight and bias of each, float32, batch norm folded in, in torch's layout.
        dtype: float32, float16 or bfloat16, of activations and weights.
        device: to run on.
        norm: [2, 3], what makes a number of a byte, see `stem.stem`; needed for bytes alone.
        tf32: multiply float32 as TF32; in full precision otherwise.
        fuse: whole blocks in one launch where there is a form for them.
        pool: a chain that ends in a pointwise layer gives its mean over H and W.
        answer: dtype of the answer.
        plain: operators in plain torch, by name, for those that are off and for inputs past a kernel's limit.
        off: those of them whose kernels are not used, and why; a kernel that turns out not to fit on the GPU
            is added.

    Raises:
        ValueError: such a chain is not made (see `refuses`), or whole blocks are asked for in float32.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        tensors: Sequence[Pair],
        dtype: torch.dtype,
        device: torch.device,
        *,
        norm: torch.Tensor | None = None,
        tf32: bool = False,
        fuse: bool = False,
        pool: bool = False,
        answer: torch.dtype = torch.float32,
        plain: Mapping[str, Plain] | None = None,
        off: dict[str, str] | None = None,
    ) -> None:
        if refused := refuses(specs, pool):
            raise ValueError(refused)
        if fuse and dtype not in inverted_residual.DTYPES:
            raise ValueError(f"whole blocks are of float16 and bfloat16, not {dtype}: leave fuse out")
        self.specs, self.dtype, self.tf32, self.fuse = tuple(specs), dtype, tf32, fuse
        self.device, self.norm = device, None if norm is None else norm.to(device)
        self.answer, self._plain, self.off = answer, dict(plain or {}), {} if off is None else off
        # Layers of the head, which is two kernels' work: the mean of the last 1x1 layer, and a classifier.
        self._head_layers = 2 if specs[-1].kind == "linear" else 1 if pool else 0
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
        """The launches for photos of h x w, in order. The last one is of the head, where there is one."""
        launches, i, last = [], 0, len(self.specs) - self._head_layers
        while i < last:
            count = 3 if self._whole(i, h, w) else 1
            spec = self.specs[i]
            launches.append(Launch("block" if count == 3 else spec.kind, i, count))
            for spec in self.specs[i : i + count]:
                h, w = (h - 1) // spec.stride + 1, (w - 1) // spec.stride + 1
            i += count
        return [*launches, Launch("head", last, self._head_layers)] if self._head_layers else launches

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

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The chain's answer, such as logits of photos.

        Args:
            x: [N, C, H, W], of the network's dtype or any other float, any strides; or uint8 [N, H, W, 3].

        Returns:
            [N, classes] or [N, C] of a head, else [N, C, HO, WO] in channels_last; of the dtype `answer`.

        Raises:
            ValueError: x is of bytes and the network has no norm for them.
        """
        from_bytes = x.dtype == torch.uint8
        if from_bytes and self.norm is None:
            raise ValueError("bytes are made numbers by a norm: give the network one")
        norm = self.norm if from_bytes else None
        x = x.permute(0, 3, 1, 2) if from_bytes else x if self.specs[0].kind == "stem" else x.to(self.dtype)
        # A residual counts layers back; what is further back may be freed.
        kept = 1 + max(spec.residual for spec in self.specs)
        inputs = [x]
        for launch in self.plan(*x.shape[2:]):
            y = getattr(self, f"_{launch.form}")(launch, inputs, norm)
            inputs = [*inputs, *[y] * launch.count][-kept:]
        return inputs[-1].to(self.answer)

    def _by(
        self,
        operator: str,
        x: torch.Tensor,
        ours: Callable[[], torch.Tensor],
        torchs: Callable[[Plain], torch.Tensor],
    ) -> torch.Tensor:
        """A layer by its kernel, or by torch where that is off, x is too large, or it does not fit here."""
        large = operator in ("stem", "depthwise") and limit(x.shape) is not None
        if operator not in self._plain or not (large or operator in self.off):
            try:
                return ours()
            except TritonError as error:
                if operator not in self._plain:
                    raise
                said = str(error).strip().partition("\n")[0]
                self.off[operator] = f"the {operator} kernel does not run on this GPU: {said}"
        return torchs(self._plain[operator])

    def _block(self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
        packed = self._blocks[launch.first]
        if packed.stem:
            return inverted_residual.stem_block(inputs[-1], packed, norm=norm)
        return inverted_residual.block(inputs[-1], packed)

    def _stem(self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
        x, layer, relu6 = inputs[-1], self._layers[0], self.specs[0].relu6

        def torchs(plain: Plain) -> torch.Tensor:
            seen = x if norm is None else x * norm[0].view(3, 1, 1) + norm[1].view(3, 1, 1)
            return plain(seen.to(self.dtype), *layer, relu6)

        def ours() -> torch.Tensor:
            return stem(x if norm is not None else x.to(self.dtype), *layer, relu6, norm=norm, tf32=self.tf32)

        return self._by("stem", x, ours, torchs)

    def _depthwise(
        self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None
    ) -> torch.Tensor:
        spec = self.specs[launch.first]
        call = inputs[-1], *self._layers[launch.first], spec.stride, spec.relu6
        return self._by("depthwise", inputs[-1], lambda: depthwise(*call), lambda plain: plain(*call))

    def _pointwise(
        self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None
    ) -> torch.Tensor:
        spec = self.specs[launch.first]
        residual = inputs[-spec.residual - 1] if spec.residual else None
        return self._multiply(inputs[-1], *self._layers[launch.first], residual, spec.relu6)

    def _multiply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor | None,
        relu6: bool,
    ) -> torch.Tensor:
        def ours() -> torch.Tensor:
            return pointwise.pointwise(x, weight, bias, residual, relu6, tf32=self.tf32)

        return self._by("pointwise", x, ours, lambda plain: plain(x, weight, bias, residual, relu6))

    def _head(self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
        x, (weight, bias) = inputs[-1], self._layers[launch.first]
        if launch.count == 2:
            call = x, weight, bias, *self._layers[-1]
            return self._by("head", x, lambda: head.head(*call, tf32=self.tf32), lambda plain: plain(*call))
        return self._by(
            "head",
            x,
            lambda: head.features(x, weight, bias, tf32=self.tf32),
            lambda plain: self._multiply(x, weight, bias, None, relu6=True).mean((2, 3)),
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
                packed = self._blocks[launch.first]
                size = STEM_SIZE if packed.stem else h
                total += sum(inverted_residual.traffic(packed, n, size, item if packed.stem else 2))
            elif launch.form == "head":
                total += head.traffic(n, h * w, self._layers[-2][0], self._layers[-1][0], kind)
            else:
                raise ValueError(f"{launch.form} as a layer of its own has no count")
            for spec in self.specs[launch.first : launch.first + launch.count]:
                h, w = (h - 1) // spec.stride + 1, (w - 1) // spec.stride + 1
        return total
