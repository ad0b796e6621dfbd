"""Every operator row against its float64 twin: odd shapes, strides, NaN and Inf, gradients, registration."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import one_thread  # noqa: F401
from torch import Tensor
from torch.library import opcheck

from mnv2_fast import autograd, ops
from mnv2_fast.backends import cpu, eager
from mnv2_fast.chain import Chain

pytestmark = pytest.mark.usefixtures("native", "one_thread")

ROWS = pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)


def call(op: ops.Op, *args: Any) -> Tensor:
    """The registered operator's answer."""
    return getattr(torch.ops.mnv2, op.name)(*args)


def describe(args: ops.Args) -> str:
    """Shapes and other arguments, for a failure's message."""
    return ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else str(a)[:40] for a in args)


def check(op: ops.Op, args: ops.Args) -> None:
    """The answer is within the row's tolerance of the twin's, in the layout that the schema promises."""
    y = call(op, *args)
    fake = op.fake(*args)
    assert (y.shape, y.dtype, y.stride()) == (fake.shape, fake.dtype, fake.stride()), describe(args)
    error = (y.double() - op.reference(*args)).abs()
    assert bool((error <= op.tolerance(*args)).all()), f"{describe(args)}: {error.max():.3g}"


@ROWS
def test_against_float64(op: ops.Op) -> None:
    for args in op.samples():
        check(op, args)


@ROWS
def test_bf16_against_float64(op: ops.Op) -> None:
    for sample in itertools.islice(op.samples(), 0, None, 5):
        args = ops.map_tensors(lambda t: t.bfloat16(), sample)
        module, reason = ops.backend_of(op.name, *args)
        assert op.name == "network" or module is cpu, reason
        check(op, args)


@ROWS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_in_torch(op: ops.Op, dtype: torch.dtype) -> None:
    for args in itertools.islice(op.samples((8,), (7,), (2,)), 4):
        converted = ops.map_tensors(lambda t: t.to(dtype), args)
        y = call(op, *converted)
        assert y.dtype == dtype
        assert torch.equal(y, op.eager(*converted))


@ROWS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_go_where_torch_sends_them(op: ops.Op, value: float) -> None:
    for image, *rest in itertools.islice(op.samples((8, 17), (8,), (2,)), 6):
        x = image.clone()
        x[0, -1, 3, 4] = value
        y, expected = call(op, x, *rest), op.eager(x, *rest)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        finite = expected.isfinite()
        torch.testing.assert_close(y[finite], expected[finite], rtol=1e-4, atol=1e-4)


def leaves(op: ops.Op, args: ops.Args) -> ops.Args:
    """The arguments as leaves that ask for a gradient, running statistics left out."""
    if op.name != "network":
        return ops.map_tensors(lambda t: t.clone().requires_grad_(), args)
    x, tensors, spec = args
    names = [name for link in Chain.decode(spec).links for name in link.names]
    asked = [t.clone().requires_grad_("running" not in name) for t, name in zip(tensors, names, strict=True)]
    return x.clone().requires_grad_(), asked, spec


@ROWS
def test_opcheck(op: ops.Op) -> None:
    overload = getattr(torch.ops.mnv2, op.name).default
    for args in itertools.islice(op.samples((3, 8), (7,), (0, 2)), 0, None, 3):
        opcheck(overload, args)
        opcheck(overload, leaves(op, args))
        opcheck(overload, ops.map_tensors(lambda t: t.bfloat16(), args))


@ROWS
def test_gradients_are_torchs(op: ops.Op) -> None:
    for args in itertools.islice(op.samples((8,), (7,), (2,)), 4):
        found = []
        for function in (call, lambda op, *args: op.eager(*args)):
            mine = leaves(op, args)
            tensors = [t for t in autograd.flat(op, mine)[0] if t is not None and t.requires_grad]
            y = function(op, *mine)
            found.append(
                torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), tensors)
            )
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1))


@ROWS
def test_double_backward_is_refused(op: ops.Op) -> None:
    args = leaves(op, next(op.samples((8,), (7,), (2,))))
    (grad,) = torch.autograd.grad(call(op, *args).square().sum(), [args[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        grad.sum().backward()


@pytest.mark.parametrize("op", [op for op in ops.OPS if op.name != "network"], ids=lambda op: op.name)
def test_twin_is_differentiated_rightly(op: ops.Op) -> None:
    args = ops.map_tensors(lambda t: t.double().requires_grad_(), next(op.samples((3,), (2,), (1,))))
    tensors = [t for t in args if isinstance(t, Tensor)]
    rest = [a for a in args if not isinstance(a, Tensor)]

    def twin(*tensors: Tensor) -> Tensor:
        if op.name == "pointwise" and len(tensors) == 3:
            return eager.pointwise(*tensors, None, rest[-1])
        return op.eager(*tensors, *rest)

    assert torch.autograd.gradcheck(twin, tensors)


@ROWS
def test_shapes_that_do_not_fit_are_refused(op: ops.Op) -> None:
    x, *rest = next(op.samples((8,), (7,), (2,)))
    for bad in (x[0], torch.cat((x, x), 1), x[:, :0], x[:, :, :0], x[..., :0]):
        with pytest.raises(ValueError, match=rf"mnv2::{op.name}: .*"):
            call(op, bad, *rest)


@pytest.mark.parametrize("op", [op for op in ops.OPS if op.name != "network"], ids=lambda op: op.name)
def test_mixed_dtypes_and_biases_are_refused(op: ops.Op) -> None:
    x, weight, bias, *rest = next(op.samples((8,), (7,), (2,)))
    with pytest.raises(ValueError, match="dtype"):
        call(op, x.double(), weight, bias, *rest)
    with pytest.raises(ValueError, match="bias"):
        call(op, x, weight, bias[:-1], *rest)


@ROWS
def test_kernels_serve_float32(op: ops.Op) -> None:
    args = next(op.samples((8,), (7,), (2,)))
    if op.name == "network":
        assert ops.network_declines(*args) is None
        assert "float64" in str(ops.network_declines(args[0].double(), *args[1:]))
    else:
        assert ops.backend_of(op.name, *args) == (cpu, "")
        backend, reason = ops.backend_of(op.name, *ops.map_tensors(lambda t: t.double(), args))
        assert backend is eager
        assert "float64" in reason


def test_costs() -> None:
    depthwise = next(op for op in ops.OPS if op.name == "depthwise")
    args = (torch.zeros(2, 8, 5, 5), torch.zeros(8, 1, 3, 3), torch.zeros(8), 2, True)
    assert depthwise.macs(*args) == 2 * 8 * 3 * 3 * 9
    assert depthwise.flops(*args) == 2 * depthwise.macs(*args)
    assert depthwise.bytes(*args) == 4 * (2 * 8 * 25 + 72 + 8 + 2 * 8 * 9)


def test_rows_are_the_registered_operators() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.partition("::")[2] for name in names if name.startswith("mnv2::")}
    assert {op.name for op in ops.OPS} | {"gradients"} == registered
