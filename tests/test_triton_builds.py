"""The Triton operators compiled ahead of time for the network's layers: what ptxas says of them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import kinds

from mnv2_fast import arch

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from mnv2_fast.kernels import (
    aot,
    depthwise,
    depthwise_gradient,
    depthwise_project,
    head,
    norm,
    pointwise,
    pointwise_gradient,
    stem,
    train_depthwise,
    train_pointwise,
    train_pointwise_gradient,
    train_stem,
)
from mnv2_fast.kernels.common import arithmetic, tiles
from mnv2_fast.kernels.norm import Applied, RawGradient
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

# Bytes of shared memory that one program may have: sm_80 163 KiB, sm_90 and sm_100 227 KiB.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel as a layer launches it, for one GPU."""

    name: str
    kernel: Any
    arguments: Mapping[str, str | int | bool]
    tile: Mapping[str, int]
    sm: int
    dtype: torch.dtype
    tf32: bool = False
    relu6: bool = False
    multiplies: bool = True  # matrices


def _layers(kind: str) -> list[tuple[int, int, int, bool]]:
    """cin, cout, stride and ReLU6 of the network's layers of a kind."""
    return sorted({(s.cin, s.cout, s.stride, s.relu6) for s in arch.network() if s.kind == kind})


def _kernels(
    dtype: torch.dtype, tf32: bool
) -> Iterator[tuple[str, Any, Mapping[str, Any], Mapping[str, int], bool, bool]]:
    """Of every layer: name, kernel, arguments, tile, whether it has a ReLU6 and multiplies matrices."""
    kind = arithmetic(dtype, tf32)
    tile = tiles("", "stem")[kind]
    for from_bytes in (False, True):
        arguments = stem.compile_arguments(arch.STEM_CHANNELS, dtype, tile, from_bytes=from_bytes, tf32=tf32)
        yield f"stem bytes={from_bytes}", stem.stem_kernel, arguments, tile, True, True
    tile = tiles("", "head")[kind]
    yield (
        "features 320x1280",
        head.pool_kernel,
        head.compile_arguments(320, 1280, dtype, tile, tf32=tf32),
        tile,
        True,
        True,
    )
    for (cin, cout, _, relu6), size in itertools.product(
        [*_layers("pointwise"), (1280, 1000, 1, False)], ("large", "small")
    ):
        tile = pointwise.row("", f"{size}_{kind}", cin, cout)
        arguments = pointwise.compile_arguments(
            cin, cout, dtype, tile, relu6=relu6, residual=not relu6, tf32=tf32
        )
        yield f"pointwise {cin}x{cout} {size}", pointwise.pointwise_kernel, arguments, tile, relu6, True
        tile = pointwise.row("", f"{size}_{kind}", cout, cin)
        arguments = pointwise.compile_arguments(
            cout, cin, dtype, tile, residual=True, gradient=True, tf32=tf32
        )
        yield f"pointwise input {cin}x{cout} {size}", pointwise.pointwise_kernel, arguments, tile, False, True
    pairs = itertools.pairwise(arch.network())
    blocks = {(a.cin, b.cout, a.stride, b.residual > 0) for a, b in pairs if a.kind == "depthwise"}
    for (c, cout, stride, residual), size in itertools.product(sorted(blocks), ("large", "small")):
        tile = tiles("", "depthwise_project")[f"{size}_{kind}"]
        arguments = depthwise_project.compile_arguments(
            c, cout, stride, dtype, tile, residual=residual, tf32=tf32
        )
        name = f"depthwise project {c}x{cout} s{stride} {size}"
        yield name, depthwise_project.depthwise_project_kernel, arguments, tile, True, True
    for cin, cout, _, _ in _layers("pointwise"):
        tile = tiles("", "pointwise_gradient")[kind]
        arguments = pointwise_gradient.compile_arguments(cin, cout, dtype, tile, tf32=tf32)
        yield (
            f"pointwise weight {cin}x{cout}",
            pointwise_gradient.weight_gradient_kernel,
            arguments,
            tile,
            False,
            True,
        )
    if tf32:
        return
    for c, _, stride, _ in _layers("depthwise"):
        tile = tiles("", "depthwise_weight")[f"s{stride}"]
        arguments = depthwise_gradient.weight_arguments(c, stride, dtype, tile)
        yield (
            f"depthwise weight {c} s{stride}",
            depthwise_gradient.weight_gradient_kernel,
            arguments,
            tile,
            False,
            False,
        )
        for size in ("large", "small"):
            tile = tiles("", "depthwise_input_s2" if stride == 2 else "depthwise")[
                size if stride == 2 else f"{size}_s1"
            ]
            if stride == 2:
                kernel, arguments = (
                    depthwise_gradient.input_gradient_s2_kernel,
                    depthwise_gradient.input_arguments(c, dtype, tile),
                )
            else:
                kernel, arguments = (
                    depthwise.depthwise_kernel,
                    depthwise.compile_arguments(c, 1, False, dtype, tile, turned=True),
                )
            yield f"depthwise input {c} s{stride} {size}", kernel, arguments, tile, False, False


def _builds() -> Iterator[Any]:
    """Every layer for every GPU and dtype; of those that are not slow, fp16 on sm_90 alone."""
    for sm, (name, tf32) in itertools.product(SHARED, kinds()):
        dtype = getattr(torch, name)
        for what, kernel, arguments, tile, relu6, multiplies in _kernels(dtype, tf32):
            build = Build(what, kernel, arguments, tile, sm, dtype, tf32, relu6, multiplies)
            often = sm == 90 and dtype == torch.float16 and "small" not in what
            yield pytest.param(
                build,
                id=f"{what}-{arithmetic(dtype, tf32)}-{name}-sm{sm}",
                marks=() if often else pytest.mark.slow,
            )


@pytest.mark.parametrize("build", list(_builds()))
def test_compiles_without_spills(build: Build, record_property: Callable[[str, object], None]) -> None:
    tile = build.tile
    built = aot.compile_for(build.kernel, build.sm, build.arguments, tile["warps"], tile.get("stages", 3))
    for name in ("registers", "stack", "local", "shared"):
        record_property(name, getattr(built, name))
    print(f"registers {built.registers}, stack {built.stack}, local {built.local}, shared {built.shared}")
    assert (built.stack, built.local) == (0, 0)
    assert built.shared <= SHARED[build.sm]
    # NaN must survive ReLU6 on the hardware, where the interpreter proves nothing.
    clamps = [clamp for clamp in re.findall(r"\b(?:min|max)\.\S*", built.ptx) if clamp.endswith("f32")]
    assert {"max.NaN.f32", "min.NaN.f32"} == set(clamps) if build.relu6 else not clamps
    if build.multiplies:
        on_tensor_cores = re.search(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", built.ptx) is not None
        assert on_tensor_cores == (arithmetic(build.dtype, build.tf32) != "ieee")


META: dict[str, Any] = {"dtype": torch.float16, "device": "meta"}


def _map(n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty(n, h, w, c, **META).permute(0, 3, 1, 2)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, **META)


def _lines(n: int, h: int, w: int, c: int) -> Tensor:
    """As training's kernels have them."""
    return torch.empty((n, h, w, c), **META)


def _rows(number: int, c: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty((number, c), dtype=dtype, device="meta")


def _applied(c: int) -> Applied:
    return Applied(_rows(3, c), relu6=True)


def _raw(n: int, h: int, w: int, c: int, *, mask: bool = False) -> RawGradient:
    return RawGradient(_lines(n, h, w, c), _lines(n, h, w, c), _rows(3, c), _rows(3, c), mask, batch=True)


def _train_depthwise(n: int, h: int, w: int, stride: int) -> None:
    x, of, weight = _lines(n, h, w, 96), _applied(96), _empty(96, 1, 3, 3)
    z, _ = train_depthwise.forward(x, of, weight, stride, moments=True)
    train_depthwise.gradients(_raw(*z.shape), weight, x, of, stride)


def _train_project(n: int, h: int, w: int) -> None:
    """Its gradients apart, too."""
    x, of, weight = _lines(n, h, w, 96), _applied(96), _empty(24, 96, 1, 1)
    train_pointwise.forward(x, of, weight, moments=True)
    for wanted in ({}, {"for_weight": False}, {"for_x": False}):
        train_pointwise_gradient.gradients(_raw(n, h, w, 24), weight, x, of, **wanted)


def _train_expand(n: int, h: int, w: int) -> None:
    x, weight = _lines(n, h, w, 24), _empty(144, 24, 1, 1)
    train_pointwise.forward(x, None, weight, moments=True)
    train_pointwise_gradient.gradients(_raw(n, h, w, 144), weight, x, None, x)
    train_pointwise_gradient.gradients(_raw(n, h, w, 144, mask=True), weight, x, None, x, for_weight=False)


def _train_stem(n: int, h: int, w: int) -> None:
    photos, weight = _empty(n, 3, h, w), _empty(32, 3, 3, 3)
    z, _ = train_stem.forward(photos, weight, torch.float16, moments=True)
    train_stem.weight_gradient(_raw(*z.shape), photos)


def _norm(n: int, h: int, w: int) -> None:
    """Of as many parts as there are images."""
    z, of, gamma = _lines(n, h, w, 96), _applied(96), _rows(1, 96)[0]
    norm.activate(z, of.values, of.relu6, z)
    norm.sums(z, z, of.values, of.relu6)
    parts = _rows(3 * n, 96).view(n, 3, 96)
    moments, _ = norm.normalize(parts, gamma, gamma, 1e-5, running=(gamma, gamma), share=0.1)
    norm.norm_gradient(parts[:, :2].contiguous(), moments, gamma, n * h * w, 1e-5)


# What training launches, likewise.
TRAINING: dict[str, Callable[[int, int, int], object]] = {
    "train depthwise s1": lambda n, h, w: _train_depthwise(n, h, w, 1),
    "train depthwise s2": lambda n, h, w: _train_depthwise(n, h, w, 2),
    "train project": _train_project,
    "train expand": _train_expand,
    "train stem": _train_stem,
    "norm": _norm,
}
# Each operator's call on n maps of h x w, whose tile does not depend on n.
CALLS: dict[str, Callable[[int, int, int], object]] = {
    "depthwise s1": lambda n, h, w: depthwise.depthwise(
        _map(n, 32, h, w), _empty(32, 1, 3, 3), _empty(32), 1, True, tile=tiles("", "depthwise")["large_s1"]
    ),
    "depthwise s2": lambda n, h, w: depthwise.depthwise(
        _map(n, 32, h, w), _empty(32, 1, 3, 3), _empty(32), 2, True, tile=tiles("", "depthwise")["large_s2"]
    ),
    "depthwise input gradient s1": lambda n, h, w: depthwise_gradient.input_gradient(
        _map(n, 32, h, w), _empty(32, 1, 3, 3), (h, w), 1, tile=tiles("", "depthwise")["large_s1"]
    ),
    "depthwise input gradient s2": lambda n, h, w: depthwise_gradient.input_gradient(
        _map(n, 32, (h + 1) // 2, (w + 1) // 2),
        _empty(32, 1, 3, 3),
        (h, w),
        2,
        tile=tiles("", "depthwise_input_s2")["large"],
    ),
    "depthwise weight gradient": lambda n, h, w: depthwise_gradient.weight_gradient(
        _map(n, 32, h, w), _map(n, 32, h, w), 1
    ),
    "stem": lambda n, h, w: stem.stem(_empty(n, 3, h, w), _empty(32, 3, 3, 3), _empty(32), True),
    "pointwise": lambda n, h, w: pointwise.pointwise(
        _map(n, 96, h, w),
        _empty(24, 96, 1, 1),
        _empty(24),
        _map(n, 24, h, w),
        tile=tiles("", "pointwise")["large_half"],
    ),
    "pointwise input gradient": lambda n, h, w: pointwise.input_gradient(
        _map(n, 24, h, w), _empty(24, 96, 1, 1), tile=tiles("", "pointwise")["large_half"]
    ),
    "pointwise weight gradient": lambda n, h, w: pointwise_gradient.weight_gradient(
        _map(n, 24, h, w), _map(n, 96, h, w)
    ),
    "depthwise project": lambda n, h, w: depthwise_project.depthwise_project(
        _map(n, 96, h, w),
        (_empty(96, 1, 3, 3), _empty(96)),
        (_empty(24, 96, 1, 1), _empty(24)),
        1,
        _map(n, 24, h, w),
        tile=tiles("", "depthwise_project")["large_half"],
    ),
    "features": lambda n, h, w: head.features(
        _map(n, 96, h, w), _empty(160, 96, 1, 1), _empty(160), tile=tiles("", "head")["half"]
    ),
    **TRAINING,
}


def _keys(call: Callable[[], object]) -> list[tuple[str, str]]:
    """What Triton tells the binaries of a call's launches apart by: kernel, and what it specialises."""
    with aot.launches() as made:
        call()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys = []
    for launch in made:
        bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
        keys.append((launch.kernel.__name__, str(bind(**launch.arguments)[1])))
    return keys


SIZES = [(1, 1), (7, 9), (16, 32)]


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_binary_serves_every_batch(op: str, size: tuple[int, int]) -> None:
    """A kernel is compiled at the first call alone, whatever batches follow, one of a single image, too."""
    keys = [_keys(lambda n=n: CALLS[op](n, *size)) for n in (1, 2, 3, 16, 17, 256)]
    assert all(key == keys[0] for key in keys), keys


def _specialised() -> Iterator[Any]:
    """Calls and sizes. A depthwise layer's gradients in training take 15 s to compile, others a second."""
    for op, size in itertools.product(CALLS, SIZES):
        slow = op.startswith("train depthwise") and size != (7, 9)
        yield pytest.param(op, size, id=f"{size}-{op}", marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("op", "size"), list(_specialised()))
def test_compiles_as_a_launch_specialises_it(op: str, size: tuple[int, int]) -> None:
    """Sizes of 1 are constants and multiples of 16 known as such, where the kernel does not decline it."""
    with aot.launches() as made:
        CALLS[op](1, *size)
    assert made
    for launch in made:
        built = launch.compile_for(90)
        assert (built.stack, built.local) == (0, 0)
        # Pointers are known to be aligned at every launch: what can move as vectors does.
        assert re.search(r"(?:ld|st)\.global\S*\.v[24]\.|cp\.async\S* \[[^]]*\], \[[^]]*\], 0x10", built.ptx)


def _taken_by(ptx: str, launch: aot.Launch, name: str) -> set[str]:
    """The instructions that take an integer argument of a launch, the one that loads it first."""
    ones = {key for key, value in launch.arguments.items() if isinstance(value, int) and value == 1}
    kept = [
        p.name
        for p in launch.kernel.params
        if not p.is_constexpr and (p.do_not_specialize or p.name not in ones)
    ]
    load = re.search(
        rf"(ld\.param\.\w+)\s+(%\w+), \[{launch.kernel.__name__}_param_{kept.index(name)}\];", ptx
    )
    assert load is not None
    takes = rf"^\s*(?:@\S+\s+)?([a-z][\w.]*)\s+[^,;]+,[^;]*{re.escape(load[2])}\b"
    taken = re.findall(takes, ptx, re.MULTILINE)
    assert taken
    return {load[1], *taken}


# What widens an argument of 32 bits, and what takes one of 64.
WIDENS = {"ld.param.b32", "ld.param.s32", "cvt.s64.s32", "mul.wide.s32"}
TAKES = {"ld.param.b64", "add.s64", "mul.lo.s64", "setp.lt.s64"}


@pytest.mark.parametrize("op", [op for op in TRAINING if op != "train depthwise s2"])
@pytest.mark.parametrize(("n", "allowed"), [(3, WIDENS | TAKES), (2**31, TAKES)], ids=["few", "many"])
def test_pixels_and_images_are_counted_in_64_bits(op: str, n: int, allowed: set[str]) -> None:
    """Those of 2**31 images, and fewer, which 32 bits may not hold once rounded up to whole steps."""
    with aot.launches() as made:
        TRAINING[op](n, 7, 9)
    counted = [
        (launch, name)
        for launch in made
        for name in ("pixels", "n")
        if isinstance(launch.arguments.get(name), int)
    ]
    assert {launch.kernel.__name__ for launch, _ in counted} == {
        launch.kernel.__name__ for launch in made
    } - {"add_parts_kernel", "normalize_kernel", "norm_gradient_kernel"}
    for launch, name in counted:
        built = launch.compile_for(90)
        assert (built.stack, built.local) == (0, 0)
        assert _taken_by(built.ptx, launch, name) <= allowed, launch.kernel.__name__
