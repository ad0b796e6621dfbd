"""The whole inverted residual in Gluon: its source executed by numpy, its machine code from ptxas."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mnv2_fast import arch

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

import gluon_stand_in
from gluon_stand_in import Traffic
from mnv2_fast.kernels import aot, inverted_residual
from mnv2_fast.kernels.block import block_kernel
from mnv2_fast.kernels.common import tiles
from mnv2_fast.kernels.inverted_residual import GEOMETRIES, Form, Packed
from mnv2_fast.kernels.network import Network


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


def _packed(
    block: tuple[int, int, int, int, int, bool], dtype: torch.dtype = torch.float16
) -> tuple[dict[str, Tensor], Packed]:
    size, stride, cin, hidden, cout, residual = block
    slab = inverted_residual.choose_tile("", size, stride)["slab"]
    return _pack(Form(cin, cout, stride, residual, slab, False), hidden, dtype)


def _packed_stem(dtype: torch.dtype = torch.float16) -> tuple[dict[str, Tensor], Packed]:
    return _pack(Form(3, 16, 1, False, tiles("", "block")["stem"]["slab"], True), 32, dtype)


def _pack(form: Form, hidden: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Packed]:
    weights = _weights(form.cin, hidden, form.cout)
    if form.stem:
        weights["expand"] = torch.randn(hidden, 3, 3, 3).half().float()
    return weights, inverted_residual.pack(weights, form.stride, form.residual, dtype, form.slab)


def _arguments(maps: int, form: Form, dtype: torch.dtype) -> tuple[Tensor, Packed]:
    """An input of zeros, of which the depthwise convolution sees maps of that size, and weights."""
    size = 2 * maps if form.stem else maps
    _, packed = _pack(form, 64 if form.stem else 6 * form.cin, dtype)
    return torch.zeros(1, form.cin, size, size, dtype=dtype), packed


def _run(x: Tensor, packed: Packed, norm: Tensor | None = None, wide: int = 1) -> tuple[Tensor, Traffic]:
    """What the kernel's source makes of x, launched by its launcher, and what it moves."""
    size = inverted_residual.STEM_SIZE if packed.stem else (x.shape[2] - 1) // packed.stride + 1
    out = torch.full((len(x), size, size, packed.cout), math.nan, dtype=torch.float16).permute(0, 3, 1, 2)
    with gluon_stand_in.executed() as moved:
        _launch(x, packed, norm, out, wide)
    return out, moved[0]


def _launch(
    x: Tensor, packed: Packed, norm: Tensor | None = None, out: Tensor | None = None, wide: int = 1
) -> None:
    if packed.stem:
        inverted_residual.stem_block(x, packed, norm=norm, out=out)
        return
    tile = {**inverted_residual.choose_tile("", x.shape[2], packed.stride), "wide": wide}
    inverted_residual.block(x, packed, out=out, tile=tile)


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
    weights, packed = _packed_stem()
    photos = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    scale, shift = (row.view(3, 1, 1) for row in NORM.double())
    seen = photos.double() * scale + shift
    x = photos if kind.startswith("uint8") else seen.to(getattr(torch, kind))
    x = x.contiguous(memory_format=torch.channels_last) if kind.endswith("NHWC") else x
    made, moved = _run(x, packed, NORM if kind.startswith("uint8") else None)
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
    errors = [(_run(x, packed, wide=wide)[0] - want).square().mean().sqrt() for wide in (0, 1)]
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


@pytest.mark.parametrize(
    ("written", "broken"),
    [
        pytest.param("wait_group(0)", "wait_group(1)", id="one group too few is waited for"),
        pytest.param(
            "half = slab % 2\n        _expand", "half = 1 - slab % 2\n        _expand", id="next slab's half"
        ),
        pytest.param(
            "    half = slab % 2\n    for step", "    half = 0\n    for step", id="one half for all"
        ),
        pytest.param("slab + 1, HIDDEN", "slab, HIDDEN", id="this slab's weights twice"),
        pytest.param("    async_copy.commit_group()\n", "", id="no group"),
        pytest.param(
            "sums = warpgroup_mma_wait(0, [sums])\n        value", "value", id="no wait for the sums"
        ),
        pytest.param("first = r * SLOTS + LEFT - 1", "first = r * SLOTS + LEFT", id="a column too far"),
        pytest.param("pixel // SLOTS + top", "pixel // SLOTS + top + 1", id="a row too far"),
    ],
)
def test_a_broken_kernel_is_seen(
    written: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slabs, so that both halves of the weights' buffers are used, and one twice."""
    torch.manual_seed(0)
    weights, packed = _packed((7, 1, 16, 96, 16, True))
    x = torch.randn(2, 16, 7, 7).half()
    want = inverted_residual.reference(x, weights, 1, True)
    allowed = inverted_residual.tolerance(x, weights, 1, True, torch.float16)
    source = Path(inspect.getfile(block_kernel.fn)).read_text()
    for changes in ((), ((written, broken),)):
        for before, after in changes:
            assert source.count(before) == 1
            source = source.replace(before, after)
        path = tmp_path / f"block{len(changes)}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(inverted_residual, "block_kernel", module.block_kernel)
        try:
            right = bool(((_run(x, packed)[0] - want).abs() <= allowed).all())
        except (AssertionError, AttributeError):  # the stand-in's own, and of sums that are not there yet
            right = False
        assert right == (not changes)


DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
ARCH = 10 * inverted_residual.CAPABILITY[0] + inverted_residual.CAPABILITY[1]
Record = Callable[[str, object], None]


@DTYPES
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_compiles_without_spills(
    block: tuple[int, int, int, int, int, bool], dtype: torch.dtype, record_property: Record
) -> None:
    _, packed = _packed(block, dtype)
    _compiles(torch.zeros(1, block[2], block[0], block[0], dtype=dtype), packed, None, record_property)


@DTYPES
@pytest.mark.parametrize("photos", ["float32", "of its own type", "uint8", "uint8, NHWC", "sliced"])
def test_the_stem_with_its_block_compiles_without_spills(
    photos: str, dtype: torch.dtype, record_property: Record
) -> None:
    """A column's, a row's and a channel's step may be 1, a multiple of 16, or neither."""
    x = torch.zeros(1, 3, 224, 224, dtype=torch.uint8 if photos.startswith("uint8") else dtype)
    x = x.float() if photos == "float32" else x
    x = x.contiguous(memory_format=torch.channels_last) if photos.endswith("NHWC") else x
    x = torch.zeros(1, 3, 225, 449, dtype=dtype)[:, :, 1:, 1::2] if photos == "sliced" else x
    packed = _packed_stem(dtype)[1]
    _compiles(x, packed, NORM if x.dtype == torch.uint8 else None, record_property)


def _compiles(x: Tensor, packed: Packed, norm: Tensor | None, record_property: Record) -> None:
    """The launch as Triton would compile it, which is the same binary for batches of 1, 3 and 16."""
    with aot.launches() as made:
        for n in (1, 3, 16):
            _launch(x.expand(n, *x.shape[1:]), packed, norm)
    built, *others = [launch.compile_for(ARCH) for launch in made]
    for name in ("registers", "stack", "local", "shared"):
        record_property(name, getattr(built, name))
    print(f"registers {built.registers}, stack {built.stack}, local {built.local}, shared {built.shared}")
    assert [other.ptx for other in others] == [built.ptx] * 2
    assert (built.stack, built.local) == (0, 0)
    assert 0 <= built.shared - inverted_residual.shared_bytes(packed, _maps(x, packed)) < 1024
    assert built.shared <= inverted_residual.SHARED
    assert "wgmma.mma_async" in built.ptx
    assert "cp.async" in built.ptx
    clamps = re.findall(r"\b(?:min|max)\.\S*f(?:16|32)\S*", built.ptx)
    assert clamps
    assert all(".NaN." in clamp for clamp in clamps)


def _accepted(widths: Sequence[float], sizes: Sequence[int]) -> list[tuple[int, Form]]:
    """Maps and forms of blocks that networks make in one launch, those of the network itself aside."""
    found: dict[tuple[int, Form], None] = {}
    for width in widths:
        specs = arch.network(5, width)
        pairs = [(torch.zeros(spec.weight_shape), torch.zeros(spec.cout)) for spec in specs]
        network = Network(specs, pairs, torch.float16, torch.device("cpu"), norm=NORM, fuse=True)
        for size in sizes:
            at = [layer.h for layer in arch.layers(size=(size, size), specs=specs)]
            found |= {
                (
                    (at[launch.first] + 1) // 2 if network._forms[launch.first].stem else at[launch.first],
                    network._forms[launch.first],
                ): None
                for launch in network.plan(size, size)
                if launch.form == "block"
            }
    return list(found)


@pytest.mark.parametrize("size", [56, 112, 224, 448])
@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.4, 2.0])
@pytest.mark.slow
def test_what_other_networks_accept_compiles_without_spills(
    width: float, size: int, record_property: Record
) -> None:
    for maps, form in _accepted([width], [size]):
        for dtype in inverted_residual.DTYPES:
            _compiles(*_arguments(maps, form, dtype), None, record_property)


# Close to what is accepted: sums in registers, steps of the expansion, shared memory.
NARROW = [
    (7, Form(160, 320, 1, False, 32, False)),
    (7, Form(224, 224, 1, True, 32, False)),
    (14, Form(136, 136, 1, True, 64, False)),
    (28, Form(64, 128, 2, False, 64, False)),
    (112, Form(3, 32, 1, False, 32, True)),
]


@pytest.mark.parametrize("form", NARROW, ids=str)
def test_what_just_fits_compiles_without_spills(form: tuple[int, Form], record_property: Record) -> None:
    _compiles(*_arguments(*form, torch.float16), None, record_property)


@pytest.mark.parametrize(
    ("maps", "form", "why"),
    [
        (14, Form(136, 224, 2, False, 32, False), "243 KiB of shared memory, there are 227"),
        (28, Form(80, 128, 2, False, 64, False), "KiB of shared memory, there are 227"),
        (14, Form(128, 192, 1, False, 64, False), "a thread would hold 256 sums"),
        (7, Form(224, 448, 1, False, 32, False), "a thread would hold 272 sums"),
        (7, Form(320, 320, 1, True, 32, False), "too many inputs"),
    ],
    ids=str,
)
def test_what_does_not_fit_on_the_chip_is_declined(maps: int, form: Form, why: str) -> None:
    """In words, and ptxas agrees: spills, or more shared memory than there is."""
    tile = inverted_residual.choose_tile("", maps, form.stride)
    said = inverted_residual.declines(form, maps, maps, tile)
    assert said is not None
    assert why in said
    x, packed = _arguments(maps, form, torch.float16)
    with pytest.raises(ValueError, match=re.escape(said)):
        inverted_residual.block(x, packed)
    with aot.launches() as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(inverted_residual, "declines", lambda *_: None)
        inverted_residual.block(x, packed)
    built = made[0].compile_for(ARCH)
    assert built.local + built.stack > 0 or built.shared > inverted_residual.SHARED
    assert 0 <= built.shared - inverted_residual.shared_bytes(form, maps) < 1024


def test_more_columns_than_two_products_make_are_declined() -> None:
    form, tile = Form(96, 513, 1, False, 32, False), inverted_residual.choose_tile("", 7, 1)
    said = inverted_residual.declines(form, 7, 7, tile)
    assert said is not None
    assert "at most 256 in a product" in said


def _maps(x: Tensor, packed: Packed) -> int:
    return inverted_residual.STEM_SIZE if packed.stem else x.shape[2]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 16, 9, 9), torch.float16, "no whole block for maps of 9 x 9 at stride 1"),
        ((1, 16, 7, 14), torch.float16, "no whole block for maps of 7 x 14"),
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
