"""The default example: as many channels as the network's images have, whatever is registered first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.rewrite.record.inputs import candidate_inputs


class DecoderFirst(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))
        self.encoder = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_decoder_may_be_registered_before_its_encoder(channels: int) -> None:
    plan = bd.plan(DecoderFirst(channels))
    assert plan.inputs == f"2×{channels}×128×128"
    assert {layer.path for layer in plan.binary} == {"decoder.0"}


def first(model: nn.Module) -> int:
    args, kwargs = next(candidate_inputs(model))
    return int((*args, *kwargs.values())[0].shape[1])


def test_a_first_layer_of_any_width_says_it_itself() -> None:
    assert first(nn.Sequential(nn.Conv2d(12, 16, 3), nn.Conv2d(16, 2, 1))) == 12
    assert bd.plan(nn.Sequential(nn.Conv2d(12, 16, 3), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 2, 1))).inputs.startswith(
        "2×12×"
    )


def test_what_the_network_says_of_itself_comes_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))
    model.default_cfg = {"input_size": (5, 64, 64)}
    assert first(model) == 5
    model.config = SimpleNamespace(num_channels=6)
    assert first(model) == 6


def test_timms_networks_of_other_channels() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", in_chans=1, num_classes=2)
    # Its default_cfg still says 3; what does not run is not taken.
    assert bd.plan(model).inputs == "2×1×128×128"
    with torch.no_grad():
        assert bd.bidensify(model)(torch.randn(2, 1, 64, 64)).shape == (2, 2)
