"""The second stage of every sum over pixels: what the programs of the first one found, added in order.

Atomic additions would add in another order every time. So each program of the first stage writes its sum as
one of `parts`, and this kernel adds them: the same bits at every call on one GPU.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: PLR0917

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import cdiv

# Elements of a program, and parts that it reads at once: one after the other would be 500 loads in a row.
BLOCK, ROWS = 64, 64
WARPS = 8
# Parts that the first stage makes: enough programs for a GPU's units, this many each, within what CUDA
# allows.
PER_UNIT = 4
MOST = 4096


# One binary for every batch; a `count` that 16 divides is known as such, or nothing moves as vectors.
@triton.jit(do_not_specialize=["number"])
def add_parts_kernel(parts, out, count, number, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ...: BLOCK of `count` elements, `number` parts, in float32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(0, number, ROWS):
        part = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (part < number)[:, None] & (at < count)[None, :]
        total += tl.load(parts + part[:, None] * count + at[None, :], mask=inside, other=0.0)
    tl.store(out + at, tl.sum(total, 0).to(out.dtype.element_ty), mask=at < count)


def add_parts(parts: torch.Tensor, out: torch.Tensor) -> None:
    """Fill contiguous `out` with the sum over the first dimension of contiguous float32 `parts`."""
    count = parts[0].numel()
    add_parts_kernel[cdiv(count, BLOCK),](
        parts, out, count, len(parts), BLOCK=BLOCK, ROWS=ROWS, num_warps=WARPS
    )


def traffic(number: int, count: int, item: int) -> int:
    """Bytes that `add_parts` reads and writes: `number` parts of `count` float32, a result of `item` each."""
    return count * (4 * number + item)


def number_of_parts(steps: int, programs: int, units: int) -> int:
    """Into how many parts a loop of `steps` is cut, of which each takes so many programs on so many units."""
    return max(1, min(steps, cdiv(PER_UNIT * units, programs), MOST))
