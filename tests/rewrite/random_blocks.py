"""Blocks in the ways in which people write them, each with a random choice of its details.

``make(rng, channels, out_channels, stride)`` gives a block from (N, channels, H, W) to (N, out_channels, H/stride, W/stride).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

__all__ = ["BLOCKS", "LayerNorm2d", "conv_norm", "make_activation", "make_norm"]


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Context:
    """A random source with what the whole network has in common."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.only_relu = rng.random() < 0.5
        self.reflects = rng.random() < 0.1
        self.norm = rng.choice(("batch", "batch", "batch", "group", "layer", "frozen", "none", "mixed"))

    def chance(self, share: float) -> bool:
        return self.rng.random() < share


def make_activation(c: Context, channels: int) -> nn.Module:
    # Without norms an activation in place would write into what others read.
    inplace = c.norm not in ("none", "mixed") and c.chance(0.5)
    if c.only_relu:
        return nn.ReLU(inplace)
    kinds: tuple[Callable[[], nn.Module], ...] = (
        partial(nn.ReLU, inplace), nn.ReLU6, nn.GELU, nn.Hardswish, partial(nn.LeakyReLU, 0.1, inplace),
        partial(nn.PReLU, channels), nn.PReLU, partial(nn.SiLU, inplace), nn.ELU,
    )  # fmt: skip
    return c.rng.choice(kinds)()


def make_norm(c: Context, channels: int) -> nn.Module:
    kind = c.norm if c.norm != "mixed" else c.rng.choice(("batch", "group", "layer", "none", "frozen"))
    if kind == "batch":
        return nn.BatchNorm2d(channels, eps=c.rng.choice((1e-5, 1e-3)))
    if kind == "group":
        return nn.GroupNorm(c.rng.choice([g for g in (1, 2, 4) if channels % g == 0]), channels)
    if kind == "layer":
        return LayerNorm2d(channels)
    if kind == "frozen":
        return FrozenBatchNorm2d(channels)
    return nn.Identity()


def make_conv(c: Context, channels: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    dilation = c.rng.choice((1, 1, 1, 2)) if kernel > 1 and stride == 1 else 1
    if groups == 1 and kernel > 1 and channels % 2 == 0 and out % 2 == 0 and c.chance(0.15):
        groups = 2
    conv = nn.Conv2d(
        channels, out, kernel, stride, dilation * (kernel // 2), dilation, groups, bias=c.chance(0.4),
        padding_mode="reflect" if c.reflects and c.chance(0.3) else "zeros",
    )  # fmt: skip
    return weight_norm(conv) if c.chance(0.04) else conv


def conv_norm(c: Context, channels: int, out: int, kernel: int = 3, stride: int = 1, act: bool = False) -> nn.Module:
    parts = [make_conv(c, channels, out, kernel, stride), make_norm(c, out)]
    return nn.Sequential(*parts, *([make_activation(c, out)] if act else []))


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


class Dense(nn.Module):
    """DenseNet's: every layer reads all before it."""

    def __init__(self, c: Context, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.growth = c.rng.choice((2, 4))
        count = c.rng.choice((2, 3))
        self.layers = nn.ModuleList(
            nn.Sequential(
                make_norm(c, channels + i * self.growth), make_activation(c, channels + i * self.growth),
                nn.Conv2d(channels + i * self.growth, self.growth, 3, padding=1, bias=False),
            )
            for i in range(count)
        )  # fmt: skip
        self.fuse = conv_norm(c, channels + count * self.growth, out, 1, act=True)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.keep = c.chance(0.5)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            if self.keep:
                features.append(layer(torch.cat(features, 1)))
            else:
                features = [torch.cat([*features, layer(torch.cat(features, dim=1))], 1)]
        return self.pool(self.fuse(torch.cat(features, 1)))


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


class Parallel(nn.Module):
    """Branches of one input, concatenated (Inception, ASPP) or summed (RepVGG)."""

    def __init__(self, c: Context, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.how = c.rng.choice(("cat", "cat", "sum", "aspp"))
        self.act = make_activation(c, out)
        if self.how == "sum":
            self.branches = nn.ModuleList(conv_norm(c, channels, out, k, stride) for k in (1, 3, 3))
            self.own = make_norm(c, channels) if channels == out and stride == 1 and c.chance(0.6) else None
            return
        width = max(2, out // 2)
        self.branches = nn.ModuleList(conv_norm(c, channels, width, k, stride, act=c.chance(0.7)) for k in (1, 3))
        self.pooled = None
        if self.how == "aspp":
            self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, width, 1), nn.ReLU())
        self.fuse = conv_norm(c, width * (2 + (self.pooled is not None)), out, 1, act=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "sum":
            y = sum(branch(x) for branch in self.branches)
            return self.act(y if self.own is None else y + self.own(x))
        found = [branch(x) for branch in self.branches]
        if self.pooled is not None:
            found.append(F.interpolate(self.pooled(x), found[0].shape[-2:], mode="bilinear"))
        return self.fuse(torch.cat(found, dim=1))


class Split(nn.Module):
    """ShuffleNet's and CSP's: a part of the channels goes its own way."""

    def __init__(self, c: Context, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.enter = conv_norm(c, channels, out, 3, stride, act=True)
        self.how = c.rng.choice(("chunk", "split", "slice"))
        self.half = out // 2
        self.branch = nn.Sequential(
            *conv_norm(c, out - self.half, out - self.half, 3, act=True),
            *conv_norm(c, out - self.half, out - self.half, 1),
        )
        self.shuffle, self.residual = out % 2 == 0 and c.chance(0.6), c.chance(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.how == "chunk" and x.shape[1] % 2 == 0:
            a, b = x.chunk(2, 1)
        elif self.how == "slice":
            a, b = x[:, : self.half], x[:, self.half :]
        else:
            a, b = torch.split(x, [self.half, x.shape[1] - self.half], dim=1)
        b = b + self.branch(b) if self.residual else self.branch(b)
        x = torch.cat((a, b), 1)
        if self.shuffle:
            n, channels, height, width = x.shape
            x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)
        return x


class Options(nn.Module):
    """Called with optional and keyword arguments, a list and a dictionary."""

    def __init__(self, c: Context, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.inner = _Inner(c, channels, out, stride)
        self.way = c.rng.choice(("scale", "list", "dict", "none", "star"))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        if self.way == "scale":
            return self.inner(x, scale=0.5)
        if self.way == "list":
            return self.inner([x, x])
        if self.way == "dict":
            return self.inner({"x": x})["out"]
        if self.way == "star":
            return self.inner(*(x,), flag=True)
        return self.inner(x, None)


class _Inner(nn.Module):
    def __init__(self, c: Context, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv_norm(c, channels, out, 3, stride), conv_norm(c, out, out, 3)

    def forward(self, x: Any, other: Tensor | None = None, scale: float = 1.0, flag: bool = False) -> Any:
        named = isinstance(x, dict)
        value = x["x"] if named else x[0] if isinstance(x, list) else x
        y = F.relu(self.a(value))
        z = self.b(y)
        if other is not None:
            z = z + other
        z = F.relu(z * scale + y if flag else z + y)
        return {"out": z} if named else z


BLOCKS: tuple[type[nn.Module], ...] = (
    Plain, Residual, Residual, Residual, Inverted, Separable, Dense, Next, Parallel, Split, Options,
)  # fmt: skip
