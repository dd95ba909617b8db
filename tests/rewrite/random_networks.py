"""Random networks: an encoder of random blocks, a random decoder, random inputs and outputs; and random graphs of operations."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from random_blocks import BLOCKS, Residual
from random_branches import Options, Parallel
from random_parts import Context, conv_norm, make_activation
from torch import Tensor, nn

__all__ = ["random_graph", "random_network", "settle"]


class Encoder(nn.Module):
    """Stages at halved resolutions; gives all of them as a list, a tuple or a dictionary."""

    def __init__(self, c: Context, image: int, widths: list[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(c, image, widths[0], 3, c.rng.choice((1, 2)), act=True))
        stages, channels = [], widths[0]
        for width in widths:
            blocks = []
            for number in range(c.rng.choice((1, 2))):
                stride = 2 if number == 0 else 1
                blocks.append(c.rng.choice(BLOCKS)(c, channels, width, stride))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.kind = c.rng.choice(("list", "tuple", "dict"))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        found = [x]
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        if self.kind == "dict":
            return {f"level{number}": value for number, value in enumerate(found)}
        return tuple(found) if self.kind == "tuple" else found


class Up(nn.Module):
    """One step of a decoder: upsampling of some kind, a skip joined or not."""

    def __init__(self, c: Context, channels: int, skip: int, out: int) -> None:
        super().__init__()
        self.how = c.rng.choice(("nearest", "bilinear", "deconv", "shuffle"))
        self.join = c.rng.choice(("cat", "cat", "add", "gate", "none"))
        self.enter: nn.Module = nn.Identity()
        if self.how == "deconv":
            kernel = c.rng.choice((2, 4))
            self.enter = nn.ConvTranspose2d(channels, channels, kernel, 2, (kernel - 2) // 2)
        elif self.how == "shuffle":
            self.enter = nn.Sequential(nn.Conv2d(channels, 4 * channels, 1), nn.PixelShuffle(2))
        if self.join in ("add", "gate"):
            self.side = conv_norm(c, skip, channels, 1)
        if self.join == "gate":
            self.psi = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, 1, 1), nn.Sigmoid())
        joined = {"cat": channels + skip, "gate": channels + skip}.get(self.join, channels)
        self.fuse = c.rng.choice((Residual, Parallel, Options))(c, joined, out, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        size = skip.shape[-2:] if skip is not None else None
        if self.how in ("deconv", "shuffle"):
            x = self.enter(x)
        elif self.how == "nearest":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        else:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        if skip is not None and x.shape[-2:] != skip.shape[-2:]:
            x = F.interpolate(x, skip.shape[-2:])
        if self.join == "cat":
            x = torch.cat([x, skip], dim=1)
        elif self.join == "add":
            x = x + self.side(skip)
        elif self.join == "gate":
            x = torch.cat([x, skip * self.psi(x + self.side(skip))], 1)
        return self.fuse(x)


class Network(nn.Module):
    """Encoder, decoder, one or two heads."""

    def __init__(self, c: Context) -> None:
        super().__init__()
        self.only_relu = c.only_relu
        self.images = c.rng.choice((1, 1, 1, 2))
        image = c.rng.choice((3, 3, 1, 4))
        widths = [c.rng.choice((4, 6, 8, 12)) for _ in range(c.rng.choice((2, 3)))]
        self.image_channels = image
        self.encoder = Encoder(c, image, widths)
        levels = [widths[0], *widths]
        channels = levels[-1] * self.images
        self.neck = nn.Identity()
        if c.chance(0.3):
            self.neck = Parallel(c, channels, channels, 1)
        ups = []
        for skip in reversed(levels[:-1]):
            out = c.rng.choice((4, 8, skip))
            ups.append(Up(c, channels, skip, out))
            channels = out
        self.ups = nn.ModuleList(ups)
        self.act = make_activation(c, channels)
        self.head = nn.Conv2d(channels, c.rng.choice((1, 2, 5)), c.rng.choice((1, 3)))
        self.second = (
            nn.Sequential(*conv_norm(c, channels, 4, 3, act=True), nn.Conv2d(4, 2, 1)) if c.chance(0.3) else None
        )
        self.kind = c.rng.choice(("tensor", "dict", "tuple", "resized"))

    def forward(self, *images: Tensor) -> Any:
        features = [self._features(image) for image in images]
        levels = features[0]
        x = torch.cat([each[-1] for each in features], 1)
        x = self.neck(x)
        for up, skip in zip(self.ups, levels[-2::-1]):
            x = up(x, skip)
        x = self.act(x)
        y = self.head(x)
        if self.kind == "resized":
            y = F.interpolate(y, images[0].shape[-2:], mode="bilinear")
        if self.second is not None:
            return {"out": y, "aux": self.second(x)} if self.kind == "dict" else (y, self.second(x))
        return {"out": y} if self.kind == "dict" else (y,) if self.kind == "tuple" else y

    def _features(self, image: Tensor) -> list[Tensor]:
        found = self.encoder(image)
        return list(found.values()) if isinstance(found, dict) else list(found)


class Graph(nn.Module):
    """Operations on values made so far, in any order: each step names its kind, its layer and its operands."""

    def __init__(self, c: Context, steps: int) -> None:
        super().__init__()
        self.only_relu, self.any_order = c.only_relu, True
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, list[int]]] = []
        # Channels and level (the power of 2 by which it is smaller) of each value.
        self.facts: list[tuple[int, int]] = [(3, 0)]
        self._step(c, "layer", [0], (8, 0), conv_norm(c, 3, 8, 3, act=True))
        for _ in range(steps):
            self._grow(c)
        used = {item for _, operands in self.steps for item in operands}
        loose = [number for number in range(1, len(self.facts)) if number not in used]
        self.loose = loose
        self.head = nn.Conv2d(sum(self.facts[number][0] for number in loose), 3, 1)

    def _step(
        self, c: Context, kind: str, operands: list[int], facts: tuple[int, int], layer: nn.Module | None = None
    ) -> int:
        if layer is not None:
            self.layers[str(len(self.steps))] = layer
        self.steps.append((kind, operands))
        self.facts.append(facts)
        return len(self.facts) - 1

    def _pick(self, c: Context) -> int:
        # Recent values rather than old ones.
        return max(1, len(self.facts) - 1 - int(c.rng.expovariate(0.6)))

    def _grow(self, c: Context) -> None:
        a = self._pick(c)
        channels, level = self.facts[a]
        alike = [n for n, facts in enumerate(self.facts) if facts == (channels, level) and n not in (0, a)]
        kind = c.rng.choice(
            ("layer", "layer", "layer", "layer", "conv", "act", "relu", "norm", "add", "add", "iadd", "sub", "cat",
             "gate", "product", "half", "pool", "up", "scale", "drop", "block", "tanh")
        )  # fmt: skip
        out = c.rng.choice((channels, channels, 4, 6, 8, 12))
        if kind == "layer":
            stride = 2 if level < 2 and c.chance(0.2) else 1
            layer = conv_norm(c, channels, out, c.rng.choice((1, 3)), stride, act=c.chance(0.6))
            self._step(c, kind, [a], (out, level + stride - 1), layer)
        elif kind == "conv":
            self._step(c, "layer", [a], (out, level), nn.Conv2d(channels, out, 3, padding=1))
        elif kind == "block":
            self._step(c, "layer", [a], (out, level), c.rng.choice(BLOCKS)(c, channels, out, 1))
        elif kind in ("act", "norm"):
            layer = nn.ReLU() if kind == "act" else nn.BatchNorm2d(channels)
            self._step(c, "layer", [a], (channels, level), layer)
        elif kind in ("add", "iadd", "sub", "product") and alike:
            self._step(c, kind, [a, c.rng.choice(alike)], (channels, level))
        elif kind == "cat":
            same = [n for n, facts in enumerate(self.facts) if facts[1] == level and n not in (0, a)]
            if same:
                b = c.rng.choice(same)
                if channels + self.facts[b][0] <= 32:
                    self._step(c, kind, [a, b], (channels + self.facts[b][0], level))
        elif kind == "gate":
            b = self._step(c, "layer", [a], (channels, level), nn.Conv2d(channels, channels, 1))
            self._step(c, kind, [a, b], (channels, level))
        elif kind == "half" and channels >= 8 and channels % 2 == 0:
            self._step(c, kind, [a], (channels // 2, level))
        elif (kind == "pool" and level < 2) or (kind == "up" and level > 0):
            self._step(c, kind, [a], (channels, level + (1 if kind == "pool" else -1)))
        elif kind in ("relu", "scale", "drop"):
            self._step(c, kind, [a], (channels, level))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        values = [x]
        for number, (kind, operands) in enumerate(self.steps):
            a = values[operands[0]]
            b = values[operands[-1]]
            if kind == "layer":
                y = self.layers[str(number)](a)
            elif kind == "relu":
                y = F.relu(a)
            elif kind == "add":
                y = a + b
            elif kind == "iadd":
                y = a.clone()
                y += b
            elif kind == "sub":
                y = a - b
            elif kind == "product":
                y = a * b
            elif kind == "cat":
                y = torch.cat([a, b], 1)
            elif kind == "gate":
                y = a * torch.sigmoid(b)
            elif kind == "half":
                y = a.chunk(2, dim=1)[0]
            elif kind == "pool":
                y = F.max_pool2d(a, 2)
            elif kind == "up":
                y = F.interpolate(a, scale_factor=2.0)
            elif kind == "scale":
                y = 0.5 * a
            else:
                y = F.dropout(a, 0.1, self.training)
            values.append(y)
        loose = [F.interpolate(values[number], size) for number in self.loose]
        return self.head(torch.cat(loose, dim=1))


def settle(model: nn.Module, rng: Random) -> nn.Module:
    """Norms with values of their own, so that a lost one is noticed."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    with torch.no_grad():
        for module in model.modules():
            for name, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is None or not value.is_floating_point() or "norm" not in type(module).__name__.lower():
                    continue
                value.copy_(
                    torch.rand(value.shape, generator=generator) * 0.5
                    + (0.0 if name in ("bias", "running_mean") else 0.75)
                )
    return model.eval()


def random_network(seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network of blocks and example inputs of batch 2."""
    rng = Random(seed)
    torch.manual_seed(seed)
    model = Network(Context(rng))
    generator = torch.Generator().manual_seed(seed)
    side = rng.choice((32, 48))
    images = tuple(torch.randn(2, model.image_channels, 32, side, generator=generator) for _ in range(model.images))
    return settle(model, rng), images


def random_graph(seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network of operations in any order and an example input of batch 2."""
    rng = Random(seed)
    torch.manual_seed(seed)
    model = Graph(Context(rng), rng.choice((12, 20, 30)))
    return settle(model, rng), (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)),)
