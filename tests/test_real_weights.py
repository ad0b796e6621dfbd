"""The real weights on the real photos: the answers users get, judged by float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mnv2_fast
from mnv2_fast import MobileNetV2, data
from mnv2_fast.backends import cpu
from mnv2_fast.weights import Preprocessing, load_state_dict


@dataclass
class Judged:
    """Logits of every photo: in float64, and the inputs they belong to."""

    images: Tensor
    exact: Tensor
    model: MobileNetV2


@pytest.fixture(scope="module")
def judged(weights_v1: Path, photos: list[Path]) -> Judged:
    preprocessing = Preprocessing()
    crops = [torch.tensor(data.resize_and_crop(data.read_image(p), preprocessing)) for p in photos]
    images = data.normalize(torch.stack(crops), preprocessing)
    model = MobileNetV2().eval()
    model.load_state_dict(load_state_dict(weights_v1)[0])
    twin = MobileNetV2(backend="eager").eval()
    twin.load_state_dict(model.state_dict())
    twin.double()
    with torch.no_grad():
        exact = torch.cat([twin(batch.double()) for batch in images.split(20)])
    return Judged(images, exact, model)


def error(logits: Tensor, judged: Judged) -> float:
    return (logits.double() - judged.exact).abs().max().item()


def test_error_is_at_most_twice_torchs_and_no_answer_changes(judged: Judged) -> None:
    torchs = 0.0
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            plain = MobileNetV2(backend="eager").eval()
            plain.load_state_dict(judged.model.state_dict())
            plain.to(memory_format=memory_format)
            batches = [x.contiguous(memory_format=memory_format) for x in judged.images.split(20)]
            torchs = max(torchs, error(torch.cat([plain(x) for x in batches]), judged))
        answers = {
            "engine": mnv2_fast.compile(judged.model)(judged.images),
            "model": judged.model(judged.images),
        }
    for name, logits in answers.items():
        ours = error(logits, judged)
        print(f"largest error of a logit on {len(logits)} photos: {name} {ours:.2e}, torch {torchs:.2e}")
        assert ours <= 2 * torchs, name
        assert torch.equal(logits.argmax(1), judged.exact.argmax(1)), name


def test_bf16_keeps_the_answers(judged: Judged) -> None:
    classes = judged.exact.argmax(1)
    engine = mnv2_fast.compile(judged.model, dtype="bf16")
    networks = {"engine": engine}
    for arithmetic in ("bf16", "bf16_weights"):
        network = cpu.Network(engine.layers, engine._tensors, dtype="bf16", arithmetic=arithmetic)
        networks[arithmetic] = network.run
    for name, network in networks.items():
        logits = torch.cat([network(x) for x in judged.images.split(50)])
        agreement = (logits.argmax(1) == classes).float().mean().item()
        print(f"bf16 {name}: agreement {agreement:.1%}, largest error of a logit {error(logits, judged):.2f}")
        assert agreement >= 0.99, name


def test_top1_on_the_photos(judged: Judged, photos: list[Path], wnids: list[str]) -> None:
    target = torch.tensor([wnids.index(path.name.split("_")[0]) for path in photos])
    top1 = (mnv2_fast.compile(judged.model)(judged.images).argmax(1) == target).float().mean().item()
    print(f"top-1 on {len(photos)} photos: {100 * top1:.1f}%")
    assert top1 >= 0.80  # 84.0% on 1,000 photos of which these are a part


@pytest.mark.parametrize("threads", [1, 2])
def test_batch_and_threads_do_not_change_an_answer(judged: Judged, threads: int) -> None:
    engine = mnv2_fast.compile(judged.model, threads=threads)
    together = engine(judged.images[:17])
    assert torch.equal(together, torch.cat([engine(x[None]) for x in judged.images[:17]]))


def test_int8_keeps_the_answers(judged: Judged, tmp_path: Path) -> None:
    classes = judged.exact.argmax(1)
    agreements = []
    for half in (0, 1):
        engine = mnv2_fast.compile(judged.model, dtype="int8", calibration=judged.images[half::2])
        engine.save(tmp_path / "m.safetensors")
        logits = engine(judged.images[1 - half :: 2])
        assert torch.equal(mnv2_fast.load(tmp_path / "m.safetensors")(judged.images[1 - half :: 2]), logits)
        agreements.append((logits.argmax(1) == classes[1 - half :: 2]).float().mean().item())
    megabytes = (tmp_path / "m.safetensors").stat().st_size / 1e6
    print(f"int8: agreement {agreements[0]:.1%} and {agreements[1]:.1%}, {megabytes:.1f} MB")
    assert sum(agreements) / 2 >= 0.97
    assert megabytes < 4
