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
    pointwise,
    pointwise_gradient,
    stem,
)
from mnv2_fast.kernels.common import arithmetic, tiles
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


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 32)], ids=str)
def test_one_binary_serves_every_batch(op: str, size: tuple[int, int]) -> None:
    """A kernel is compiled at the first call alone, whatever batches follow, one of a single image, too."""
    keys = [_keys(lambda n=n: CALLS[op](n, *size)) for n in (1, 2, 3, 16, 17, 256)]
    assert all(key == keys[0] for key in keys), keys


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 32)], ids=str)
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
