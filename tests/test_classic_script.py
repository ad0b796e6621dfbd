"""The script that everybody has: torchvision's data, our model in place of `torchvision.models`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from mnv2_fast import _torchvision

pytestmark = pytest.mark.usefixtures("native")


def test_classic_script(flowers: Path, weights_v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _torchvision.installed():
        pytest.skip("torchvision is not installed: pip install torchvision")
    _torchvision.torchvision()
    monkeypatch.setenv("MNV2_WEIGHTS", str(weights_v1.parent))

    from torchvision import datasets, transforms

    import mnv2_fast as models

    preprocess = transforms.Compose(
        [
            transforms.Resize(112),
            transforms.CenterCrop(96),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    train = datasets.ImageFolder(flowers / "train", preprocess)
    val = datasets.ImageFolder(flowers / "val", preprocess)
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(Subset(train, shuffled[:96].tolist()), batch_size=16, shuffle=True)
    val_loader = DataLoader(Subset(val, range(0, len(val), 10)), batch_size=24)

    model = models.mobilenet_v2(pretrained=True)
    model.classifier[1] = nn.Linear(model.last_channel, len(train.classes))
    for p in model.features[:16].parameters():
        p.requires_grad = False
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    criterion = nn.CrossEntropyLoss()

    def validate(fast: bool = True) -> float:
        model.eval()
        correct = total = 0
        with torch.no_grad():
            for images, labels in val_loader:
                assert (model.why_not(images) is None) == fast
                correct += int((model(images).argmax(1) == labels).sum())
                total += len(labels)
        return correct / total

    before = validate()
    model.train()
    losses = []
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = validate()
    assert sum(losses[-2:]) < sum(losses[:2])
    assert after > max(0.4, before)

    model.backend = "eager"
    assert validate(fast=False) == pytest.approx(after, abs=0.02)
