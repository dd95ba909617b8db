"""Blocks of several branches, with containers and optional arguments; see ``random_blocks``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from random_parts import Context, conv_norm, make_activation, make_norm
from torch import Tensor, nn

__all__ = ["Dense", "Options", "Parallel", "Split"]


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
