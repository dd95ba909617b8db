"""What random blocks are made of: convolutions, norms and activations, by chance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

__all__ = ["Context", "LayerNorm2d", "conv_norm", "make_activation", "make_norm"]


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
