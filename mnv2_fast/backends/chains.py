"""What runs whole chains on each type of device: what it takes, and why it may not."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..chain import Chain
from . import cpu, triton

UNSEEN = "weights made in inference mode change unseen on a GPU: make them outside of it"


class ChainNetwork(Protocol):
    """A chain with its weights packed. `in_torch`: operators that run in plain torch, and why."""

    @property
    def in_torch(self) -> Mapping[str, str]: ...
    def run(self, x: Tensor) -> Tensor:
        """The chain's answer for [N, C, H, W]."""
        ...


@dataclass(frozen=True)
class Kernels:
    """The kernels of one type of device.

    `backend`: their name in `env.BACKENDS`. `dtypes`: of the tensors that they take. `samples`: a value in
    memory can be looked at without a wait. `unavailable()`: why they are not there, or empty.
    `declines(device, asked)`: why no chain runs on a device where "auto" or they were `asked` for, or None.
    `declines_chain(chain, device)`: why a chain cannot be packed there now, or None. `settings(asked)`: what
    surrounds a call and belongs to a pack. `network(chain, tensors, dtype, settings)`: packs.
    `declines_training(device, asked)`: why no training kernels run there, or None.
    """

    backend: str
    dtypes: Sequence[torch.dtype]
    samples: bool
    unavailable: Callable[[], str]
    declines: Callable[[torch.device, str], str | None]
    declines_chain: Callable[[Chain, torch.device], str | None]
    settings: Callable[[str], Hashable]
    network: Callable[[Chain, Sequence[Tensor], torch.dtype, Any], ChainNetwork]
    declines_training: Callable[[torch.device, str], str | None]

    @property
    def casts(self) -> Sequence[torch.dtype]:
        """The dtypes that autocast may be to."""
        return [dtype for dtype in self.dtypes if dtype is not torch.float32]

    @property
    def names(self) -> str:
        """The dtypes in words."""
        return " or ".join(map(str, self.dtypes))


def _on_cpu(chain: Chain, tensors: Sequence[Tensor], dtype: torch.dtype, settings: None) -> cpu.Network:
    name = cpu.DTYPES[dtype]
    return cpu.Network(chain.specs, chain.fold(tensors, name), pool=chain.pooled, dtype=name)


def _on_cuda(
    chain: Chain, tensors: Sequence[Tensor], dtype: torch.dtype, settings: tuple[str, bool]
) -> triton.Network:
    asked, tf32 = settings
    device = tensors[0].device
    return triton.Network(
        chain.specs,
        chain.fold([t.cpu() for t in tensors]),
        dtype="tf32" if tf32 and dtype is torch.float32 else triton.TENSORS[dtype],
        device=device,
        pool=chain.pool,
        answer=dtype,
        asked=asked,
    )


def _cuda_unavailable() -> str:
    return triton.unavailable_reason() or cpu.unavailable_reason()  # whose extension watches the weights


def _cuda_settings(asked: str) -> tuple[str, bool]:
    return asked, triton.multiplies_tf32()


# Device type -> its kernels.
KERNELS: Mapping[str, Kernels] = {
    "cpu": Kernels(
        "cpu",
        tuple(cpu.DTYPES),
        samples=True,
        unavailable=cpu.unavailable_reason,
        declines=lambda device, asked: None,
        declines_chain=lambda chain, device: None,
        settings=lambda asked: None,
        network=_on_cpu,
        declines_training=lambda device, asked: None,
    ),
    "cuda": Kernels(
        "triton",
        tuple(triton.TENSORS),
        samples=False,
        unavailable=_cuda_unavailable,
        declines=triton.network_declines,
        declines_chain=lambda chain, device: triton.chain_declines(chain.specs, chain.pool, device),
        settings=_cuda_settings,
        network=_on_cuda,
        declines_training=triton.training_declines,
    ),
}
