"""The whole inverted residual in Gluon: its source executed by numpy, its machine code from ptxas."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from mnv2_fast import arch

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

import gluon_stand_in
from mnv2_fast.kernels import aot, inverted_residual
from mnv2_fast.kernels.block import block_kernel
from mnv2_fast.kernels.common import tiles
from mnv2_fast.kernels.inverted_residual import GEOMETRIES, Packed

# Bytes of shared memory that a program may have on sm_90.
SHARED = 227 << 10


def _blocks() -> list[tuple[int, int, int, int, int, bool]]:
    """Size, stride, inputs, hidden channels, outputs and residual of each block with an expansion."""
    layers = arch.layers()
    return [
        (a.h, b.spec.stride, a.spec.cin, a.spec.cout, c.spec.cout, c.spec.residual > 0)
        for a, b, c in zip(layers, layers[1:], layers[2:], strict=False)
        if (a.spec.kind, b.spec.kind, a.spec.relu6) == ("pointwise", "depthwise", True)
    ]


BLOCKS = list(dict.fromkeys(_blocks()))


def _weights(cin: int, hidden: int, cout: int) -> dict[str, Tensor]:
    """Random ones that fp16 holds, biases aside; about half of the hidden activations are clamped."""
    shapes = {
        "expand": ((hidden, cin, 1, 1), 3 * cin**-0.5),
        "expand_bias": ((hidden,), 2.0),
        "depthwise": ((hidden, 1, 3, 3), 0.5),
        "depthwise_bias": ((hidden,), 1.0),
        "project": ((cout, hidden, 1, 1), hidden**-0.5),
        "project_bias": ((cout,), 1.0),
    }
    return {
        name: (torch.randn(shape, dtype=torch.float64) * scale).half().float() + ("bias" in name) * 1e-4
        for name, (shape, scale) in shapes.items()
    }


def _packed(block: tuple[int, int, int, int, int, bool]) -> tuple[dict[str, Tensor], Packed]:
    size, stride, cin, hidden, cout, residual = block
    weights = _weights(cin, hidden, cout)
    slab = inverted_residual.choose_tile("", size, stride)["slab"]
    return weights, inverted_residual.pack(weights, stride, residual, torch.float16, slab)


def _run(x: Tensor, packed: Packed, wide: int = 1) -> tuple[Tensor, gluon_stand_in.Traffic]:
    """What the kernel's source makes of x [N, C, H, W], and what it moves."""
    n, _, size, _ = x.shape
    made = (size - 1) // packed.stride + 1
    tile = {**inverted_residual.choose_tile("", size, packed.stride), "wide": wide}
    out = np.full(n * made * made * packed.cout, np.nan, np.float16)
    arguments = {
        "x": x.permute(0, 2, 3, 1).contiguous().numpy().reshape(-1),
        **dict.fromkeys(("image_step", "channel_step", "row_step", "column_step"), 0),
        "norm": np.zeros(6, np.float32),
        **{
            name: getattr(packed, name).numpy().reshape(-1)
            for name in ("expand", "depthwise", "shift", "project", "out_shift")
        },
        "y": out,
        "images": n,
        "slabs": packed.slabs,
    }
    programs = GEOMETRIES[size, packed.stride].programs(n, made, made)
    constants = inverted_residual.compile_constants(packed, size, tile)
    traffic = gluon_stand_in.run(block_kernel, programs, arguments | constants)
    return torch.from_numpy(out).view(n, made, made, packed.cout).permute(0, 3, 1, 2), traffic


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_source_matches_float64(block: tuple[int, int, int, int, int, bool]) -> None:
    """Two images, or three where two share a program; every element written, nothing outside read."""
    size, stride, cin, *_, residual = block
    torch.manual_seed(0)
    weights, packed = _packed(block)
    x = torch.randn(3 if GEOMETRIES[size, stride].images == 2 else 2, cin, size, size).half()
    out, traffic = _run(x, packed)
    want = inverted_residual.reference(x, weights, stride, residual)
    allowed = inverted_residual.tolerance(x, weights, stride, residual, torch.float16)
    assert ((out - want).abs() <= allowed).all()
    assert (out - want).square().mean() < 1e-5 * want.square().mean()
    assert (traffic.read, traffic.written) == inverted_residual.traffic(packed, len(x), size)


NORM = torch.tensor([[0.0171, 0.0175, 0.0174], [-2.118, -2.036, -1.804]])


@pytest.mark.parametrize("size", [(224, 224), (223, 224)], ids=str)
@pytest.mark.parametrize("kind", ["float16", "float32", "uint8", "uint8, NHWC"])
def test_source_of_the_stem_with_its_block_matches_float64(size: tuple[int, int], kind: str) -> None:
    torch.manual_seed(0)
    weights = _weights(3, 32, 16) | {"expand": torch.randn(32, 3, 3, 3).half().float()}
    packed = inverted_residual.pack(weights, 1, False, torch.float16, 32)
    photos = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    scale, shift = (row.view(3, 1, 1) for row in NORM.double())
    seen = photos.double() * scale + shift
    x = photos if kind.startswith("uint8") else seen.to(getattr(torch, kind))
    x = x.contiguous(memory_format=torch.channels_last) if kind.endswith("NHWC") else x
    flat = x.permute(0, 2, 3, 1) if kind.endswith("NHWC") else x
    out = np.full(2 * 112 * 112 * 16, np.nan, np.float16)
    tile = tiles("", "block")["stem"]
    constants = inverted_residual.compile_constants(packed, 112, tile, size, kind.startswith("uint8"))
    arguments = {
        "x": flat.contiguous().numpy().reshape(-1),
        **dict(zip(("image_step", "channel_step", "row_step", "column_step"), x.stride(), strict=True)),
        "norm": NORM.numpy().reshape(-1),
        **{
            name: getattr(packed, name).numpy().reshape(-1)
            for name in ("expand", "depthwise", "shift", "project", "out_shift")
        },
        "y": out,
        "images": 2,
        "slabs": packed.slabs,
    }
    moved = gluon_stand_in.run(
        block_kernel, inverted_residual.programs(packed, 2, 112), arguments | constants
    )
    made = torch.from_numpy(out).view(2, 112, 112, 16).permute(0, 3, 1, 2)
    want = inverted_residual.reference(seen, weights, 1, False)
    allowed = inverted_residual.tolerance(seen, weights, 1, False, torch.float16)
    assert ((made - want).abs() <= allowed).all()
    if size == (224, 224):
        assert (moved.read, moved.written) == inverted_residual.traffic(packed, 2, 112, x.element_size())


def test_sums_of_half_precision_are_near() -> None:
    torch.manual_seed(0)
    block = BLOCKS[0]
    weights, packed = _packed(block)
    x = torch.randn(1, block[2], block[0], block[0]).half()
    want = inverted_residual.reference(x, weights, block[1], block[5])
    errors = [(_run(x, packed, wide)[0] - want).square().mean().sqrt() for wide in (0, 1)]
    assert errors[1] < errors[0] < 0.01 * want.std()


@pytest.mark.parametrize("planted", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(planted: float) -> None:
    """NaN as float64 spreads it, not into the image beside it; of an infinity ReLU6 makes 0 or 6."""
    torch.manual_seed(0)
    block = (7, 1, 16, 32, 16, False)
    weights, packed = _packed(block)
    x = torch.randn(2, 16, 7, 7).half()
    x[0, 3, 6, 6] = planted
    out, _ = _run(x, packed)
    want = inverted_residual.reference(x, weights, 1, False)
    assert torch.equal(out.isnan(), want.isnan())
    assert bool(want.isnan().any()) == math.isnan(planted)
    finite = want.isfinite()
    torch.testing.assert_close(out.double()[finite], want[finite], rtol=0, atol=0.02)


def test_the_network_moves_few_bytes() -> None:
    """The fused blocks, for an image of a batch of 256, halo and weights included."""
    total = 0
    for block in _blocks():
        _, packed = _packed(block)
        total += sum(inverted_residual.traffic(packed, 256, block[0])) / 256 / 1e6
    print(f"{total:.2f} MB an image")
    assert total < 5.4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_compiles_without_spills(
    block: tuple[int, int, int, int, int, bool],
    dtype: torch.dtype,
    record_property: Callable[[str, object], None],
) -> None:
    size, stride, cin, hidden, cout, residual = block
    tile = inverted_residual.choose_tile("", size, stride)
    packed = inverted_residual.pack(_weights(cin, hidden, cout), stride, residual, dtype, tile["slab"])
    _compiles(packed, size, tile, False, record_property)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("from_bytes", [False, True])
def test_the_stem_with_its_block_compiles_without_spills(
    from_bytes: bool, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    weights = _weights(3, 32, 16) | {"expand": torch.randn(32, 3, 3, 3)}
    packed = inverted_residual.pack(weights, 1, False, dtype, 32)
    _compiles(packed, 112, tiles("", "block")["stem"], from_bytes, record_property)


def _compiles(
    packed: Packed,
    size: int,
    tile: Mapping[str, int],
    from_bytes: bool,
    record_property: Callable[[str, object], None],
) -> None:
    arguments = inverted_residual.compile_arguments(packed, size, tile, from_bytes)
    built = aot.compile_for(block_kernel, 90, arguments, tile["warps"])
    for name in ("registers", "stack", "local", "shared"):
        record_property(name, getattr(built, name))
    print(f"registers {built.registers}, stack {built.stack}, local {built.local}, shared {built.shared}")
    assert (built.stack, built.local) == (0, 0)
    assert built.shared <= SHARED
    assert "wgmma.mma_async" in built.ptx
    assert "cp.async" in built.ptx
    clamps = re.findall(r"\b(?:min|max)\.\S*f(?:16|32)\S*", built.ptx)
    assert clamps
    assert all(".NaN." in clamp for clamp in clamps)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 16, 9, 9), torch.float16, "no whole block for 9 x 9 at stride 1"),
        ((1, 16, 7, 14), torch.float16, "no whole block for 7 x 14"),
        ((1, 8, 7, 7), torch.float16, "x has 8 channels"),
        ((1, 16, 7, 7), torch.float32, "x has 16 channels of torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    _, packed = _packed((7, 1, 16, 32, 16, False))
    with pytest.raises(ValueError, match=message):
        inverted_residual.block(torch.zeros(shape, dtype=dtype), packed)


def test_other_slabs_than_the_tiles_are_refused() -> None:
    _, packed = _packed((7, 1, 16, 32, 16, False))
    tile = {**inverted_residual.choose_tile("", 7, 1), "slab": 64}
    with pytest.raises(ValueError, match="packed in slabs of 32"):
        inverted_residual.block(torch.zeros(1, 16, 7, 7).half(), packed, tile=tile)
