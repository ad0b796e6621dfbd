"""Engines under many Python threads, with more threads than cores, and with less memory than a call needs."""

from __future__ import annotations

import random
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mnv2_fast
from mnv2_fast import Engine, MobileNetV2, UserError, machine

# (N, H, W): below, at and above the number of threads; more sizes than plans are kept.
SHAPES = [(n, h, w) for n in (1, 2, 5) for h, w in ((32, 32), (33, 47), (64, 40), (96, 96))]

WIDE = 224, 224


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.manual_seed(1)
    return mnv2_fast.compile(MobileNetV2(num_classes=5, width_mult=0.35).eval(), threads=1)


def _inputs() -> list[Tensor]:
    floats = [torch.randn(n, 3, h, w) for n, h, w in SHAPES]
    strided = [x.contiguous(memory_format=torch.channels_last) for x in floats[::2]]
    return floats + strided + [torch.randint(0, 256, (n, h, w, 3), dtype=torch.uint8) for n, h, w in SHAPES]


def _together(count: int, work: object) -> None:
    """`work(rank)` in so many threads at once; what one of them raises is raised."""
    failed: list[BaseException] = []
    start = threading.Barrier(count)

    def run(rank: int) -> None:
        try:
            start.wait(60)
            work(rank)  # type: ignore[operator]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if failed:
        raise failed[0]


def test_eight_threads_get_the_bits_of_one(engine: Engine) -> None:
    """Every kind of input in every order, on one and on two threads of the network, all at once."""
    inputs = _inputs()
    engines = [engine, engine.with_threads(2)]
    expected = [[e(x) for x in inputs] for e in engines]

    def work(rank: int) -> None:
        order = random.Random(rank)
        for _ in range(3):
            for i in order.sample(range(len(inputs)), len(inputs)):
                e = order.randrange(2)
                assert torch.equal(engines[e](inputs[i]), expected[e][i]), (e, inputs[i].shape)

    _together(8, work)


def test_what_stays_between_calls_is_bounded(engine: Engine) -> None:
    """Sixteen workspaces at most, 256 MB together, and few plans, whatever was asked for before."""
    network = mnv2_fast.compile(MobileNetV2(num_classes=5, width_mult=0.35).eval(), threads=1)._network

    def work(rank: int) -> None:
        for size in range(8, 40):
            network.run(torch.zeros(1, 3, size + rank, size), 1)

    _together(24, work)
    plans, workspaces = network.kept()
    assert 1 <= plans <= 8
    small = engine.workspace_bytes(1, 64, 64)
    assert 0 < workspaces <= 16 * small
    large = torch.zeros(1).expand(1, 3, 5000, 5000)
    assert engine.workspace_bytes(1, 5000, 5000) > 2**28
    network.run(large, 1)
    assert network.kept()[1] <= workspaces  # too large to keep
    _together(6, lambda rank: network.run(torch.zeros(1).expand(1, 3, 2400, 2400), 1))
    assert network.kept()[1] <= 2**28


def test_engines_share_their_weights(engine: Engine) -> None:
    x = torch.randn(3, 3, 50, 40)
    both = engine.with_threads(2)
    assert (engine.threads, both.threads, both.with_threads(None).threads) == (1, 2, None)
    assert both._network is engine._network
    assert both._tensors is engine._tensors
    assert (both.labels, both.preprocessing, both.isa) == (engine.labels, engine.preprocessing, engine.isa)
    assert torch.equal(both(x), engine(x))
    with pytest.raises(UserError, match="from 1 to 1024"):
        engine.with_threads(0)


def test_fifty_engines_of_one_network_take_no_memory_of_their_own(run_python) -> None:
    """Each would be 28 MB, weights as torch has them and as the kernels read them."""
    code = (
        "import torch, mnv2_fast\n"
        "def resident():\n"
        "    with open('/proc/self/statm') as file: return int(file.read().split()[1]) * 4096\n"
        "engine = mnv2_fast.compile(mnv2_fast.MobileNetV2().eval(), threads=1)\n"
        "x = torch.zeros(1, 3, 224, 224); engine(x); before = resident()\n"
        "many = [engine.with_threads(1 + i % 2) for i in range(50)]\n"
        "for one in many: one(x)\n"
        "print(resident() - before)\n"
    )
    assert int(run_python(code).stdout) < 32e6  # the workspaces of one and of two threads


def test_more_threads_than_cores_work_and_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_warned", False)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    model, x = MobileNetV2(num_classes=5, width_mult=0.35).eval(), torch.randn(3, 3, 64, 64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        few = mnv2_fast.compile(model, threads=2)
        assert not said
        many = mnv2_fast.compile(model, threads=9)
        mnv2_fast.compile(model, threads=64)
        many.with_threads(17)
    assert [str(warning.message) for warning in said] == [
        "threads=9 is more than the 2 core(s) this process may use: threads take turns there, "
        "threads=2 is faster"
    ]
    assert said[0].filename == __file__
    torch.testing.assert_close(many(x), few(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_batch_that_does_not_fit_is_refused_before_any_work(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", backend)
    engine = mnv2_fast.compile(MobileNetV2(num_classes=5, width_mult=0.35).eval())
    assert engine.backend == backend
    images = torch.zeros(1).expand(2**26, 3, *WIDE)  # one number of memory
    for x in (images, torch.zeros(1, dtype=torch.uint8).expand(2**26, *WIDE, 3)):
        with pytest.raises(
            MemoryError, match=r"67108864 images of 224 x 224: .* GB are needed, .* GB are left: use smaller"
        ):
            engine(x)


def test_what_is_needed_is_compared_with_what_is_left(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(1).expand(1, 3, 4000, 4000)
    need = engine.workspace_bytes(1, 4000, 4000) + 4 * engine.num_classes
    assert need > 2**28  # less is not asked for
    monkeypatch.setattr(machine, "available_memory", lambda: need)
    assert engine(x).shape == (1, 5)
    monkeypatch.setattr(machine, "available_memory", lambda: need - 1)
    monkeypatch.setattr(engine._network, "_network", _NoRun(engine._network._network))
    with pytest.raises(MemoryError, match="1 images of 4000 x 4000"):
        engine(x)
    monkeypatch.setattr(machine, "available_memory", lambda: None)  # nobody knows
    with pytest.raises(AssertionError, match="ran"):
        engine(x)


class _NoRun:
    """A network that must not be run."""

    def __init__(self, network: object) -> None:
        self.workspace_bytes = network.workspace_bytes  # type: ignore[attr-defined]

    def run(self, *args: object) -> None:
        raise AssertionError("ran")


def _files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   7000 kB\n"}, 7_168_000),
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "cg/a/b/memory.max": "max\n", "cg/a/b/memory.current": "5"}, None),
        (  # the tightest of a group and those around it, whose file pages do not count
            {
                "proc/meminfo": "MemAvailable: 9000 kB\n",
                "proc/self/cgroup": "1:cpu:/x\n0::/a/b\n",
                "cg/a/b/memory.max": "900000",
                "cg/a/b/memory.current": "500000",
                "cg/a/b/memory.stat": "anon 1\ninactive_file 100000\n",
                "cg/a/memory.max": "800000",
                "cg/a/memory.current": "700000",
            },
            100_000,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/c\n",
                "cg/memory/memory.limit_in_bytes": "1000",
                "cg/memory/memory.usage_in_bytes": "1500",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/c\n",
                "cg/memory/c/memory.limit_in_bytes": "3000",
                "cg/memory/c/memory.usage_in_bytes": "1500",
                "cg/memory/c/memory.stat": "total_inactive_file 500\ninactive_file 7\n",
            },
            2000,
        ),
    ],
    ids=["machine", "nothing known", "no limit", "group", "version 1, over its limit", "version 1"],
)
def test_memory_left(
    files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _files(tmp_path, files)
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cg")
    assert machine.available_memory() == expected
