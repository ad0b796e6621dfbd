"""What ptxas makes of every depthwise layer: `python -m bench.gpu --resources`, which needs no GPU."""

from __future__ import annotations

import torch

from kernels import aot, depthwise
from kernels.common import tiles
from mnv2_fast import arch


def depthwise_layers() -> list[tuple[int, int]]:
    """Channels and stride of the network's depthwise layers."""
    return sorted({(spec.cin, spec.stride) for spec in arch.network() if spec.kind == "depthwise"})


def print_resources() -> None:
    """Registers, stack and local bytes (spills), one line a layer, dtype, tile and target."""
    table = tiles("", "depthwise")
    print(f"{'layer':<10} {'dtype':<9} {'tile':<9} {'target':<6} {'registers':>9} {'stack':>5} {'local':>5}")
    for c, stride in depthwise_layers():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for tile in (f"large_s{stride}", f"small_s{stride}"):
                for sm in (80, 90):
                    arguments = depthwise.compile_arguments(c, stride, True, dtype, table[tile])
                    built = aot.compile_for(depthwise.depthwise_kernel, sm, arguments, table[tile]["warps"])
                    print(
                        f"{f'{c} s{stride}':<10} {str(dtype)[6:]:<9} {tile:<9} sm_{sm:<3} "
                        f"{built.registers:>9} {built.stack:>5} {built.local:>5}"
                    )
