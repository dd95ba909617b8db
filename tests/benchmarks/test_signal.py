"""The zoo's count of full-precision signals sees what it is there to see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.signal import joined_signals

import bidensify as bd
from bidensify.nn import binary_layers
from bidensify.rewrite.record.recorder import record


class Net(nn.Module):
    """A basic block, a bottleneck with a projection, a gate and a decoder with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = self._layer(8, 8), self._layer(8, 8)
        self.narrow, self.wide, self.project = self._layer(8, 4, 1), self._layer(4, 16, 1), self._layer(8, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.down, self.side = self._layer(16, 16, 3, 2), self._layer(16, 16, 1)
        self.last, self.head = self._layer(16, 16), nn.Conv2d(16, 5, 1)

    @staticmethod
    def _layer(channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.second(F.relu(self.first(x))))
        y = F.relu(self.wide(F.relu(self.narrow(x))) + self.project(x))
        y = y * self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        low = F.relu(self.down(y))
        return self.head(self.last(self.side(y) + F.interpolate(low, scale_factor=2.0)))


def counts(student: nn.Module) -> dict[str, list[int]]:
    return joined_signals(record(student))


def test_one_signal_joins_each_layer() -> None:
    student = bd.bidensify(Net())
    found = counts(student)
    assert set(found) == {path for path, _ in binary_layers(student)}
    assert all(each == [1] for each in found.values())
    assert all(each == [1] for each in counts(bd.bidensify(Net(), bd.BidensifyConfig(residual="keep"))).values())


def test_doubled_signals_are_counted() -> None:
    found = counts(bd.bidensify(Net(), bd.BidensifyConfig(residual="double")))
    assert {path for path, each in found.items() if each == [2]} == {"second.0", "wide.0", "project.0"}
    assert {path for path, each in found.items() if each == [1]} == {
        "first.0",
        "narrow.0",
        "down.0",
        "side.0",
        "last.0",
    }


@pytest.mark.parametrize("path", ["first.0", "narrow.0", "project.0", "last.0"])
def test_a_lost_signal_is_counted(path: str) -> None:
    student = bd.bidensify(Net())
    student.get_submodule(path).bypass = None
    found = counts(student)
    assert 0 in found[path]


def without(make: Callable[[], nn.Module], *paths: str) -> dict[str, list[int]]:
    student = bd.bidensify(make(), bd.BidensifyConfig(residual="double"))
    for path in paths:
        student.get_submodule(path).bypass = None
    return counts(student)


class Difference(nn.Module):
    """FastViT's mixer: x + (sum of branches - norm(x)): one signal, two less one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.large, self.small = Net._layer(8, 8), Net._layer(8, 8, 1)
        self.own, self.norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + ((self.large(x) + self.small(x) + self.own(x)) - self.norm(x)))


def test_differences_take_a_signal_away() -> None:
    assert without(Difference, "large.0", "small.0") == {"large.0": [1], "small.0": [1]}
    assert without(Difference, "large.0") == {"large.0": [2], "small.0": [2]}
    # The rewrite itself finds the first of these.
    assert counts(bd.bidensify(Difference())) == {"large.0": [1], "small.0": [1]}
