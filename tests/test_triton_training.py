"""The Triton kernels of a training step: in Triton's interpreter against float64, element by element."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from mnv2_fast.kernels import (
    aot,
    norm,
    train_depthwise,
    train_pointwise,
    train_pointwise_gradient,
    train_reference,
    train_stem,
    train_traffic,
)
from mnv2_fast.kernels.common import arithmetic, tiles
from mnv2_fast.kernels.norm import Applied, RawGradient
from triton.runtime.interpreter import InterpretedFunction

F32 = torch.finfo(torch.float32).eps
# Tensors that the launchers make lie between so many NaN.
GUARD = 64
# How a layer can compute, as `Case` has it.
KINDS = [
    {"dtype": dtype, "tf32": True} if tf32 else {"dtype": dtype} for dtype, tf32 in triton_interpreter.kinds()
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, and one way to run it.

    `norm`: of its input, "" for none. `mask`, `batch`: of the gradient. `split`: a kernel for each gradient.
    """

    kind: str
    shape: tuple[int, int, int, int]  # N, H, W, Cin
    cout: int
    dtype: str = "float32"
    tf32: bool = False
    norm: str = "relu6"
    mask: bool = False
    batch: bool = True
    residual: bool = False
    split: bool = False
    wanted: str = "x and weight"
    center: float = 0.0  # of the input, which is so far from zero
    planted: str = ""

    def __str__(self) -> str:
        parts = [self.kind, "x".join(map(str, self.shape)), str(self.cout)]
        for field in dataclasses.fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value}")
        return "-".join(parts)

    @property
    def stride(self) -> int:
        return 1 if self.kind in ("pointwise", "depthwise s1") else 2

    @property
    def rounding(self) -> float:
        """Largest relative error that a factor of a product of matrices takes."""
        if self.dtype != "float32":
            return 0 if self.kind.startswith("depthwise") else torch.finfo(getattr(torch, self.dtype)).eps / 2
        return 2**-10 if self.tf32 else 0


def _cases() -> list[Case]:
    found = []
    shapes = [((1, 1, 2, 1), 1), ((3, 2, 5, 16), 24), ((1, 9, 7, 17), 33), ((2, 5, 3, 72), 40)]
    for (shape, cout), kind, split in itertools.product(shapes, KINDS, (False, True)):
        odd = cout % 2 == 1
        case = Case("pointwise", shape, cout, **kind, split=split, mask=odd, norm="relu6" if odd else "")
        found.append(dataclasses.replace(case, residual=not odd, batch=not (odd and split)))
    found += [
        Case("pointwise", (2, 4, 3, 24), 17, norm="linear", split=split, wanted=wanted)
        for split, wanted in itertools.product((False, True), ("x", "weight"))
    ]
    strides, kinds = ("depthwise s1", "depthwise s2"), [k for k in KINDS if not k.get("tf32")]
    for kind, split in itertools.product(KINDS, (False, True)):
        found += [
            Case("pointwise", (2, 5, 7, 17), 40, **kind, norm="", residual=True, split=split),
            Case("pointwise", (2, 5, 7, 16), 40, **kind, norm="linear", split=split),
        ]
    # 140 columns: more than one program's patches.
    rows = [(1, 1, 2, 1), (3, 7, 7, 8), (2, 15, 2, 17), (1, 8, 9, 33), (1, 2, 140, 3)]
    for kind, dtype, shape in itertools.product(strides, kinds, rows):
        odd = shape[1] % 2 == 1
        of = {"mask": odd, "norm": "relu6" if odd else "linear", "batch": shape[3] != 17}
        found.append(Case(kind, shape, shape[3], **dtype, **of))
    found += [
        Case(kind, (2, 6, 5, 8), 8, norm=norm, wanted=wanted)
        for kind, norm, wanted in itertools.product(strides, ("", "relu6"), ("x", "weight"))
    ]
    for kind, shape in itertools.product(KINDS, ((1, 1, 3, 3), (2, 15, 18, 3), (3, 32, 9, 3))):
        cout = 32 if shape[0] == 2 else 17
        found.append(Case("stem", shape, cout, **kind, norm="", mask=cout == 17, wanted="weight"))
    layers = [("pointwise", 9), ("depthwise s1", 8), ("depthwise s2", 8)]
    found += [Case(kind, (3, 9, 30, 8), cout, norm="", center=1000.0) for kind, cout in layers]
    found.append(Case("stem", (3, 19, 30, 3), 8, norm="", wanted="weight", center=1000.0))
    for (kind, cout), planted in itertools.product(layers, ("nan", "inf")):
        found.append(Case(kind, (2, 6, 5, 8), cout, "float16", planted=planted))
    return found


CASES = _cases()


def _away(z: Tensor, values: Tensor) -> Tensor:
    """z moved where a norm of these values, rounded, could come out on the other side of 0 or 6."""
    mean, scale, shift = values.double()
    y = (z.double() - mean) * scale + shift
    near = torch.minimum(y.abs(), (y - 6).abs()) < 1e-3
    return torch.where(near, z.double() + 0.2 * z.double().abs().clamp(min=1), z.double()).to(z.dtype)


def _norm(channels: int, center: float = 0.3) -> Tensor:
    """[3, C]: of which ReLU6 is flat for a part of random values, below and above."""
    mean = torch.randn(channels) * center
    return torch.stack((mean, 1 + 3 * torch.rand(channels), torch.rand(channels) * 3))


@contextlib.contextmanager
def _poisoned() -> Iterator[list[Tensor]]:
    """Within it new tensors are NaN, and lie between NaN; the memory of all of them is in the list."""
    empty, memories = torch.empty, []

    def guarded(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = math.prod(size)
        memory = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
        memories.append(memory)
        return memory[GUARD : GUARD + count].view(*size)

    like, torch.empty = torch.empty_like, guarded
    torch.empty_like = lambda t: guarded(*t.shape, dtype=t.dtype, device=t.device)
    try:
        yield memories
    finally:
        torch.empty, torch.empty_like = empty, like


def _plant(x: Tensor, case: Case) -> Tensor:
    if case.planted:
        x[tuple(size // 2 for size in x.shape)] = float(case.planted)
    return x


def _run(case: Case) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, kernel's answer, float64 twin's, how far they may be apart) of all that a case makes."""
    cin = case.shape[-1]
    dtype = getattr(torch, case.dtype)
    weight_shape = {"pointwise": (case.cout, cin, 1, 1), "stem": (case.cout, 3, 3, 3)}
    weight = torch.randn(weight_shape.get(case.kind, (cin, 1, 3, 3))).to(dtype).float()
    if case.center and case.kind != "pointwise":
        weight *= torch.tensor([0.0, 1.0, 0.0]).outer(torch.tensor([0.0, 1.0, 0.0]))  # no padding is met
    x = (case.center + 2 * torch.randn(case.shape)).to(dtype)
    if case.kind == "stem":
        x = x.permute(0, 3, 1, 2)
    applied = Applied(_norm(cin), case.norm == "relu6") if case.norm else None
    if applied is not None:
        x = _away(x, applied.values)
    x = _plant(x, case)
    with _poisoned() as memories:
        z, parts = _forward(case, x, applied, weight, dtype)
        want = train_reference.forward(x, applied, weight, case.stride)
        terms = weight[0].numel()
        size = train_reference.forward(*_sizes(x, applied), weight.abs(), case.stride)
        yield "z", z, want, _allowed(case, want, size, terms, dtype)
        assert parts is not None
        if not case.planted:
            yield from _moments(z, parts)
        z_values, g = _norm(case.cout), torch.randn(z.shape).to(dtype)
        # An expansion's raw output is made again, so it must be its own.
        remade = case.kind == "pointwise" and not case.mask and case.cout >= 2 * cin
        held = z if remade else _away(z.nan_to_num(0, 0, 0), z_values)
        coefficients = torch.randn(3, case.cout)
        of = RawGradient(_plant(g, case), held, z_values, coefficients, case.mask, case.batch)
        residual = torch.randn(case.shape).to(dtype) if case.residual else None
        call = weight, x, applied, residual
        dx, sums, dw = _gradients(case, of, call)
        twin = train_reference.gradients(of, *call, stride=case.stride)
        yield from _judged(case, of, call, (dx, sums, dw), twin)
    for memory in memories:
        assert memory[:GUARD].isnan().all(), "wrote before a tensor"
        assert memory[-GUARD:].isnan().all(), "wrote past a tensor"


def _forward(
    case: Case, x: Tensor, applied: Applied | None, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    if case.kind == "stem":
        return train_stem.forward(x, weight, dtype, moments=True, tf32=case.tf32)
    if case.kind == "pointwise":
        return train_pointwise.forward(x, applied, weight, moments=True, tf32=case.tf32)
    return train_depthwise.forward(x, applied, weight, case.stride, moments=True)


# What a layer multiplied and its gradient adds to: weight, x, the norm of x, residual.
Call = tuple[Tensor, Tensor, Applied | None, Tensor | None]


def _gradients(case: Case, of: RawGradient, call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wanted = {"for_x": "x" in case.wanted.split(), "for_weight": "weight" in case.wanted}
    weight, x, applied, _ = call
    if case.kind == "stem":
        return None, None, train_stem.weight_gradient(of, x, tf32=case.tf32)
    if case.kind != "pointwise":
        return train_depthwise.gradients(of, weight, x, applied, case.stride, **wanted)
    if not case.split:
        return train_pointwise_gradient.gradients(of, *call, tf32=case.tf32, **wanted)
    kind = arithmetic(x.dtype, case.tf32)
    dx = dw = sums = None
    if wanted["for_x"]:
        dx, sums, _ = train_pointwise_gradient.gradients(of, *call, tf32=case.tf32, for_weight=False)
    if wanted["for_weight"]:
        tile = tiles("", "train_pointwise")[f"weight_{kind}"]
        _, _, dw = train_pointwise_gradient.gradients(of, *call, tf32=case.tf32, for_x=False, tile=tile)
    return dx, sums, dw


def _sizes(x: Tensor, applied: Applied | None) -> tuple[Tensor, None]:
    """What a convolution multiplies, as large as its roundings are: with the terms of the norm's sum."""
    if applied is None:
        return x.double().abs(), None
    mean, scale, shift = applied.values.double()
    size = (x.double() - mean).abs() * scale.abs() + shift.abs()
    return torch.where(size.isfinite(), size, train_reference.applied(x, applied).abs()), None


def _gradient_size(of: RawGradient) -> RawGradient:
    """A gradient whose terms are all positive, as large as its roundings are."""
    mean = of.values[0].double()
    distance = of.z.double().abs() + mean.abs()  # z may be made again, unrounded
    return RawGradient(
        of.g.abs(), distance + mean, of.values.double(), of.coefficients.abs(), False, of.batch
    )


def _allowed(case: Case, want: Tensor, size: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """Roundings of two factors, of the norm or the gradient's terms before that, of so many sums; then one of
    the result.
    """
    own = torch.finfo(dtype)
    relative = 2 * case.rounding + (terms + 8) * F32
    return relative * size.nan_to_num(0, 0) + own.eps / 2 * want.abs().nan_to_num(0, 0) + own.tiny


def _moments(z: Tensor, parts: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """The norm that follows from the parts, beside the moments of what was stored."""
    got, values = norm.normalize(parts, None, None, 1e-5)
    want = train_reference.moments(z)
    off = 8 * F32 * z.double().flatten(0, 2).abs().amax(0)  # of a center of one tile
    slack = torch.stack((off, off**2 + 64 * F32 * want[1]))
    yield "moments", got, want, slack
    inverse = 1 / (got[1] + 1e-5).sqrt()
    want = torch.stack((got[0], inverse, torch.zeros_like(inverse)))
    yield "values", values, want, F32 * want.abs()


def _judged(
    case: Case,
    of: RawGradient,
    call: Call,
    found: tuple[Tensor | None, Tensor | None, Tensor | None],
    twin: train_reference.Gradients,
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    weight, x, applied, residual = call
    dx, sums, dw = found
    largest = train_reference.gradients(
        _gradient_size(of), weight.abs(), *_sizes(x, applied), residual, stride=case.stride
    )
    assert (dx is not None) == ("x" in case.wanted.split())
    assert (dw is not None) == ("weight" in case.wanted)
    if dx is not None:
        terms = weight[:, 0].numel()
        yield "dx", dx, twin.x, _allowed(case, twin.x, largest.x.abs(), terms, x.dtype)
        if applied is not None:
            assert sums is not None
            # Of what was stored; the twin's mask does not mask it again.
            _, want = train_reference.masked(dx, x, Applied(applied.values, False))
            mean = applied.values[0].double()
            distance = (x.double() - mean).abs()
            _, size = train_reference.masked(
                dx.abs(), distance + mean, Applied(applied.values.double(), False)
            )
            pixels = x.numel() // x.shape[-1]
            yield "sums", sums.double().sum(0), want, ((pixels + 8) * F32 * size).nan_to_num(0, 0)
    if dw is not None:
        terms = of.g.numel() // of.g.shape[-1]
        yield "dw", dw, twin.weight, _allowed(case, twin.weight, largest.weight, terms, torch.float32)


def _short_tiles(device_name: str, kernel: str) -> dict[str, dict[str, int]]:
    """The tile table with two rows a step and one column a lane, for which the interpreter takes a third."""
    return {name: {**row, "rows": 2, "cols": 1} for name, row in tiles(device_name, kernel).items()}


@functools.cache
def _verdict(case: Case) -> tuple[str, str]:
    """What is wrong with the kernels' answers to one case, and with the count of the bytes that its launches
    move, "" for nothing. Runs in the child.
    """
    torch.manual_seed(0)
    wrong, miscounted, run = [], [], InterpretedFunction.run

    def counted(self: Any, *values: Any, **named: Any) -> None:
        # One launch at a time, within the list of all.
        with triton_interpreter.recorded() as found:
            run(self, *values, **named)
        count = train_traffic.traffic(made[-1])
        if count != found.total:
            miscounted.append(f"{self.__name__}: {count} counted, {found.total} moved")

    with pytest.MonkeyPatch.context() as patch:
        if case.dtype != "float16":
            patch.setattr(train_depthwise, "tiles", _short_tiles)
        patch.setattr(InterpretedFunction, "run", counted)
        with aot.launches() as made:
            for name, out, want, allowed in _run(case):
                if why := triton_interpreter.judge(out, want, allowed):
                    wrong.append(f"{name}: {why}")
    return "; ".join(wrong), "; ".join(miscounted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_match_float64(case: Case, verdicts: dict[str, str]) -> None:
    assert verdicts[str(case)] == ""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_traffic_is_what_was_moved(case: Case, verdicts: dict[str, str]) -> None:
    assert verdicts[f"traffic of {case}"] == ""


if __name__ == "__main__":
    checks = {str(case): functools.partial(_verdict, case) for case in CASES}
    names = [name for case in checks for name in (case, f"traffic of {case}")]
    triton_interpreter.print_verdicts(
        names, lambda name: checks[name.removeprefix("traffic of ")]()[name.startswith("traffic")]
    )
