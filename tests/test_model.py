"""MobileNetV2 against torchvision's: structure, weights, answers, errors; other models taken over."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrate, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn.utils import prune

import mnv2_fast
from mnv2_fast import MobileNetV2, accelerate, arch, mobilenet_v2
from mnv2_fast._torchvision import torchvision

pytestmark = pytest.mark.usefixtures("native", "one_thread")

WIDTHS = [0.35, 0.5, 0.75, 1.0, 1.4]
SIZES = [
    (96, 96),
    (128, 128),
    (160, 160),
    (192, 192),
    (224, 224),
    (256, 256),
    (320, 320),
    (224, 160),
    (97, 131),
]


@pytest.fixture(scope="module")
def tv() -> Any:
    """torchvision.models."""
    if not mnv2_fast._torchvision.installed():
        pytest.skip("torchvision is not installed: pip install torchvision")
    return torchvision().models


@torch.no_grad()
def check_against_float64(model: MobileNetV2, reference: nn.Module, x: Tensor) -> None:
    """The largest error of a batch is at most twice torch's own, in the worse of its layouts."""
    assert model.why_not(x) is None
    y = model(x).double()
    layouts = (torch.contiguous_format, torch.channels_last)
    torch_y = [reference(x.contiguous(memory_format=layout)).double() for layout in layouts]
    expected = reference.double()(x.double())
    reference.float()
    worst = max(float((t - expected).abs().max()) for t in torch_y)
    assert float((y - expected).abs().max()) <= 2 * worst + 1e-7


def test_signature(tv: Any) -> None:
    ours = inspect.signature(MobileNetV2.__init__).parameters
    theirs = inspect.signature(tv.MobileNetV2.__init__).parameters
    assert list(ours) == [*theirs, "backend"]
    assert all(ours[name].default == theirs[name].default for name in theirs)
    assert ours["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("width", WIDTHS)
def test_state_dict_round_trip(tv: Any, width: float) -> None:
    torch.manual_seed(1)
    theirs = tv.mobilenet_v2(width_mult=width)
    torch.manual_seed(1)
    ours = MobileNetV2(width_mult=width)
    assert len(ours.state_dict()) == 314
    for (key, a), (other, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b), f"{key}: another initialization"
    calibrate(theirs)
    assert str(ours.load_state_dict(theirs.state_dict(), strict=True)) == "<All keys matched successfully>"
    theirs.load_state_dict(ours.state_dict(), strict=True)
    check_against_float64(ours.eval(), theirs, torch.randn(4, 3, 96, 96))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_sizes(tv: Any, size: tuple[int, int]) -> None:
    theirs = calibrate(tv.mobilenet_v2(width_mult=0.35, num_classes=11))
    ours = MobileNetV2(width_mult=0.35, num_classes=11).eval()
    ours.load_state_dict(theirs.state_dict())
    check_against_float64(ours, theirs, torch.randn(4, 3, *size))


def test_odd_inputs(tv: Any) -> None:
    theirs = calibrate(tv.mobilenet_v2(width_mult=0.5))
    ours = accelerate(theirs)
    wide = torch.randn(3, 6, 70, 140)
    for x in (
        wide[:, ::2, 3:60, 1::2],
        wide[:, :3].transpose(2, 3),
        wide[:1, :3].expand(4, 3, 70, 140),
        wide[:, :3, :1, :1],
        wide[:, :3, :33, :1],
        wide[0, 0].as_strided((2, 3, 8, 8), (0, 1, 5, 2)),
    ):
        assert ours.why_not(x) is None
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
    assert ours(wide[:0, :3]).shape == (0, 1000)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf(tv: Any, value: float) -> None:
    theirs = calibrate(tv.mobilenet_v2(width_mult=0.35))
    x = torch.randn(2, 3, 64, 64)
    x[0, 1, 20, 20] = value
    y, expected = accelerate(theirs)(x), theirs(x)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y[1], expected[1], rtol=1e-3, atol=1e-3)


def test_layers_are_arch_s() -> None:
    for width in WIDTHS:
        model = MobileNetV2(num_classes=10, width_mult=width).eval()
        assert tuple(model.read().chain.specs) == arch.network(10, width)


def test_other_settings() -> None:
    setting = [[1, 9, 1, 1], [3, 13, 2, 2], [6, 13, 1, 1]]
    model = calibrate(MobileNetV2(4, 0.9, setting, round_nearest=1, dropout=0.5))
    twin = MobileNetV2(4, 0.9, setting, round_nearest=1, backend="eager").eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 31, 33)
    assert model.why_not(x) is None
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", [[], [[1, 2, 3]]])
def test_wrong_setting(tv: Any, setting: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="non-empty or a 4-element list") as theirs:
        tv.MobileNetV2(inverted_residual_setting=setting)
    with pytest.raises(ValueError, match="non-empty or a 4-element list") as ours:
        MobileNetV2(inverted_residual_setting=setting)
    assert str(ours.value) == str(theirs.value)


BAD: dict[str, tuple[Any, str]] = {
    "rank 3": (torch.zeros(3, 8, 8), r"x\[None\]"),
    "rank 2": (torch.zeros(8, 8), "4D"),
    "channels": (torch.zeros(1, 4, 8, 8), "3 channels"),
    "channels last": (torch.zeros(1, 8, 8, 3), "3 channels"),
    "no height": (torch.zeros(1, 3, 0, 8), "at least 1"),
    "no width": (torch.zeros(1, 3, 8, 0), "at least 1"),
    "float64": (torch.zeros(1, 3, 8, 8).double(), "torch.float64"),
    "float16": (torch.zeros(1, 3, 8, 8).half(), "torch.float16"),
    "uint8": (torch.zeros(1, 3, 8, 8).byte(), "uint8"),
    "device": (torch.zeros(1, 3, 8, 8, device="meta"), "meta"),
    "sparse": (torch.ones(1, 3, 8, 8).to_sparse(), "to_dense"),
    "mkldnn": (torch.zeros(1, 3, 8, 8).to_mkldnn(), "to_dense"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("training", [False, True])
def test_bad_input(tv: Any, name: str, training: bool) -> None:
    """One line, of a class that catches what torchvision raises."""
    x, message = BAD[name]
    ours, theirs = (
        MobileNetV2(width_mult=0.35).train(training),
        tv.mobilenet_v2(width_mult=0.35).train(training),
    )
    with pytest.raises(ValueError, match=message) as found:
        ours(x)
    assert "\n" not in str(found.value)
    assert isinstance(found.value, RuntimeError)
    with pytest.raises((RuntimeError, ValueError)):
        theirs(x)


def test_no_tensor() -> None:
    with pytest.raises(TypeError, match="a list") as found:
        MobileNetV2(width_mult=0.35).eval()([1, 2])
    assert "\n" not in str(found.value)


def test_pretrained(weights_v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV2_WEIGHTS", str(weights_v1.parent))
    model = mobilenet_v2(pretrained=True).eval()
    assert model.labels is not None
    assert model.labels[285] == "Egyptian cat"
    assert model.preprocessing.resize == 256
    for same in (mobilenet_v2(weights="IMAGENET1K_V1"), mobilenet_v2(True), mobilenet_v2(str(weights_v1))):
        assert torch.equal(same.classifier[1].weight, model.classifier[1].weight)
    assert mobilenet_v2().classifier[1].out_features == 1000


def test_pretrained_with_other_classes(weights_v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused as by torchvision; the head is for the caller to replace."""
    monkeypatch.setenv("MNV2_WEIGHTS", str(weights_v1.parent))
    with pytest.raises(
        ValueError, match=r"1000 classes, 5 are wanted.*= nn\.Linear\(model\.last_channel, 5\)"
    ):
        mobilenet_v2(pretrained=True, num_classes=5)
    model = mobilenet_v2(pretrained=True, num_classes=1000, dropout=0.4)
    assert model.classifier[0].p == 0.4
    assert model.labels is not None
    model.classifier[1] = nn.Linear(model.last_channel, 5)
    assert model.labels is None
    with pytest.raises(ValueError, match="does not fit"):
        mobilenet_v2(pretrained=True, width_mult=0.5)


def test_engine_is_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "engine.safetensors"
    mnv2_fast.compile(MobileNetV2(width_mult=0.35).eval()).save(path)
    with pytest.raises(ValueError, match=r"is an engine.*use mnv2_fast\.load\("):
        mobilenet_v2(weights=str(path))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_classes() -> None:
    model = MobileNetV2(num_classes=0, width_mult=0.35).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 0)
    with pytest.raises(ValueError, match="with classes"):
        mnv2_fast.compile(model)


class Doubled(MobileNetV2):
    """A subclass that does more than its parts."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_classes]."""
        return 2 * super().forward(x)


def _set(name: str) -> Any:
    def change(model: nn.Module) -> None:
        setattr(model, name, lambda x: x)

    return change


def _hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda *_: None)


def _subclass(model: nn.Module) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * base.forward(self, x)

    base = type(model)
    model.__class__ = type("MobileNetV2", (base,), {"forward": forward})


ROOT_CHANGES = [
    (_hook, "a hook: remove it"),
    (_set("forward"), "a forward of its own"),
    (_set("_forward_impl"), "a _forward_impl of its own"),
    (_subclass, "a forward of its own"),
]


@pytest.mark.parametrize(("change", "message"), ROOT_CHANGES)
def test_changes_of_the_model_itself_are_not_dropped(tv: Any, change: Any, message: str) -> None:
    for make, freeze in (
        (tv.MobileNetV2, accelerate),
        (MobileNetV2, accelerate),
        (MobileNetV2, mnv2_fast.compile),
    ):
        model = make(width_mult=0.35).eval()
        change(model)
        with pytest.raises(ValueError, match=message) as found:
            freeze(model)
        assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="Doubled has a forward of its own"):
        mnv2_fast.compile(Doubled(width_mult=0.35).eval())


def test_real_weights_and_photos(tv: Any, weights_v1: Path, photos: list[Path]) -> None:
    """The same class on real photos, and errors like torch's own."""
    from PIL import Image

    ours = mobilenet_v2(str(weights_v1)).eval()
    theirs = tv.mobilenet_v2().eval()
    theirs.load_state_dict(ours.state_dict())
    preset = tv.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    x = torch.stack([preset(Image.open(path).convert("RGB")) for path in photos[::20]])
    check_against_float64(ours, theirs, x)
    assert torch.equal(ours(x).argmax(1), theirs(x).argmax(1))


def test_accelerate_shares_and_leaves_alone(tv: Any) -> None:
    theirs = calibrate(tv.mobilenet_v2(width_mult=0.75, num_classes=6, dropout=0.3))
    children = [type(module) for module in theirs.modules()]
    state = torch.get_rng_state()
    ours = accelerate(theirs)
    assert torch.equal(state, torch.get_rng_state())
    assert [type(module) for module in theirs.modules()] == children
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert a is b, name
    assert all(a is b for a, b in zip(theirs.buffers(), ours.buffers(), strict=True))
    x = torch.randn(2, 3, 64, 64)
    assert ours.why_not(x) is None
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
    assert ours.classifier[0].p == 0.3
    with torch.no_grad():
        theirs.features[0][0].weight.mul_(1.5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
    ours.train()
    assert not theirs.training
    torch.manual_seed(2)
    a = ours(x)
    torch.manual_seed(2)
    torch.testing.assert_close(a, theirs.train()(x), rtol=1e-3, atol=1e-3)


def test_accelerate_keeps_modes_and_classifiers(tv: Any) -> None:
    theirs = tv.mobilenet_v2(width_mult=0.35)
    theirs.classifier = nn.Sequential(nn.Linear(1280, 4), nn.Tanh())
    theirs.features[3].eval()
    ours = accelerate(theirs)
    assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]
    assert str(ours.classifier) == str(theirs.classifier)
    assert accelerate(ours.eval()).classifier[0].weight is theirs.classifier[0].weight


def _silu(model: nn.Module) -> None:
    model.features[4].conv[0][2] = nn.SiLU()


def _grouped(model: nn.Module) -> None:
    model.features[5].conv[0][0] = nn.Conv2d(16, 96, 1, groups=2, bias=False)


def _hooked(model: nn.Module) -> None:
    model.features[6].conv[1][0].register_forward_hook(lambda *_: None)


def _pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model.features[6].conv[1][0], "weight", 0.5)


def _parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.features[18][0])


def _added(model: nn.Module) -> None:
    model.features[2].use_res_connect = True


def _replaced(model: nn.Module) -> None:
    model.features[7] = nn.Identity()


VARIANTS = [
    (_silu, r"features\.4\.conv\.0\.2 is a SiLU"),
    (_grouped, r"features\.5\.conv\.0\.0 is Conv2d"),
    (_hooked, r"features\.6\.conv\.1\.0 has a hook"),
    (_pruned, r"features\.6\.conv\.1\.0"),
    (_parametrized, r"features\.18\.0"),
    (_added, r"features\.2 adds its input"),
    (_replaced, r"features\.7 is a Identity"),
]


@pytest.mark.parametrize(("change", "message"), VARIANTS, ids=lambda v: getattr(v, "__name__", None))
def test_accelerate_refuses_variants(tv: Any, change: Any, message: str) -> None:
    model = tv.mobilenet_v2(width_mult=0.5)
    change(model)
    with pytest.raises(ValueError, match=message):
        accelerate(model)


def test_accelerate_refuses_other_models(tv: Any) -> None:
    with pytest.raises(ValueError, match="ResNet"):
        accelerate(tv.resnet18())
    with pytest.raises(TypeError, match="str"):
        accelerate("mobilenet_v2")


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's batch norm, which has the activation inside."""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        return self.act(self.drop(super().forward(x)))


class DepthwiseSeparableConv(nn.Module):
    """timm's first block."""

    has_skip = False

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(cin, cin, 3, 1, 1, groups=cin, bias=False)
        self.bn1, self.se = BatchNormAct2d(cin), nn.Identity()
        self.conv_pw = nn.Conv2d(cin, cout, 1, bias=False)
        self.bn2, self.drop_path = BatchNormAct2d(cout, act=False), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[N, cin, H, W] -> [N, cout, H, W]."""
        return self.bn2(self.conv_pw(self.bn1(self.conv_dw(x))))


class InvertedResidual(nn.Module):
    """timm's block."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        self.has_skip = stride == 1 and cin == cout
        self.conv_pw = nn.Conv2d(cin, hidden, 1, bias=False)
        self.bn1 = BatchNormAct2d(hidden)
        self.conv_dw = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2, self.se = BatchNormAct2d(hidden), nn.Identity()
        self.conv_pwl = nn.Conv2d(hidden, cout, 1, bias=False)
        self.bn3, self.drop_path = BatchNormAct2d(cout, act=False), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[N, cin, H, W] -> [N, cout, Ho, Wo]."""
        y = self.bn3(self.conv_pwl(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))))
        return x + y if self.has_skip else y


class EfficientNet(nn.Module):
    """timm's mobilenetv2_100 in structure and names, at full depth and half width."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False), BatchNormAct2d(16)
        stages: list[nn.Module] = [nn.Sequential(DepthwiseSeparableConv(16, 8))]
        channels = 8
        for expand, cout, repeats, stride in ((6, 16, 2, 2), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1)):
            blocks = []
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, cout, stride if i == 0 else 1, expand))
                channels = cout
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = nn.Conv2d(channels, 160, 1, bias=False), BatchNormAct2d(160)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.drop_rate = 0.25
        self.classifier = nn.Linear(160, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, classes]."""
        x = self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(x)))))
        x = self.global_pool(x).flatten(1)
        return self.classifier(nn.functional.dropout(x, self.drop_rate, self.training))


def test_accelerate_timm() -> None:
    theirs = calibrate(EfficientNet(9))
    ours = accelerate(theirs)
    x = torch.randn(2, 3, 64, 64)
    assert ours.why_not(x) is None
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in theirs.parameters()}
    assert next(iter(ours.state_dict())) == "features.0.0.weight"
    assert ours.classifier[0].p == 0.25
    theirs.blocks[2][1].se = nn.Sigmoid()
    with pytest.raises(ValueError, match=r"blocks\.2\.1\.se is a Sigmoid"):
        accelerate(theirs)
