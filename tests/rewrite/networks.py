"""Small networks written as people write them, for the tests of the rewrite."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """One ReLU module for two places, an in-place add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """Functional activations, a projection where the width changes."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        width = out_channels // 4
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.project = None
        if stride != 1 or channels != out_channels:
            self.project = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.project is None else self.project(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + shortcut)


class UpBlock(nn.Module):
    """An optional argument: the classic trap of a symbolic trace."""

    def __init__(self, channels: int, skip: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + skip, out_channels, 3, padding=1)

    def forward(self, x: Tensor, height: int, width: int, skip: Tensor | None = None) -> Tensor:
        x = F.interpolate(x, size=(height, width), mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return F.relu(self.conv(x))


class Net(nn.Module):
    """Stem, residual blocks, a decoder with and without a skip, a predictor."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.basic = nn.Sequential(BasicBlock(8), BasicBlock(8))
        self.deep = nn.Sequential(Bottleneck(8, 16, 2), Bottleneck(16, 16))
        self.up1 = UpBlock(16, 8, 12)
        self.up2 = UpBlock(12, 0, 8)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid()
        )
        self.head = nn.Conv2d(8, classes, 1)
        self.unused = nn.Conv2d(8, 8, 3)

    def forward(self, image: Tensor) -> Tensor:
        low = self.basic(self.stem(image))
        x = self.deep(low)
        x = self.up1(x, low.shape[-2], low.shape[-1], low)
        x = self.up2(x, image.shape[-2], image.shape[-1])
        return self.head(x * self.gate(x))
