"""Frozen networks in plain torch: for where there are no kernels, and the twins that judge them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import arch, int8, machine
from .arch import LayerSpec
from .backends import eager
from .chain import Chain, Link
from .int8 import QuantizedNetwork

Folded = Sequence[tuple[Tensor, Tensor]]


class _Eager:
    """What both have in common."""

    weight_bytes = 0  # it reads the tensors given
    _table: Tensor  # [3, 256], what each uint8 is to the network

    def workspace_bytes(self, n: int, h: int, w: int, threads: int) -> int:
        raise NotImplementedError

    def _see(self, x: Tensor) -> Tensor:
        """The images as [N, 3, H, W], uint8 ones looked up.

        Raises:
            MemoryError: there is less memory than the call needs.
        """
        n, h, w = x.shape[0], *(x.shape[1:3] if x.dtype == torch.uint8 else x.shape[2:])
        need = self.workspace_bytes(n, h, w, 1)
        if x.device.type == "cpu" and not machine.fits_memory(need):
            raise machine.no_memory(need, n, h, w)
        if x.dtype == torch.uint8:
            return torch.stack([self._table[c][x[..., c].long()] for c in range(3)], 1)
        return x


class EagerNetwork(_Eager):
    """The same layers, folded."""

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        tensors: Folded,
        table: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        *,
        tf32: bool = False,
    ) -> None:
        self._layers, self._dtype, self._tf32 = tuple(layers), dtype, tf32
        self._spec = Chain(tuple(Link(spec, bias=True, norm=False) for spec in layers)).encode()
        self._tensors = [tensor.to(device, dtype) for pair in tensors for tensor in pair]
        self._table = table.to(device)

    @torch.no_grad()
    def run(self, x: Tensor, threads: int | None = None) -> Tensor:
        exact = eager.float32_products(self._tf32) if x.is_cuda else contextlib.nullcontext()
        # Float32 is as exact as was asked for, and logits are float32, whatever surrounds the call.
        with exact, torch.autocast(x.device.type, enabled=False):
            return eager.network(self._see(x).to(self._dtype), self._tensors, self._spec).float()

    def workspace_bytes(self, n: int, h: int, w: int, threads: int) -> int:
        """What its largest layer reads and writes: about what torch's allocator is asked for."""
        largest = max(layer.elements for layer in arch.layers(size=(h, w), specs=self._layers))
        return 4 * n * max(largest, 5 * h * w * 3)  # a byte becomes an index of 8, then a float


class EagerInt8Network(_Eager):
    """A quantized network by its definition."""

    def __init__(self, network: QuantizedNetwork, table: Tensor) -> None:
        self._quantized, self._table = network, table

    @torch.autocast("cpu", enabled=False)
    def run(self, x: Tensor, threads: int | None = None) -> Tensor:
        return int8.reference(self._quantized, self._see(x))

    def workspace_bytes(self, n: int, h: int, w: int, threads: int) -> int:
        """What its largest layer reads and writes, in float64."""
        layers = arch.layers(size=(h, w), specs=self._quantized.specs)
        return 8 * n * max(layer.elements for layer in layers)
