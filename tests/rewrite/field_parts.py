"""What the small networks of the field have in common."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Basic", "cbr"]


def cbr(channels: int, out: int, kernel: int = 3, stride: int = 1, act: bool = True, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if act else []))


class Basic(nn.Module):
    """A basic block that may end without its ReLU, as DDRNet's and PIDNet's do."""

    def __init__(self, channels: int, out: int, stride: int = 1, no_relu: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = cbr(channels, out, 1, stride, act=False) if channels != out or stride > 1 else None
        self.no_relu = no_relu

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        if self.no_relu:
            return out
        return self.relu(out)
