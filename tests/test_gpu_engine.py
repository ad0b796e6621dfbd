"""Engines on a GPU, as far as they go without one: graphs by a stand-in, devices, dtypes, refusals."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_stand_in import Captured, StandIn
from helpers import SMALL, calibrate
from torch import Tensor

import mnv2_fast
from mnv2_fast import Engine, MobileNetV2, UserError, engine, images, machine
from mnv2_fast.backends import eager, replay
from mnv2_fast.backends import triton as backend
from mnv2_fast.eager_network import EagerNetwork
from mnv2_fast.nn import eager_only
from mnv2_fast.weights import Preprocessing

GPU = torch.device("cuda", 0)


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


def test_bytes_are_the_numbers_that_the_table_has() -> None:
    seen = Preprocessing()
    scale, shift = engine.byte_norm(seen)
    values = torch.arange(256, dtype=torch.float32)
    found = values * scale[:, None] + shift[:, None]
    torch.testing.assert_close(found, engine.byte_table(seen), rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", ["int8", "fp64"])
def test_a_gpus_dtypes_are_listed(dtype: str) -> None:
    with pytest.raises(
        UserError, match=f"dtype='{dtype}' is not offered on a GPU: use one of fp32, tf32, fp16, bf16"
    ):
        engine.check_dtype(dtype, GPU)
    assert [engine.check_dtype(known, GPU) for known in backend.DTYPES] == ["fp32", "tf32", "fp16", "bf16"]


@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
def test_a_cpu_has_no_arithmetic_for_some(dtype: str) -> None:
    with pytest.raises(
        UserError, match=f"dtype='{dtype}' has no arithmetic on a CPU: use one of fp32, bf16, int8, or"
    ):
        mnv2_fast.compile(MobileNetV2(**SMALL), dtype=dtype)


def test_images_of_another_device_are_refused() -> None:
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"takes dense tensors on cuda:0, got .* on cpu: use x.to\('cuda:0'\)"
    ):
        images.check_images(x, GPU)
    with pytest.raises(ValueError, match=r"takes dense CPU tensors, got .* on meta: use x.cpu\(\)"):
        images.check_images(x.to("meta"))


def test_a_model_in_two_places_is_refused() -> None:
    model = MobileNetV2(**SMALL)
    model.classifier.to("meta")
    with pytest.raises(UserError, match=r"a model on cpu and meta: move it with model.to\('cpu'\)"):
        mnv2_fast.compile(model)
    with pytest.raises(UserError, match=r"a model on meta: move it with model.cpu\(\)"):
        mnv2_fast.compile(MobileNetV2(**SMALL).to("meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_file_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    mnv2_fast.compile(MobileNetV2(**SMALL).eval()).save(tmp_path / "e.safetensors")
    for device, said in (
        ("cuda", "no such device here"),
        ("cuda:1", "no such device here"),
        ("gpu", "is none"),
    ):
        with pytest.raises(UserError, match=said):
            mnv2_fast.load(tmp_path / "e.safetensors", device=device)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plain_torch_serves_in_the_engines_type(kind: torch.dtype) -> None:
    """As on a GPU whose kernels are off; float32 logits."""
    torch.manual_seed(0)
    fp32 = mnv2_fast.compile(calibrate(MobileNetV2(**SMALL)))
    table = engine.byte_table(fp32.preprocessing)
    network = EagerNetwork(fp32.layers, fp32.tensors, table, engine.CPU, kind)
    x = torch.randn(2, 3, 64, 64)
    got, want = network.run(x), fp32(x)
    assert got.dtype == torch.float32
    tolerance = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}[kind]
    assert (got - want).abs().max() <= tolerance * want.abs().max()


PROVEN = frozenset({"network", *backend.OPERATORS})


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, StandIn]:
    """An engine on the CPU, whose layers may then be another's on a GPU that the CPU stands in for."""
    source = mnv2_fast.compile(calibrate(MobileNetV2(**SMALL)))
    gpu, network = StandIn(monkeypatch), backend.Network

    def on_cpu(*args: Any, **of: Any) -> backend.Network:
        return network(*args, **{**of, "device": engine.CPU})

    monkeypatch.setattr(backend, "Network", on_cpu)
    monkeypatch.setenv("MNV2_BACKEND", "auto")
    return source, gpu


def test_an_operator_that_is_off_runs_in_torch_and_the_engine_says_so(
    frozen: tuple[Engine, StandIn], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want, gpu = frozen
    monkeypatch.setattr(backend, "PROVEN", PROVEN - {"stem"})
    with caplog.at_level("DEBUG", "mnv2_fast"):
        found = Engine(want.layers, want.tensors, device=GPU)
    assert found.backend == "triton"
    assert list(found.in_torch) == ["stem"]
    assert repr(found) == "Engine(7 classes, fp32, triton cuda:0 with stem in torch, threads=auto)"
    assert "engine partly in plain torch: the stem kernel has not run on a GPU yet" in caplog.text
    for x in (torch.randn(3, 3, 40, 33), torch.randint(0, 256, (2, 40, 33, 3), dtype=torch.uint8)):
        torch.testing.assert_close(found.network.run(x), want(x), rtol=1e-4, atol=1e-4)
    assert set(gpu.launches) == {"depthwise", "pointwise", "head"}
    assert gpu.captured.sizes == [4, 2]
    with torch.autocast("cpu", torch.bfloat16):  # engines are of their own dtype
        x = torch.randn(1, 3, 40, 33)
        torch.testing.assert_close(found.network.run(x), want(x), rtol=1e-4, atol=1e-4)


def test_strict_engines_are_whole(frozen: tuple[Engine, StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    want, _ = frozen
    *rest, last, linear = want.layers
    linear_mean = [*rest, dataclasses.replace(last, relu6=False), linear]
    monkeypatch.setenv("MNV2_STRICT", "1")
    for proven, layers, why in (
        (PROVEN - {"stem"}, want.layers, "partly in plain torch: the stem kernel has not run on a GPU yet"),
        (frozenset(), want.layers, "in plain torch: the network kernel has not run on a GPU yet"),
        (PROVEN, linear_mean, "in plain torch: a head's mean is of a pointwise layer with ReLU6"),
    ):
        monkeypatch.setattr(backend, "PROVEN", proven)
        with pytest.raises(UserError, match=f"MNV2_STRICT=1, and the engine would run {why}"):
            Engine(layers, want.tensors, device=GPU)
    monkeypatch.setattr(backend, "PROVEN", PROVEN)
    whole = Engine(want.layers, want.tensors, device=GPU)
    assert not whole.in_torch
    assert repr(whole).endswith("triton cuda:0, threads=auto)")


@pytest.mark.parametrize(("tf32", "wanted"), [(True, "tf32"), (False, "ieee")])
def test_torchs_switches_are_as_they_were(tf32: bool, wanted: str) -> None:
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]

    def fails() -> None:
        with eager.float32_products(tf32):
            assert [switch.fp32_precision for switch in switches] == [wanted, wanted]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [switch.fp32_precision for switch in switches] == before


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "unavailable_reason", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    why = backend._device_reason.__wrapped__(GPU)
    assert why == "the triton backend needs sm_80 or newer, cuda:0 is sm_75"
    monkeypatch.setattr(backend, "_device_reason", lambda device: why)
    assert backend.network_declines(GPU, "triton") == why
    assert engine._why_eager("triton", GPU, ()) == why


@pytest.mark.parametrize(("asked", "why"), [("cpu", "the backend asked for is cpu"), ("eager", "is eager")])
def test_a_backend_that_is_no_gpus(asked: str, why: str) -> None:
    assert why in engine._why_eager(asked, GPU, ())


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("gpu", "'gpu' is none: use cpu, or cuda"),
        ("meta", "no such device here"),
        ("cuda:2", "there are 2 here"),
    ],
)
def test_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch, asked: str, why: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=why):
        machine.device(asked)
    assert machine.device("cuda") == machine.device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert machine.device("cpu:0") == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("dtype", backend.DTYPES)
def test_on_a_gpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    torch.manual_seed(0)
    model = calibrate(MobileNetV2(num_classes=7))
    want = mnv2_fast.compile(model)
    found = mnv2_fast.compile(model.cuda(), dtype=dtype)
    assert isinstance(found, Engine)
    assert found.backend == "triton"
    tolerance = {"fp32": 1e-4, "tf32": 0.01, "fp16": 0.02, "bf16": 0.1}[dtype]
    for x in (torch.randn(3, 3, 224, 224), torch.randint(0, 256, (2, 96, 128, 3), dtype=torch.uint8)):
        monkeypatch.setenv("MNV2_BACKEND", "auto")
        right = want(x)
        monkeypatch.setenv("MNV2_BACKEND", "triton")
        assert (found(x.cuda()).cpu() - right).abs().max() <= tolerance * right.abs().max()
    found.save(tmp_path / "e.safetensors")
    again = mnv2_fast.load(tmp_path / "e.safetensors", device="cuda")
    x = torch.randn(1, 3, 224, 224, device="cuda")
    assert torch.equal(again(x), found(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("cast", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_modules_on_a_gpu(
    held: torch.dtype, cast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Served as torch would answer, never stale, with torch's gradients."""
    monkeypatch.setenv("MNV2_BACKEND", "triton")
    model = calibrate(MobileNetV2(num_classes=7))
    exact = copy.deepcopy(model).double().cuda()
    model.to("cuda", held)
    x = torch.randn(3, 3, 224, 224, device="cuda", dtype=held)
    for change in (lambda: None, lambda: model.classifier[1].weight.mul_(2)):
        with torch.no_grad():
            change()
            exact.load_state_dict(model.state_dict())
        for photos in (x, x.contiguous(memory_format=torch.channels_last), x[:0]):
            with torch.autocast("cuda", cast, enabled=cast is not None):
                assert model.why_not(photos) is None, model.why_not(photos)
                ours = model(photos)
                with eager_only():
                    torchs = model(photos)
            right = exact._forward_impl(photos.double())
            assert ours.dtype == torchs.dtype
            assert (ours - right).norm() <= 2 * (torchs - right).norm() + 1e-5 * right.norm()
    ours.sum().backward()
    block, features = model.features[3], torch.randn(2, 24, 56, 56, device="cuda", dtype=held)
    with torch.no_grad():
        assert block.why_not(features) is None
        torch.testing.assert_close(block(features), block._run_eager(features), rtol=0.05, atol=0.05)
