"""Channel-wise entropy against counts by hand, and what reaches the first binarization of a network."""

from __future__ import annotations

import math

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
