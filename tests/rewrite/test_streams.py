"""Sums outside of residual blocks: parallel branches and exchanges between resolutions join each stream once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import BinaryLayer


def layer(channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(channels)
    )


class Parallel(nn.Module):
    """RepVGG's training form: two convolutions and a norm of one input, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.large, self.small, self.norm = layer(8), layer(8, 1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.large(x) + self.small(x) + self.norm(x)))


class Exchange(nn.Module):
    """Two resolutions that read each other ``rounds`` times, as HRNet's do."""

    def __init__(self, rounds: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.lower = layer(8, 3, 2)
        self.up = nn.ModuleList(layer(8, 1) for _ in range(rounds))
        self.down = nn.ModuleList(layer(8, 3, 2) for _ in range(rounds))
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x)
        low = self.lower(high)
        for up, down in zip(self.up, self.down):
            high, low = (
                F.relu(high + F.interpolate(up(low), scale_factor=2.0)),
                F.relu(low + down(high)),
            )
        return self.head(torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1))


def bypasses(model: nn.Module) -> dict[str, bool]:
    return {path: m.bypass is not None for path, m in model.named_modules() if isinstance(m, BinaryLayer)}


def test_parallel_branches_leave_the_signal_to_the_one_that_hands_it_on() -> None:
    student = bd.bidensify(Parallel())
    assert bypasses(student) == {"large.0": False, "small.0": False}


def test_resolutions_that_read_each_other_join_each_others_stream_once() -> None:
    student = bd.bidensify(Exchange())
    found = bypasses(student)
    # The high resolution takes the low one's stream in the first round; whatever comes later is there already.
    assert found == {
        "lower.0": True, "up.0.0": True, "up.1.0": False, "up.2.0": False,
        "down.0.0": False, "down.1.0": False, "down.2.0": False,
    }  # fmt: skip


def test_exchanges_do_not_grow_with_their_number() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)

    def growth(config: bd.BidensifyConfig) -> float:
        model = Exchange(8)
        student = bd.bidensify(model, config)
        with torch.no_grad():
            return (student.train()(x).std() / model.train()(x).std()).item()

    assert growth(bd.BidensifyConfig()) < 4
    assert growth(bd.BidensifyConfig(residual="double")) > 8


def test_a_sum_of_a_skip_and_what_comes_from_below_keeps_both() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down, self.side, self.up = nn.Conv2d(3, 8, 3, padding=1), layer(8, 3, 2), layer(8), layer(8)
            self.last, self.head = layer(8), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            high = self.stem(x)
            low = self.up(F.relu(self.down(high)))
            return self.head(self.last(self.side(high) + F.interpolate(low, scale_factor=2.0)))

    assert all(bypasses(bd.bidensify(Decoder())).values())
