"""Engines on a GPU, as far as they go without one: graphs by a stand-in, devices, dtypes, refusals."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from helpers import SMALL, calibrate
from torch import Tensor

import mnv2_fast
from mnv2_fast import Engine, MobileNetV2, UserError, engine, images
from mnv2_fast.backends import replay
from mnv2_fast.backends import triton as backend
from mnv2_fast.eager_network import EagerNetwork
from mnv2_fast.weights import Preprocessing

GPU = torch.device("cuda", 0)


class Captured:
    """A stand-in of CUDA graphs: captures are counted, and replay computes anew in the same memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.stream = 0
        monkeypatch.setattr(replay, "place", lambda x: self.stream)
        monkeypatch.setattr(replay, "capturing", lambda: False)
        monkeypatch.setattr(replay, "capture", self.capture)

    def capture(self, run: replay.Run, x: Tensor) -> replay.Graph:
        self.sizes.append(len(x))
        y = run(x)
        return replay.Graph(lambda: y.copy_(run(x)), x, y, threading.Lock())


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


def test_within_a_capture_the_launches_go_into_it(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "capturing", lambda: True)
    x = torch.randn(3, 3, 4, 5)
    torch.testing.assert_close(replay.Replayed(sums)(x), sums(x))
    assert captured.sizes == []


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
