"""CUDA graphs of a GPU's networks, as far as they go without one: a stand-in captures and replays."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from gpu_stand_in import Captured
from torch import Tensor

from mnv2_fast.backends import replay


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    return Captured(monkeypatch)


def sums(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1, keepdim=True).float()


def test_batches_share_graphs_and_answers_are_their_own(captured: Captured) -> None:
    replayed = replay.Replayed(sums)
    kept = []
    for n in (1, 3, 4, 2, 33, 40, 64):
        x = torch.randn(n, 3, 4, 5)
        y = replayed(x)
        torch.testing.assert_close(y, sums(x))
        kept.append((x, y))
    assert captured.sizes == [1, 4, 2, 64]
    for x, y in kept:  # no later call has written into them
        torch.testing.assert_close(y, sums(x))


@pytest.mark.parametrize(("n", "size"), [(1, 1), (2, 2), (3, 4), (17, 32), (33, 64), (65, 96), (1024, 1024)])
def test_the_graph_of_a_batch_has_room_for_it(n: int, size: int) -> None:
    assert replay.bucket(n) == size


def test_no_image_and_more_than_a_graph_holds(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 8)
    replayed = replay.Replayed(sums)
    assert replayed(torch.zeros(0, 3, 4, 5)).shape == (0, 1)
    x = torch.randn(19, 3, 4, 5)
    torch.testing.assert_close(replayed(x), sums(x))
    assert captured.sizes == [8, 4]


def test_layouts_types_sizes_and_streams_have_graphs_of_their_own(captured: Captured) -> None:
    replayed = replay.Replayed(sums)
    x = torch.randn(1, 3, 4, 5)
    calls = [
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.double(),
        torch.randn(1, 3, 5, 4),
        x[:, :, ::2],
    ]
    for call in calls:
        torch.testing.assert_close(replayed(call), sums(call))
    assert len(captured.sizes) == len(calls)
    captured.stream = 1
    replayed(x)
    replayed(x)
    assert len(captured.sizes) == len(calls) + 1


def test_graphs_that_were_not_used_for_longest_go(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "KEPT", 2)
    replayed = replay.Replayed(sums)
    for n in (1, 2, 1, 4, 1, 2):
        replayed(torch.randn(n, 3, 2, 2))
    assert captured.sizes == [1, 2, 4, 2]


def test_a_lack_of_memory_is_one_line_and_the_next_call_is_served(captured: Captured) -> None:
    full = [False]

    def run(x: Tensor) -> Tensor:
        if full[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return sums(x)

    replayed = replay.Replayed(run)
    x = torch.randn(2, 3, 4, 5)
    replayed(x)
    full[0] = True
    with pytest.raises(
        MemoryError, match=r"4 images of \[3, 4, 5\] need more memory than the GPU has: use smaller"
    ):
        replayed(torch.randn(4, 3, 4, 5))
    full[0] = False
    torch.testing.assert_close(replayed(x), sums(x))


def test_graphs_of_inference_mode_serve_outside_of_it(captured: Captured) -> None:
    replayed = replay.Replayed(sums)
    x = torch.randn(2, 3, 4, 5)
    with torch.inference_mode():
        replayed(x)
    torch.testing.assert_close(replayed(x), sums(x))
    with torch.inference_mode():
        torch.testing.assert_close(replayed(x + 1), sums(x + 1))
    assert captured.sizes == [2]


def test_memory_that_graphs_hold_is_given_to_a_call_that_lacks_it(captured: Captured) -> None:
    held = []

    def run(x: Tensor) -> Tensor:
        if len(held) == 1 and len(x) == 4:
            held.append(True)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        held.append(True)
        return sums(x)

    replayed = replay.Replayed(run)
    replayed(torch.randn(1, 3, 4, 5))
    del held[1:]
    x = torch.randn(4, 3, 4, 5)
    torch.testing.assert_close(replayed(x), sums(x))


class Compiled:
    """`sums`, compiled when a batch first comes, which no capture may have. `seen`: the batches it ran."""

    def __init__(self, captured: Captured) -> None:
        self.captured, self.seen = captured, list[tuple[tuple[int, ...], bool]]()

    def __call__(self, x: Tensor) -> Tensor:
        known = [shape for shape, _ in self.seen]
        assert tuple(x.shape) in known or not self.captured.capturing, "compiled within a capture"
        assert not torch.is_grad_enabled()
        self.seen.append((tuple(x.shape), x.is_contiguous()))
        return sums(x)


def test_within_a_capture_the_launches_of_a_known_batch_go_into_it(captured: Captured) -> None:
    run = Compiled(captured)
    replayed = replay.Replayed(run)
    wide = torch.randn(3, 3, 4, 10)
    replayed(wide[:, :, :, :5].contiguous())
    ran = len(run.seen)
    captured.capturing = True
    for x in (wide[:, :, :, 5:].contiguous(), wide[:1].repeat(4, 1, 1, 1)[:, :, :, :5].contiguous()):
        torch.testing.assert_close(replayed(x), sums(x))
    assert run.seen[ran:] == [((4, 3, 4, 5), True)] * 2
    assert captured.sizes == [4]


def test_within_a_capture_more_images_than_a_graph_holds(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST", 8)
    run = Compiled(captured)
    replayed = replay.Replayed(run)
    x = torch.randn(19, 3, 4, 5)
    replayed(x)
    captured.capturing = True
    torch.testing.assert_close(replayed(x), sums(x))
    assert [shape[0] for shape, _ in run.seen[-3:]] == [8, 8, 4]


def test_within_a_capture_an_unknown_batch_is_refused(captured: Captured) -> None:
    replayed = replay.Replayed(Compiled(captured))
    replayed(torch.randn(2, 3, 4, 5))
    captured.capturing = True
    with pytest.raises(RuntimeError, match=r"call once with 3 images of \[3, 4, 5\] before the capture"):
        replayed(torch.randn(3, 3, 4, 5))
    captured.capturing = False
    x = torch.randn(3, 3, 4, 5)
    torch.testing.assert_close(replayed(x), sums(x))


def test_no_replay_of_a_stream_comes_between_another_and_its_answer(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines and two batches share what activations are in; streams of their own share nothing."""

    def slow(run: replay.Run, x: Tensor, lane: replay.Lane) -> replay.Graph:
        graph = captured.capture(run, x, lane)
        again = graph.replay
        graph.replay = lambda: (
            again(),
            time.sleep(0.001),
        )  # other threads may go on before the answer is read
        return graph

    monkeypatch.setattr(replay, "capture", slow)
    both = [replay.Replayed(sums), replay.Replayed(sums)]
    wrong = []

    def work(replayed: replay.Replayed, n: int) -> None:
        x = torch.full((n, 3, 4, 5), float(n))
        for _ in range(20):
            if not torch.equal(replayed(x), sums(x)):
                wrong.append(n)

    for replayed in both:
        for n in (1, 2):
            replayed(torch.zeros(n, 3, 4, 5))
    threads = [threading.Thread(target=work, args=(replayed, n)) for replayed in both for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert replay.lane_of(0) is replay.lane_of(0)
    assert replay.lane_of(0) is not replay.lane_of(1)


class Stream:
    """Of `FakeCuda`. `waited_for`: streams whose work comes before its own."""

    cuda_stream = 7

    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class FakeCuda:
    """What `replay` asks of `torch.cuda`. As there, a capture that fails leaves its stream current."""

    OutOfMemoryError, Stream = torch.cuda.OutOfMemoryError, Stream

    def __init__(self) -> None:
        self.callers = Stream()
        self._local = threading.local()
        self.devices: list[torch.device] = []
        self.captures: list[tuple[object, Stream]] = []
        self.now = self.most = 0

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return getattr(self._local, "stream", self.callers)

    def set_stream(self, stream: Stream) -> None:
        self._local.stream = stream

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.devices.append(device)
        yield
        self.devices.pop()

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)

    def is_current_stream_capturing(self) -> bool:
        return self.devices == [torch.device("cpu")] and self.now > 0

    def graph_pool_handle(self) -> object:
        return object()

    class CUDAGraph:
        def replay(self) -> None:
            pass

    @contextlib.contextmanager
    def graph(
        self, graph: object, *, pool: object, stream: Stream, capture_error_mode: str
    ) -> Iterator[None]:
        before = self.current_stream()
        self.now += 1
        self.most = max(self.most, self.now)
        self.set_stream(stream)
        try:
            yield
        finally:
            self.now -= 1
        self.captures.append((pool, stream))
        self.set_stream(before)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    found = FakeCuda()
    monkeypatch.setattr(replay, "cuda", found)
    return found


def test_whether_a_graph_is_captured_is_asked_of_the_images_device(fake: FakeCuda) -> None:
    x = torch.zeros(1)
    assert not replay.capturing(x.device)
    fake.now = 1
    assert replay.capturing(x.device)
    assert fake.devices == []


def test_graphs_of_a_stream_share_a_pool_and_the_stream_of_their_captures(fake: FakeCuda) -> None:
    lane, other = replay.Lane(), replay.Lane()
    graphs = [replay.capture(sums, torch.zeros(n, 2), lane) for n in (1, 2, 3)]
    graphs.append(replay.capture(sums, torch.zeros(1, 2), other))
    (pool, stream), *rest = fake.captures
    assert rest[:2] == [(pool, stream)] * 2
    assert rest[2][0] is not pool
    assert rest[2][1] is not stream
    assert [graph.pool is pool for graph in graphs] == [True, True, True, False]
    del graphs[0]
    kept = replay.capture(sums, torch.zeros(4, 2), lane)
    assert kept.pool is pool
    del graphs, kept
    assert replay.capture(sums, torch.zeros(1, 2), lane).pool is not pool


@pytest.mark.parametrize("at", ["warm-up", "capture"])
def test_a_capture_that_fails_leaves_the_callers_stream_current(fake: FakeCuda, at: str) -> None:
    def run(x: Tensor) -> Tensor:
        assert fake.current_stream() is not fake.callers
        if at == ("capture" if fake.now else "warm-up"):
            raise ValueError("no")
        return sums(x)

    lane = replay.Lane()
    with pytest.raises(ValueError, match="no"):
        replay.capture(run, torch.zeros(1, 2), lane)
    assert fake.current_stream() is fake.callers
    assert fake.callers.waited_for == [lane.stream]  # whose kernels may still read the images
    assert not lane.graphs
    replay.capture(sums, torch.zeros(1, 2), lane)
    assert fake.current_stream() is fake.callers


def test_two_threads_do_not_capture_at_once(fake: FakeCuda) -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.02)
        return sums(x)

    threads = [
        threading.Thread(target=replay.capture, args=(slow, torch.zeros(1, 2), replay.Lane()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.captures) == 3
    assert fake.most == 1


def test_threads_do_not_mix_their_images(captured: Captured) -> None:
    replayed = replay.Replayed(sums)
    wrong = []

    def work(seed: int) -> None:
        x = torch.full((2, 3, 4, 5), float(seed))
        for _ in range(50):
            if not torch.equal(replayed(x), sums(x)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert captured.sizes == [2]
