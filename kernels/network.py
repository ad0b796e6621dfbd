"""The whole network on a GPU, batch norm folded: which kernel makes which layers, and the launches in order.

On sm_90, in fp16 and bf16, whole blocks are one launch each where they have a geometry and fit on the chip
(`fuse`); everywhere else, and for every other size, each layer is one, or depthwise and projection together
are, where the GPU's tile table says that this is faster (`project`). An operator whose kernel is off, or
cannot take an input, is the caller's function in plain torch, among the other launches. Nothing here waits
for the GPU but the packing of weights, which are packed for the form that a call needs when it first comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from triton.errors import TritonError

from . import depthwise as depthwise_layer
from . import depthwise_project, head, inverted_residual, pointwise
from . import stem as stem_layer
from .common import arithmetic, device_of, tiles
from .depthwise import depthwise, limit, pack_weight
from .inverted_residual import STEM_SIZE, Form, Packed
from .stem import stem

log = logging.getLogger(__name__)


class Spec(Protocol):
    """What a layer is: as `mnv2_fast.arch.LayerSpec` has it."""

    @property
    def kind(self) -> str: ...
    @property
    def cin(self) -> int: ...
    @property
    def cout(self) -> int: ...
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
        project: a depthwise layer and the linear 1x1 layer behind it in one launch, outside of whole blocks:
            everywhere, nowhere, or, None, where the tile table of the GPU has it.
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
        project: bool | None = False,
        answer: torch.dtype = torch.float32,
        plain: Mapping[str, Plain] | None = None,
        off: dict[str, str] | None = None,
    ) -> None:
        if refused := refuses(specs, pool):
            raise ValueError(refused)
        if fuse and dtype not in inverted_residual.DTYPES:
            raise ValueError(f"whole blocks are of float16 and bfloat16, not {dtype}: leave fuse out")
        self.specs, self.dtype, self.tf32, self.fuse = tuple(specs), dtype, tf32, fuse
        self.project = project
        self._apart: set[int] = set()  # first layers of pairs that one launch cannot make on this GPU
        self.device, self.norm = device, None if norm is None else norm.to(device)
        self.answer, self._plain, self.off = answer, dict(plain or {}), {} if off is None else off
        # Layers of the head, which is two kernels' work: the mean of the last 1x1 layer, and a classifier.
        self._head_layers = 2 if specs[-1].kind == "linear" else 1 if pool else 0
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

    def plan(self, h: int, w: int, n: int = 1) -> list[Launch]:
        """The launches for n photos of h x w, in order. The last one is of the head, where there is one."""
        launches, i, last = [], 0, len(self.specs) - self._head_layers
        while i < last:
            count = 3 if self._whole(i, h, w) else 2 if self._projects(i, (n, h, w)) else 1
            form = {1: self.specs[i].kind, 2: "depthwise_project", 3: "block"}[count]
            launches.append(Launch(form, i, count))
            for spec in self.specs[i : i + count]:
                h, w = (h - 1) // spec.stride + 1, (w - 1) // spec.stride + 1
            i += count
        return [*launches, Launch("head", last, self._head_layers)] if self._head_layers else launches

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

    def _projects(self, i: int, size: tuple[int, int, int]) -> bool:
        """Whether one launch makes layers i and i + 1, outside of a whole block, for N maps of H x W."""
        if self.project is False or i in self._apart or i + 1 >= len(self.specs) - self._head_layers:
            return False
        (a, b), (n, h, w) = self.specs[i : i + 2], size
        kinds = (a.kind, a.relu6), (b.kind, b.relu6)
        off = self.off.keys() & {"depthwise", "pointwise"}
        if off or kinds != (("depthwise", True), ("pointwise", False)):
            return False
        if self.project is None:
            pixels = n * ((h - 1) // a.stride + 1) * ((w - 1) // a.stride + 1)
            kind = arithmetic(self.dtype, self.tf32)
            if not depthwise_project.used(self.device, pixels, a.cin, b.cout, kind):
                return False
        return limit(torch.Size((n, a.cin, h, w))) is None

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
        for launch in self.plan(x.shape[2], x.shape[3], len(x)):
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
                self.off[operator] = f"the {operator} kernel does not run on this GPU: {_line(error)}"
        return torchs(self._plain[operator])

    def _block(self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
        packed = self._whole_block(launch.first)
        if packed.stem:
            return inverted_residual.stem_block(inputs[-1], packed, norm=norm)
        return inverted_residual.block(inputs[-1], packed)

    def _stem(self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None) -> torch.Tensor:
        x, layer, relu6 = inputs[-1], self._layer(0), self.specs[0].relu6

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
        call = inputs[-1], *self._layer(launch.first), spec.stride, spec.relu6
        return self._by("depthwise", inputs[-1], lambda: depthwise(*call), lambda plain: plain(*call))

    def _depthwise_project(
        self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None
    ) -> torch.Tensor:
        first, last = self.specs[launch.first : launch.first + 2]
        # Counted back from the input of the 1x1 layer, which is not among them.
        residual = inputs[-last.residual] if last.residual else None
        spread, project = self._layer(launch.first), self._layer(launch.first + 1)
        try:
            return depthwise_project.depthwise_project(
                inputs[-1], spread, project, first.stride, residual, tf32=self.tf32
            )
        except TritonError as error:
            if self.project:
                raise
            # It does not fit on this GPU, where each layer's own kernel may.
            self._apart.add(launch.first)
            log.debug("layers %d and %d are two launches: %s", launch.first, launch.first + 1, _line(error))
        y = self._depthwise(Launch("depthwise", launch.first, 1), inputs, norm)
        return self._pointwise(Launch("pointwise", launch.first + 1, 1), [*inputs, y], norm)

    def _pointwise(
        self, launch: Launch, inputs: list[torch.Tensor], norm: torch.Tensor | None
    ) -> torch.Tensor:
        spec = self.specs[launch.first]
        residual = inputs[-spec.residual - 1] if spec.residual else None
        return self._multiply(inputs[-1], *self._layer(launch.first), residual, spec.relu6)

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
        x, (weight, bias) = inputs[-1], self._layer(launch.first)
        if launch.count == 2:
            call = x, weight, bias, *self._layer(launch.first + 1)
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
            ValueError: a mean without a classifier has no count.
        """
        total = 0
        kind = arithmetic(self.dtype, self.tf32)
        for launch in self.plan(h, w, n):
            if launch.form == "block":
                packed = self._whole_block(launch.first)
                size = STEM_SIZE if packed.stem else h
                total += sum(inverted_residual.traffic(packed, n, size, item if packed.stem else 2))
            elif launch.form == "head" and launch.count == 2:
                total += head.traffic(
                    n, h * w, self._layer(launch.first)[0], self._layer(launch.first + 1)[0], kind
                )
            else:
                total += self._layer_traffic(launch, (n, h, w), item)
            for spec in self.specs[launch.first : launch.first + launch.count]:
                h, w = (h - 1) // spec.stride + 1, (w - 1) // spec.stride + 1
        return total

    def _layer_traffic(self, launch: Launch, size: tuple[int, int, int], item: int) -> int:
        """Bytes of a launch of one or two layers, for N maps of H x W; `item`: of a photo's numbers."""
        i, (n, h, w) = launch.first, size
        spec = self.specs[i]
        own, kind = self.dtype.itemsize, arithmetic(self.dtype, self.tf32)
        if spec.kind == "stem":
            tile = tiles(device_of(self.device)[0], "stem")[kind]
            return stem_layer.traffic((n, 3, h, w), spec.cout, own, tile, from_bytes=item == 1)
        shape = n, spec.cout, h, w
        if launch.count == 2:
            pixels = n * ((h - 1) // spec.stride + 1) * ((w - 1) // spec.stride + 1)
            cout = self.specs[i + 1].cout
            tile = depthwise_project.choose_tile(self.device, pixels, spec.cout, cout, kind)
            # The input itself as a residual is read under the windows already.
            residual = self.specs[i + 1].residual > 1
            return depthwise_project.traffic(shape, cout, spec.stride, own, tile, residual=residual)
        if spec.kind == "depthwise":
            tile = depthwise_layer.choose_tile(self.device, shape, spec.stride)
            return depthwise_layer.traffic(shape, spec.stride, own, tile)
        cout, cin = spec.cout, spec.cin
        tile = pointwise.choose_tile(self.device, n * h * w, cin, cout, kind)
        return pointwise.traffic(n * h * w, cin, cout, own, tile, residual=spec.residual > 0)


def _line(error: Exception) -> str:
    """An error's first line."""
    return str(error).strip().partition("\n")[0]
