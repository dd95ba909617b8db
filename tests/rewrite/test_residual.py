"""When a residual add is removed, and when it has to stay: one block for each condition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify as bd
from bidensify.rewrite import Plan


def conv(channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(8), nn.Conv2d(8, 8, 3, padding=1)


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.first(x))


class Weighted(Block):
    """The shortcut's share is not 1: torch.add with alpha."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.last(self.first(x)), alpha=0.5)


class Hourglass(Block):
    """Back at the shortcut's size, but through half of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(8, stride=2), nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.first(x))


class ReadTwice(Block):
    """What runs between the two layers is read by another layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        middle = self.first(x)
        return torch.cat([x + self.last(middle), self.side(middle)], 1)


class Scales(Block):
    """A sum of two resolutions: two signals, no residual."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.small = nn.Conv2d(8, 8, 1), conv(8, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        up = F.interpolate(self.first(self.small(x)), scale_factor=2.0)
        return self.other(x) + self.last(up)


class Net(nn.Module):
    def __init__(self, block: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3, padding=1), block, nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).relu())


def planned(block: nn.Module, channels: int = 8) -> tuple[Plan, bool, bool]:
    """The plan, whether the block's add is removed, whether its last layer has a bypass."""
    plan = bd.plan(Net(block, channels), example_inputs=torch.zeros(2, 3, 16, 16))
    removed = any("the residual add" in note for edited in plan.blocks for note in edited.notes)
    return plan, removed, next(layer.bypass for layer in plan.layers if layer.path == "block.last")


def test_the_plain_add_is_removed() -> None:
    _, removed, bypass = planned(Plain())
    assert removed
    assert bypass


@pytest.mark.parametrize(
    ("block", "channels"), [(Weighted, 8), (Hourglass, 8), (ReadTwice, 16)], ids=["weighted", "hourglass", "read twice"]
)
def test_the_add_stays_and_the_last_layer_drops_its_bypass(block: type[nn.Module], channels: int) -> None:
    _, removed, bypass = planned(block(), channels)
    assert not removed
    assert not bypass


def test_a_sum_of_resolutions_is_no_residual() -> None:
    plan, removed, bypass = planned(Scales())
    assert not removed
    assert bypass
    assert next(layer.bypass for layer in plan.layers if layer.path == "block.other")
