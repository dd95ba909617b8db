"""Channel-wise entropy against counts by hand, and what reaches the first binarization of a network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import bidensify as bd
from bidensify.compare.entropy import channel_entropy, first_binarization
from bidensify.errors import PlanError
from bidensify.methods import get_method
from bidensify.models.unet import unet
from bidensify.nn import BiDenseConv2d, BiDenseLinear

CONVOLUTIONAL = [name for name in bd.available_methods() if get_method(name).takes("conv2d")]


def test_entropy_by_hand() -> None:
    values = torch.tensor([[[1.0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1], [0, 1 / 3, 2 / 3, 1]]])
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert channel_entropy(values, 4).tolist() == pytest.approx([0, 1, quarter, 2])
    assert channel_entropy(torch.rand(2, 3, 100_000)).tolist() == pytest.approx([8] * 3, abs=0.01)


def test_a_binarizer_whose_threshold_does_not_fit_loses_the_channel() -> None:
    layer = BiDenseConv2d(2, 2, 1).eval()
    with torch.no_grad():
        layer.binarizer.k.zero_()
        layer.binarizer.b.copy_(torch.tensor([0.5, -9.0]).reshape(layer.binarizer.b.shape))
    images = [torch.rand(1, 2, 16, 16), torch.rand(2, 2, 8, 8)]
    found = first_binarization(nn.Sequential(layer), images)
    above = torch.cat([(image[:, 0] >= 0.5).flatten() for image in images]).double().mean()
    assert found.layer == "0"
    assert found.after[0] == pytest.approx(float(-(above * above.log2() + (1 - above) * (1 - above).log2())))
    assert found.after[1] == 0
    assert min(found.before) > 7


@pytest.mark.parametrize("method", CONVOLUTIONAL)
def test_the_layer_that_is_called_first(method: str) -> None:
    student = bd.bidensify(unet(width=8), method=method).eval()
    found = first_binarization(student, [torch.randn(2, 3, 32, 32)])
    assert found.layer == "encoder.0.0.conv1"
    assert len(found.before) == len(found.after) == 8
    assert all(0 <= value <= 1 for value in found.after)


def test_channels_last_layers_and_networks_without_any() -> None:
    found = first_binarization(nn.Sequential(BiDenseLinear(5, 3)).eval(), [torch.randn(2, 7, 5)])
    assert len(found.after) == 5
    with pytest.raises(PlanError, match="called no binary layer"):
        first_binarization(nn.Sequential(nn.Conv2d(3, 3, 1)), [torch.zeros(1, 3, 4, 4)])


def entropy_of_counts(values: np.ndarray) -> float:
    share = np.unique(values, return_counts=True)[1] / values.size
    return float(-(share * np.log2(share)).sum())


@pytest.mark.parametrize("method", ["bidense", "react", "bnn"])
def test_a_network_against_numpy_from_the_methods_equations(method: str) -> None:
    torch.manual_seed(0)
    student = bd.bidensify(unet(width=8), method=method)
    images = [torch.randn(2, 3, 32, 32) + 0.3, torch.randn(1, 3, 24, 40)]
    bd.calibrate(student, images)
    layer = student.encoder[0][0].conv1
    parameters = dict(layer.binarizer.named_parameters())
    with torch.no_grad():
        for value in parameters.values():
            value.add_(torch.randn(value.shape) * 0.3)
    inputs: list[np.ndarray] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double().numpy()))
    student.eval()
    with torch.no_grad():
        for batch in images:
            student(batch)
    handle.remove()
    found = first_binarization(student, images)
    plain = {name: value.detach().double().numpy().reshape(1, -1, 1, 1) for name, value in parameters.items()}
    for channel in range(8):
        values, bits = [], []
        for x in inputs:
            threshold = {
                "bidense": plain.get("k", 0) * x.mean((2, 3), keepdims=True) + plain.get("b", 0),
                "react": -plain.get("b", 0) * np.ones_like(x),
                "bnn": np.zeros_like(x),
            }[method]
            away = x - threshold
            values.append(x[:, channel].ravel())
            bits.append((away[:, channel] >= 0).ravel())
        joined = np.concatenate(values)
        levels = np.round((joined - joined.min()) / (joined.max() - joined.min()) * 255)
        assert found.before[channel] == pytest.approx(entropy_of_counts(levels), abs=1e-3)
        assert found.after[channel] == pytest.approx(entropy_of_counts(np.concatenate(bits)), abs=5e-3)
