"""Post-training quantization on seeded networks: near the float network, whatever channels do."""

from __future__ import annotations

import pytest
import torch
from helpers import SMALL, calibrate
from torch import Tensor, nn

from mnv2_fast import MobileNetV2, UserError, int8, quant
from mnv2_fast.engine import byte_table
from mnv2_fast.weights import Preprocessing

PREPROCESSING = Preprocessing(40, 32)


def images(n: int, size: int = 48, seed: int = 0) -> Tensor:
    """Smooth random pictures, normalized: [N, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    pixels = nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    mean, std = torch.tensor(PREPROCESSING.mean), torch.tensor(PREPROCESSING.std)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def quantized(model: MobileNetV2, x: Tensor) -> int8.QuantizedNetwork:
    chain, tensors = model.read().chain, model.read().tensors
    return quant.quantize(chain.specs, chain.fold(tensors), [x], PREPROCESSING)


def noise(model: MobileNetV2, network: int8.QuantizedNetwork, x: Tensor) -> float:
    """Size of the quantized network's error relative to the float logits."""
    with torch.no_grad():
        exact = model(x)
    error = int8.reference(network, x) - exact
    return float(error.norm() / exact.norm())


@pytest.fixture(scope="module")
def model() -> MobileNetV2:
    torch.manual_seed(0)
    return calibrate(MobileNetV2(**SMALL))


@pytest.mark.parametrize(("width", "classes"), [(0.35, 5), (1.4, 3)])
def test_any_width_and_class_count(width: float, classes: int) -> None:
    model = calibrate(MobileNetV2(classes, width))
    network = quantized(model, images(16))
    found = noise(model, network, images(16))
    print(f"width {width}: noise {found:.3f}")
    assert found < 0.25


def test_the_same_images_give_the_same_integers(model: MobileNetV2) -> None:
    first, second = (int8.state_dict(quantized(model, images(8))) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_batches_of_several_sizes(model: MobileNetV2) -> None:
    chain, tensors = model.read().chain, model.read().tensors
    batches = [images(8), images(3, 33, seed=1)]
    network = quant.quantize(chain.specs, chain.fold(tensors), batches, PREPROCESSING)
    assert noise(model, network, images(8)) < 0.25


def test_dead_and_tiny_channels_cost_nothing(model: MobileNetV2) -> None:
    """Channels that are always 0, hardly ever more, or constant leave the others as precise as before."""
    torch.manual_seed(1)
    odd = calibrate(MobileNetV2(**SMALL))
    with torch.no_grad():
        for name, module in odd.named_modules():
            if not isinstance(module, nn.BatchNorm2d):
                continue
            module.weight[0] = 0
            module.bias[0] = 0 if name.endswith((".3", ".2")) else -5  # always 0
            module.weight[1] *= 1e-6
            module.bias[1] = 1e-5  # tiny
            module.weight[2] = 0  # constant
            module.bias[2] = 0.7
    network = quantized(odd, images(16))
    plain = noise(model, quantized(model, images(16)), images(16))
    found = noise(odd, network, images(16))
    print(f"noise {found:.3f}, without odd channels {plain:.3f}")
    assert found < 0.25
    for spec, layer in zip(network.specs, network.layers, strict=True):
        assert layer.scale.max() < 1e6, spec.conv


def test_a_network_that_gives_nothing(model: MobileNetV2) -> None:
    dead = calibrate(MobileNetV2(**SMALL))
    with torch.no_grad():
        for parameter in dead.features.parameters():
            parameter.zero_()
        expected = dead(images(2))
    answer = int8.reference(quantized(dead, images(2)), images(2))
    torch.testing.assert_close(answer, expected, atol=1e-6, rtol=1e-5)


def test_bytes_of_an_image_are_the_grid_itself(model: MobileNetV2) -> None:
    network = quantized(model, images(4))
    grid = int8.byte_grid(network, byte_table(PREPROCESSING))
    assert torch.equal(grid, torch.arange(256, dtype=torch.uint8).expand(3, 256))


def test_values_beyond_bytes_widen_the_grid(model: MobileNetV2) -> None:
    x = images(4)
    x[0, 1, 5, 5], x[1, 1, 6, 6] = 9.0, -7.0
    network = quantized(model, x)
    q = int8.quantize_input(network, x).to(torch.float32)
    back = (q - network.input_zero[:, None, None]) / network.input_scale[:, None, None]
    assert (back - x).abs().amax((0, 2, 3)).tolist() < [0.01, 0.04, 0.01]


def test_mean_logits_are_the_float_networks(model: MobileNetV2) -> None:
    x = images(16)
    with torch.no_grad():
        exact = model(x)
    error = int8.reference(quantized(model, x), x) - exact
    assert (error.mean(0).abs() < 0.02 * exact.std()).all()


def test_rounding_by_moments_beats_the_nearest_number() -> None:
    basis = torch.randn(40, 8, dtype=torch.float64)
    x = torch.randn(500, 8, dtype=torch.float64) @ basis.T  # 40 inputs that go together in 8 ways
    weight = torch.randn(1, 30, 40) * 5
    rounded = quant.round_weights(weight, (x.T @ x)[None] / len(x))
    assert torch.equal(rounded, rounded.round())
    assert (rounded - weight).abs().max() < 8
    error, nearest = (((w - weight[0]).double() @ x.T).std() for w in (rounded[0], weight[0].round()))
    print(f"error {error:.3f}, of the nearest numbers {nearest:.3f}")
    assert error < 0.5 * nearest


def test_ranges_widen_where_weights_need_it() -> None:
    reach = torch.tensor([0.01, 1.0])
    alike = quant.widen(reach, torch.ones(4, 2), torch.full((2,), 0.1))
    assert alike[1] == 1
    assert alike[0] > 0.01  # its weights would all be 0 or 1 beside the other's
    apart = quant.widen(reach, torch.tensor([[100.0, 0.0], [0.0, 1.0]]), reach.square() / 10)
    torch.testing.assert_close(apart, reach)  # no row has both


def test_a_network_that_is_none_for_int8(model: MobileNetV2) -> None:
    chain, tensors = model.read().chain, model.read().tensors
    with pytest.raises(UserError, match="whole networks"):
        quant.quantize(chain.specs[:-1], chain.fold(tensors)[:-1], [images(2)], PREPROCESSING)


def test_weights_that_are_not_finite(model: MobileNetV2) -> None:
    chain, tensors = model.read().chain, model.read().tensors
    folded = chain.fold(tensors)
    folded[4][0][0] = float("nan")
    with pytest.raises(UserError, match=r"features\.2\.conv\.1\.0 gives NaN"):
        quant.quantize(chain.specs, folded, [images(2)], PREPROCESSING)


def test_progress_counts_to_the_end(model: MobileNetV2) -> None:
    chain, tensors = model.read().chain, model.read().tensors
    seen: list[tuple[int, int]] = []
    quant.quantize(
        chain.specs, chain.fold(tensors), [images(9)], PREPROCESSING, lambda *step: seen.append(step)
    )
    total = 2 + len(chain.specs)
    assert seen == [(i + 1, total) for i in range(total)]
