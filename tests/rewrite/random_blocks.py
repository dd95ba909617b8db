"""Blocks in the ways in which people write them, each with a random choice of its details.

Each is made of (context, channels, out_channels, stride) and goes from (N, channels, H, W) to (N, out_channels, H / stride,
W / stride).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from random_branches import Dense, Options, Parallel, Split
from random_parts import Context, LayerNorm2d, conv_norm, make_activation, make_norm
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

__all__ = ["BLOCKS", "Residual"]


class Plain(nn.Module):
    """Two convolutions; activations as modules, functions or methods, one module for both places or not."""

    def __init__(self, c: Context, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv_norm(c, channels, out, 3, stride), conv_norm(c, out, out, c.rng.choice((1, 3)))
        self.how = c.rng.choice(("shared", "function", "method", "inplace", "order"))
        self.act = make_activation(c, out)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "shared":
            return self.act(self.b(self.act(self.a(x))))
        if self.how == "function":
            return F.relu(self.b(F.relu(self.a(x), inplace=True)))
        if self.how == "method":
            return self.b(self.a(x).relu()).relu()
        if self.how == "inplace":
            x = self.b(torch.relu_(self.a(x)))
            x.relu_()
            return x
        return self.b(self.act(self.a(x)))


class Residual(nn.Module):
    """A residual block: basic or bottleneck, post- or pre-activation, add written in several ways, with its extras."""

    def __init__(self, c: Context, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.pre, self.how = c.chance(0.3), c.rng.choice(("+", "+=", "add", "add_", "swapped", "module", "alpha"))
        narrow = max(2, out // 2) if c.chance(0.4) else out
        first = c.rng.choice((1, 3))
        self.first = conv_norm(c, channels, narrow, first, stride)
        self.second = conv_norm(c, narrow, out, c.rng.choice((1, 3)))
        if self.pre:
            self.norm1, self.norm2 = make_norm(c, channels), make_norm(c, narrow)
            self.first, self.second = self.first[0], self.second[0]
        self.shortcut: nn.Module | None = None
        if channels != out or stride != 1:
            kind = c.rng.choice(("conv", "conv", "pool"))
            parts = [nn.AvgPool2d(stride, stride)] if kind == "pool" and stride > 1 else []
            self.shortcut = nn.Sequential(*parts, *conv_norm(c, channels, out, 1, 1 if parts else stride))
        elif c.chance(0.2):
            self.shortcut = nn.Sequential()
        self.act, self.last = make_activation(c, narrow), make_activation(c, out)
        self.closed = c.chance(0.6)
        self.functional = c.chance(0.3)
        self.drop = c.rng.choice((nn.Identity, nn.Identity, lambda: nn.Dropout(0.0), lambda: nn.Dropout2d(0.3)))()
        if c.chance(0.15):
            self.drop = StochasticDepth(0.2, "row")
        self.gamma = nn.Parameter(torch.full((1, out, 1, 1), 0.5)) if c.chance(0.15) else None
        self.number = c.rng.choice((None, None, None, 0.5))
        self.gate = c.rng.choice((None, None, None, "se", "spatial"))
        if self.gate == "se":
            self.attend = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(out, 2, 1), nn.ReLU(), nn.Conv2d(2, out, 1),
                c.rng.choice((nn.Sigmoid, nn.Hardsigmoid))(),
            )  # fmt: skip
        elif self.gate == "spatial":
            self.attend = nn.Sequential(nn.Conv2d(out, 1, 3, padding=1), nn.Sigmoid())
        if self.how == "module":
            self.sum = _Add()

    def _relu(self, x: Tensor, module: nn.Module) -> Tensor:
        return F.relu(x) if self.functional else module(x)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if self.pre:
            y = self.first(F.relu(self.norm1(x)))
            y = self.second(self._relu(self.norm2(y), self.act))
        else:
            y = self.second(self._relu(self.first(x), self.act))
        if self.gate is not None:
            y = y * self.attend(y)
        if self.gamma is not None:
            y = self.gamma * y
        if self.number is not None:
            y = y * self.number
        y = self.drop(y)
        if self.how == "+":
            y = y + shortcut
        elif self.how == "+=":
            y += shortcut
        elif self.how == "add":
            y = torch.add(shortcut, y)
        elif self.how == "add_":
            y = y.add_(shortcut)
        elif self.how == "swapped":
            y = shortcut + y
        elif self.how == "alpha":
            y = torch.add(y, shortcut, alpha=1)
        else:
            y = self.sum(y, shortcut)
        return self._relu(y, self.last) if self.closed else y


class _Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Inverted(nn.Module):
    """MobileNet's: expansion, depthwise, squeeze-excite, projection, an add where shapes agree."""

    def __init__(self, c: Context, channels: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 2 * channels
        layers: list[nn.Module] = []
        if c.chance(0.8):
            layers += conv_norm(c, channels, wide, 1, act=True)
        else:
            wide = channels
        layers += [
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            make_norm(c, wide),
            make_activation(c, wide),
        ]
        if c.chance(0.4):
            layers.append(SqueezeExcite(c, wide))
        layers += [nn.Conv2d(wide, out, 1, bias=False), make_norm(c, out)]
        self.block = nn.Sequential(*layers)
        self.same = channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.same else self.block(x)


class SqueezeExcite(nn.Module):
    """A gate from convolutions on a pooled map or from linear layers."""

    def __init__(self, c: Context, channels: int) -> None:
        super().__init__()
        self.linear = c.chance(0.5)
        layer: Callable[[int, int], nn.Module] = nn.Linear if self.linear else partial(nn.Conv2d, kernel_size=1)
        self.reduce, self.expand = layer(channels, 4), layer(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            s = x.mean((2, 3))
            return x * torch.sigmoid(self.expand(F.relu(self.reduce(s))))[:, :, None, None]
        s = F.adaptive_avg_pool2d(x, 1)
        return x * self.expand(F.relu(self.reduce(s))).sigmoid()


class Separable(nn.Module):
    """Depthwise and pointwise convolutions in one of their orders."""

    def __init__(self, c: Context, channels: int, out: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=c.chance(0.3))
        pointwise = nn.Conv2d(channels, out, 1)
        self.body = nn.Sequential(depthwise, *([make_norm(c, channels), make_activation(c, channels)] * c.chance(0.5)))
        self.tail = nn.Sequential(pointwise, make_norm(c, out), make_activation(c, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))


class Next(nn.Module):
    """ConvNeXt's: depthwise, LayerNorm, pointwise as convolutions or as linear layers on NHWC, LayerScale, residual."""

    def __init__(self, c: Context, channels: int, out: int, stride: int) -> None:
        super().__init__()
        kernel = c.rng.choice((3, 5, 7))
        self.down = nn.Sequential(LayerNorm2d(channels), nn.Conv2d(channels, out, max(stride, 1), stride))
        self.depthwise = nn.Conv2d(out, out, kernel, padding=kernel // 2, groups=out)
        self.linear = c.chance(0.5)
        self.norm = nn.LayerNorm(out) if self.linear else LayerNorm2d(out)
        self.up = nn.Linear(out, 3 * out) if self.linear else nn.Conv2d(out, 3 * out, 1)
        self.back = nn.Linear(3 * out, out) if self.linear else nn.Conv2d(3 * out, out, 1)
        self.act = nn.ReLU() if c.only_relu else nn.GELU()
        self.gamma = nn.Parameter(torch.ones(out)) if c.chance(0.5) else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        y = self.depthwise(x)
        if self.linear:
            y = y.permute(0, 2, 3, 1)
        y = self.back(self.act(self.up(self.norm(y))))
        if self.linear:
            if self.gamma is not None:
                y = self.gamma * y
            y = y.permute(0, 3, 1, 2)
        elif self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + y


BLOCKS: tuple[type[nn.Module], ...] = (
    Plain, Residual, Residual, Residual, Inverted, Separable, Dense, Next, Parallel, Split, Options,
)  # fmt: skip
