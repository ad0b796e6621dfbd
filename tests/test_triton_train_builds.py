"""A whole training step on a GPU without one: the bytes that it moves, and its kernels compiled."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton_interpreter import kinds

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

import training_step
from mnv2_fast.kernels import aot, train_traffic
from mnv2_fast.kernels.common import arithmetic

from mnv2_fast import arch
from mnv2_fast.backends.triton import NO_EXACT_DOT

# Bytes of shared memory that one program may have: the default tiles are for all of these.
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Bytes an image that a step may move at batch 256 in fp16, forward and backward.
STEP_BYTES = 95e6
# What docs/gpu.md says of it: launches and MB an image.
FORWARD, BACKWARD = (120, 32.1), (184, 61.2)
# Launched for weights that want a gradient alone.
OF_WEIGHTS = ("add_parts_kernel", "weight_gradient_kernel")


def test_traffic_of_a_whole_step() -> None:
    step = training_step.launches(torch.float16)
    moved = [sum(map(train_traffic.traffic, made)) / 256 for made in step]
    found = [(len(made), round(each / 1e6, 1)) for made, each in zip(step, moved, strict=True)]
    print(f"launches and MB an image, forward and backward: {found}")
    assert found == [FORWARD, BACKWARD]
    assert sum(moved) <= STEP_BYTES
    # Every raw output is written once and read once by the layer after it, at least.
    outputs = sum(layer.ho * layer.wo * layer.spec.cout for layer in arch.layers() if layer.spec.bn)
    assert moved[0] >= 2 * 2 * outputs


def test_one_binary_serves_every_batch() -> None:
    known = [
        training_step.binaries([*step.forward, *step.backward]).keys()
        for step in (training_step.launches(torch.float16, batch=batch) for batch in (2, 3, 16, 256))
    ]
    assert all(keys == known[0] for keys in known)


def _builds() -> Iterator[Any]:
    """(how a step computes, what is frozen, GPU, kernel); fp16 on sm_90 is compiled often, in part."""
    for (name, tf32), sm, kernel in itertools.product(kinds(), SHARED, train_traffic.COUNTS):
        dtype = getattr(torch, name)
        exact = arithmetic(dtype, tf32) == "ieee"
        if exact and sm >= 10 * NO_EXACT_DOT[0]:
            continue  # declined there
        for frozen in ("", "norms", "weights"):
            often = dtype == torch.float16 and sm == 90
            if frozen and not often:
                continue
            if frozen == "weights" and kernel[1] in OF_WEIGHTS:
                continue
            kind = f"{name}-tf32" if tf32 else name
            yield pytest.param(
                (dtype, tf32, frozen),
                sm,
                kernel,
                id="-".join(filter(None, (*kernel, kind, frozen, str(sm)))),
                marks=pytest.mark.slow,
            )
            if often and not frozen:
                yield pytest.param((dtype, tf32, "some"), sm, kernel, id="-".join((*kernel, "some")))


@pytest.mark.parametrize(("how", "sm", "kernel"), list(_builds()))
def test_compiles_without_spills(
    how: tuple[torch.dtype, bool, str], sm: int, kernel: tuple[str, str]
) -> None:
    dtype, tf32, frozen = how
    step = training_step.launches(dtype, tf32=tf32, frozen=frozen.replace("some", ""))
    made = [launch for launch in (*step.forward, *step.backward) if training_step.name(launch) == kernel]
    distinct = list(training_step.binaries(made).values())
    if frozen == "some":  # of a layer with few channels, of one with many
        distinct = [distinct[0], distinct[len(distinct) // 2]]
    assert distinct
    for launch in distinct:
        built = launch.compile_for(sm)
        print(f"{built.registers} registers, {built.shared} bytes shared: {_constants(launch)}")
        assert (built.stack, built.local) == (0, 0), _constants(launch)
        assert built.shared <= SHARED[sm], _constants(launch)
        clamps = {clamp for clamp in re.findall(r"\b(?:min|max)\.\S*", built.ptx) if clamp.endswith("f32")}
        assert clamps == ({"max.NaN.f32", "min.NaN.f32"} if _clamps(launch) else set()), _constants(launch)
        on_tensor_cores = re.search(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", built.ptx) is not None
        multiplies = kernel[0] in ("train_pointwise", "train_pointwise_gradient", "train_stem")
        assert on_tensor_cores == (multiplies and arithmetic(dtype, tf32) != "ieee"), _constants(launch)


def _constants(launch: aot.Launch) -> dict[str, Any]:
    return {name: value for name, value in launch.arguments.items() if name.isupper()}


def _clamps(launch: aot.Launch) -> bool:
    """Whether a kernel applies ReLU6 to what it reads; those of a gradient alone ask on which side it is."""
    masks = ("input_gradient_kernel", "sums_kernel")
    if launch.kernel.__name__ in masks:
        return False
    if launch.kernel.__name__ == "gradients_kernel" and not launch.arguments["FOR_WEIGHT"]:
        return False
    return bool(launch.arguments.get("RELU6"))
