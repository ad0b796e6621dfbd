"""Layers in train mode on the kernels against the same modules in plain torch, in float64."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import RunPython
from torch import Tensor, nn

from mnv2_fast import release_training_memory, training
from mnv2_fast.backends import cpu
from mnv2_fast.nn import ConvBNReLU6, InvertedResidual, eager_only

EPS = torch.finfo(torch.float32).eps
BLOCKS = ((16, 24, 2, 6), (24, 24, 1, 6), (32, 16, 1, 1), (8, 8, 1, 1), (17, 17, 1, 3), (33, 9, 2, 2))
Forward = Callable[[nn.Module, Tensor], Tensor]


def fast(module: nn.Module, x: Tensor) -> Tensor:
    assert module.why_not(x) is None, module.why_not(x)  # type: ignore[operator]
    return module(x)


def plain(module: nn.Module, x: Tensor) -> Tensor:
    with eager_only():
        return module(x)


def spread(module: nn.Module) -> nn.Module:
    """Norms away from the identity, as in a trained network; statistics that are no one's default."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.5, 0.5)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.train()


def step(forward: Forward, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The answer, every gradient and every buffer after one forward and backward pass."""
    x = x.clone().requires_grad_()
    y = forward(module, x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return found | {name: b.clone() for name, b in module.named_buffers()}  # type: ignore[return-value]


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, in L2."""
    return float(torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double()))


def compare(module: nn.Module, x: Tensor) -> None:
    """One step of the kernels is as near to float64 as design.md asks, beside torch's in float32."""
    wide, narrow = copy.deepcopy(module).double(), copy.deepcopy(module)
    right = step(plain, wide, x.double())
    torchs = step(plain, narrow, x.contiguous(memory_format=torch.channels_last))
    ours = step(fast, module, x)
    assert ours.keys() == right.keys()
    for name, expected in right.items():
        if not expected.is_floating_point():
            assert torch.equal(ours[name], expected), name
            continue
        factor = 4 if name.endswith("weight") else 2
        limit = factor * distance(torchs[name], expected) + 16 * EPS
        assert distance(ours[name], expected) <= limit, name


@pytest.fixture(params=[False, True], ids=["kept", "remade"])
def expansions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A block's expansion is kept for backward, as of any small input, or made again, as of a large one."""
    if request.param:
        monkeypatch.setattr(training, "REMADE_VALUES", 0)
        monkeypatch.setattr(training, "REMADE_INPUTS", 64)
    return bool(request.param)


def test_what_is_made_again_is_not_kept(expansions: bool) -> None:
    y = fast(spread(InvertedResidual(8, 8, 1, 2)), torch.randn(2, 8, 5, 5))
    assert y.grad_fn is not None
    shapes = [None if t is None else t.shape for t in y.grad_fn.saved_tensors]  # type: ignore[attr-defined]
    assert shapes.count((2, 5, 5, 16)) == (1 if expansions else 2)  # the depthwise layer's is, in any case


@pytest.mark.usefixtures("expansions")
@pytest.mark.parametrize(("cin", "cout", "stride", "ratio"), BLOCKS)
@pytest.mark.parametrize("size", [(7, 2), (15, 16)])
def test_block_under_autocast(cin: int, cout: int, stride: int, ratio: int, size: tuple[int, int]) -> None:
    """In bf16 as near to float64 as torch's autocast, and of its dtypes."""
    module = spread(InvertedResidual(cin, cout, stride, ratio))
    x = torch.randn(3, cin, *size).bfloat16() * 2

    def under(forward: Forward) -> Forward:
        def run(module: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(module, x)

        return run

    right = step(plain, copy.deepcopy(module).double(), x.double())
    torchs = step(under(plain), copy.deepcopy(module), x.contiguous(memory_format=torch.channels_last))
    ours = step(under(fast), module, x)
    judged = 0
    for name, expected in right.items():
        assert ours[name].dtype is torchs[name].dtype, name
        allowed = distance(torchs[name], expected) if expected.is_floating_point() else 1.0
        if allowed < 0.2:  # else nothing but rounding
            assert distance(ours[name], expected) <= 2 * allowed + 2**-8, name
            judged += 1
    assert judged > len(right) / 2


@pytest.mark.usefixtures("expansions")
@pytest.mark.parametrize(("cin", "cout", "stride", "ratio"), BLOCKS)
@pytest.mark.parametrize("size", [(1, 1), (7, 2), (15, 16)])
def test_block(cin: int, cout: int, stride: int, ratio: int, size: tuple[int, int]) -> None:
    # Of three values a channel the deviation may be so small that the mean's rounding decides.
    images = 9 if size == (1, 1) else 3
    compare(spread(InvertedResidual(cin, cout, stride, ratio)), torch.randn(images, cin, *size) * 2)


@pytest.mark.parametrize("isa", cpu.isas() if cpu.available() else [])
def test_every_instruction_set(isa: str) -> None:
    before = cpu.isa()
    cpu.extension().select_isa(isa)
    try:
        compare(spread(InvertedResidual(24, 24, 1, 6)), torch.randn(2, 24, 9, 8))
        compare(spread(ConvBNReLU6(3, 17, stride=2)), torch.randn(2, 3, 9, 8))
    finally:
        cpu.extension().select_isa(before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stem_and_head(layout: torch.memory_format) -> None:
    compare(spread(ConvBNReLU6(3, 32, stride=2)), torch.randn(2, 3, 15, 16).contiguous(memory_format=layout))
    compare(spread(ConvBNReLU6(3, 8, stride=2)), torch.randn(2, 3, 18, 31)[:, :, 1:, ::2])
    compare(
        spread(ConvBNReLU6(40, 96, kernel_size=1)), torch.randn(2, 40, 7, 7).contiguous(memory_format=layout)
    )


def test_streamed_tensors() -> None:
    """Tensors of 4 MB and more are written past the caches."""
    compare(spread(InvertedResidual(16, 24, 2, 6)), torch.randn(2, 16, 80, 80))
    compare(spread(InvertedResidual(16, 16, 1, 6)), torch.randn(2, 16, 80, 80))


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.usefixtures("expansions")
def test_momentum_none_averages_all_batches() -> None:
    block = spread(InvertedResidual(8, 8, 1, 2))
    for norm in norms(block):
        norm.reset_running_stats()
        norm.momentum = None
    for _ in range(3):
        compare(block, torch.randn(2, 8, 5, 5))
        block.zero_grad()
    assert norms(block)[0].num_batches_tracked == 3


@pytest.mark.usefixtures("expansions")
def test_statistics_that_are_switched_off() -> None:
    """A norm that has statistics and is told to keep none for a while takes the batch's and moves nothing."""
    block = spread(InvertedResidual(8, 8, 1, 2))
    for norm in norms(block):
        norm.track_running_stats = False
    before = {name: b.clone() for name, b in block.named_buffers()}
    compare(block, torch.randn(2, 8, 5, 5))
    assert all(torch.equal(b, before[name]) for name, b in block.named_buffers())


@pytest.mark.parametrize("training", [True, False])
def test_answers_may_be_written_in_place(training: bool) -> None:
    block = spread(InvertedResidual(8, 8, 1, 2)).train(training)
    x = torch.randn(2, 8, 5, 5)
    found = []
    for forward in (fast, plain):
        block.zero_grad()
        y = forward(block, x)
        torch.nn.functional.relu(y.add_(1), inplace=True).square().sum().backward()
        found.append([p.grad.clone() for p in block.parameters()])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-3 * float(torchs.abs().max()))


@pytest.mark.usefixtures("expansions")
def test_frozen_norms() -> None:
    block = spread(InvertedResidual(16, 16, 1, 6))
    norms(block)[0].eval()
    compare(block, torch.randn(2, 16, 7, 7))
    for norm in norms(block):
        norm.eval()
    block.zero_grad()
    before = [norm.running_mean.clone() for norm in norms(block)]
    compare(block, torch.randn(2, 16, 7, 7))
    assert all(torch.equal(norm.running_mean, b) for norm, b in zip(norms(block), before, strict=True))


def test_a_norm_without_gradients_costs_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for those of the last norm, which is frozen and whose scale and shift are, too."""
    block, x = spread(InvertedResidual(16, 16, 1, 6)), torch.randn(2, 16, 7, 7)
    last = norms(block)[-1].eval()
    full = step(fast, copy.deepcopy(block), x)
    last.requires_grad_(False)
    monkeypatch.setattr(training.cpu_train, "sums", lambda *_: pytest.fail("a pass over the gradient"))
    part = step(fast, block, x)
    assert full.keys() - part.keys() == {"conv.3.weight", "conv.3.bias"}
    assert all(torch.equal(part[name], full[name]) for name in part)


def _another_weight(block: InvertedResidual) -> None:
    block.conv[0][0].weight = nn.Parameter(torch.randn(16, 8, 1, 1))


def _other_memory(block: InvertedResidual) -> None:
    block.conv[0][0].weight.data = torch.randn(8, 16, 1, 1).transpose(0, 1)


def _another_norm(block: InvertedResidual) -> None:
    block.conv[1][1] = nn.BatchNorm2d(16, eps=0.1, momentum=0.5)


def _other_settings(block: InvertedResidual) -> None:
    block.conv[1][1].eps, block.conv[1][1].momentum = 0.1, 0.5


def _no_residual(block: InvertedResidual) -> None:
    block.use_res_connect = False


def _no_relu(block: InvertedResidual) -> None:
    del block.conv[0][2]


def _frozen_norm(block: InvertedResidual) -> None:
    block.conv[1][1].eval()


def _statistics_with_gaps(block: InvertedResidual) -> None:
    norm = block.conv[1][1]
    norm.running_mean, norm.running_var = torch.rand(16, 2).unbind(1)


CHANGES = (
    _another_weight,
    _other_memory,
    _another_norm,
    _other_settings,
    _no_residual,
    _no_relu,
    _frozen_norm,
)


@pytest.mark.parametrize("change", [*CHANGES, _statistics_with_gaps])
def test_what_changes_between_steps_is_seen(change: Callable[[InvertedResidual], None]) -> None:
    block = spread(InvertedResidual(8, 8, 1, 2))
    x = torch.randn(2, 8, 5, 5)
    for _ in range(2):
        fast(block, x).sum().backward()
    chain = block.train_chain()
    assert block.train_chain() is chain  # it is remembered
    block.zero_grad()
    change(block)
    compare(block, x)


def test_what_the_kernels_do_not_take_is_seen_between_steps() -> None:
    block = spread(InvertedResidual(8, 8, 1, 2))
    x = torch.randn(2, 8, 5, 5)
    fast(block, x)
    weight, norm = block.conv[0][0].weight, block.conv[1][1]
    memory = weight.untyped_storage()
    size, values = memory.nbytes(), weight.detach().clone()
    memory.resize_(0)
    assert "memory was taken away" in str(block.why_not(x))
    memory.resize_(size)
    with torch.no_grad():
        weight.copy_(values)
    fast(block, x)
    handle = norm.register_forward_hook(lambda *_: None)
    assert "hook" in str(block.why_not(x))
    handle.remove()
    fast(block, x)
    norm.running_mean.data = norm.running_mean.data.double()
    assert "float64" in str(block.why_not(x))


def test_running_statistics_have_another_version_after_a_step() -> None:
    """As torch's have, which tells those who keep something made of them."""
    block = spread(InvertedResidual(8, 8, 1, 2))
    before = {name: b._version for name, b in block.named_buffers()}
    fast(block, torch.randn(2, 8, 5, 5))
    assert all(b._version > before[name] for name, b in block.named_buffers())


@pytest.mark.usefixtures("expansions")
def test_norms_without_statistics_or_scale() -> None:
    block = spread(InvertedResidual(8, 12, 1, 2))
    block.conv[0][1] = nn.BatchNorm2d(16, affine=False)
    block.conv[1][1] = nn.BatchNorm2d(16, track_running_stats=False)
    compare(block, torch.randn(2, 8, 5, 5))
    block.zero_grad()
    block.conv[1][1].eval()
    compare(block, torch.randn(2, 8, 5, 5))


@pytest.mark.usefixtures("expansions")
def test_any_subset_of_parameters() -> None:
    """Gradients of what asks for one are those of a step where all do; the rest has none."""
    x = torch.randn(2, 16, 9, 9)
    block = spread(InvertedResidual(16, 16, 1, 6))
    full = step(fast, copy.deepcopy(block), x)
    names = [name for name, _ in block.named_parameters()]
    for asked in itertools.chain(([name] for name in names), (names[:4], names[5:])):
        part = copy.deepcopy(block)
        for name, p in part.named_parameters():
            p.requires_grad_(name in asked)
        fast(part, x).backward(torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(1)))
        for name, p in part.named_parameters():
            assert (p.grad is not None) == (name in asked)
            assert p.grad is None or torch.equal(p.grad, full[name])
    for p in block.parameters():
        p.requires_grad_(False)
    assert not fast(block, x).requires_grad
    with torch.no_grad():
        assert not fast(spread(InvertedResidual(16, 16, 1, 6)), x).requires_grad


@pytest.mark.usefixtures("expansions")
def test_accumulation_and_two_forwards_before_a_backward() -> None:
    block = spread(InvertedResidual(8, 8, 1, 3))
    a, b = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    alone = []
    for x in (a, b):
        block.zero_grad()
        fast(block, x).sum().backward()
        alone.append([p.grad.clone() for p in block.parameters()])
    block.zero_grad()
    one, two = fast(block, a), fast(block, b)
    two.sum().backward()
    one.sum().backward(retain_graph=True)
    for p, first, second in zip(block.parameters(), *alone, strict=True):
        assert torch.equal(p.grad, second + first)
    one.sum().backward()
    for p, first, second in zip(block.parameters(), *alone, strict=True):
        assert torch.equal(p.grad, second + first + first)


def test_memory_is_used_again() -> None:
    block = spread(InvertedResidual(16, 16, 1, 6))
    x = torch.randn(4, 16, 28, 28)
    kept = []
    for _ in range(4):
        fast(block, x).sum().backward()
        fast(block, x)
        kept.append(cpu.extension().TrainBuffer.kept())
    assert kept[1] == kept[2] == kept[3] > 0
    y = fast(block, x)
    assert cpu.extension().TrainBuffer.kept() < kept[-1]
    del y
    assert cpu.extension().TrainBuffer.kept() == kept[-1]


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_given_back() -> None:
    """All but what a tensor still uses, at once, and training goes on."""
    block = spread(InvertedResidual(32, 32, 1, 6))
    x = torch.randn(8, 32, 56, 56)
    fast(block, x).sum().backward()
    y = fast(block, x[:1])
    value = y.detach().clone()
    kept, before = cpu.extension().TrainBuffer.kept(), _resident()
    released = release_training_memory()
    assert released == kept > 1e7
    assert before - _resident() > 0.9 * released
    assert cpu.extension().TrainBuffer.kept() == release_training_memory() == 0
    assert torch.equal(y, value)
    y.sum().backward()
    del y
    again = cpu.extension().TrainBuffer.kept()
    fast(block, x).sum().backward()
    assert cpu.extension().TrainBuffer.kept() >= again > 0


@pytest.mark.parametrize(("images", "size", "dtype"), [(16, 224, torch.float32), (16, 192, torch.bfloat16)])
def test_what_a_step_keeps_is_known_before(
    run_python: RunPython, images: int, size: int, dtype: torch.dtype
) -> None:
    """Of the peak of two steps, over what is held once a small one has given its memory back, in a process
    of its own.
    """
    code = """
import sys, torch
from mnv2_fast import MobileNetV2, release_training_memory
from mnv2_fast.training import kept_bytes
images, size, bf16 = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "torch.bfloat16"
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
def step(x):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(x).float().square().mean()
    loss.backward()
torch.set_num_threads(2)
model = MobileNetV2(5).train()
x = torch.randn(images, 3, size, size).contiguous(memory_format=torch.channels_last)
step(torch.randn(2, 3, 64, 64))
release_training_memory()
before = status("VmRSS:")
step(x)
step(x)
nodes = [[layer.spec for layer in block.train_chain().layers] for block in model.features]
print(status("VmHWM:") - before, kept_bytes(nodes, images, size, torch.bfloat16 if bf16 else torch.float32))
"""
    measured, told = map(int, run_python(code, str(images), str(size), str(dtype)).stdout.split())
    assert told == pytest.approx(measured, rel=0.25)
    assert told < measured


@pytest.mark.usefixtures("expansions")
def test_one_value_a_channel_is_torchs_error() -> None:
    """torch's norm has counted the batch by then, and so has ours."""
    block, x = spread(InvertedResidual(8, 8, 1, 2)), torch.randn(1, 8, 1, 1)
    other = copy.deepcopy(block)
    with pytest.raises(ValueError, match="more than 1 value per channel") as ours:
        fast(block, x)
    with pytest.raises(ValueError, match="more than 1 value per channel") as torchs:
        plain(other, x)
    assert str(ours.value) == str(torchs.value)
    counts = [[int(norm.num_batches_tracked) for norm in norms(of)] for of in (block, other)]
    assert counts[0] == counts[1] == [1, 0, 0]


@pytest.mark.usefixtures("expansions")
def test_double_backward_is_declined() -> None:
    block = spread(InvertedResidual(8, 8, 1, 2))
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(fast(block, x).sum(), x, create_graph=True)


@pytest.mark.usefixtures("expansions")
def test_weights_changed_before_backward_are_noticed() -> None:
    block = spread(InvertedResidual(8, 8, 1, 2))
    y = fast(block, torch.randn(2, 8, 5, 5))
    with torch.no_grad():
        block.conv[0][0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
