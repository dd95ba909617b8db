"""UPerNet on ConvNeXt as BiDense's authors set it up (arXiv 2411.10346, section 4.1), in plain PyTorch.

ConvNeXt: Liu et al., arXiv 2201.03545. UPerNet: Xiao et al., arXiv 1807.10221, its object path. What the authors change, so that
full precision and every binary network share one frame: a BatchNorm behind each convolution (no LayerNorm, no layer scale), a
shortcut around the depthwise convolution of a block beside the block's own, a decoder as wide as the first stage whose 3x3
convolution of the levels is one and the same, and a head that works at the image's full resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bidensify.errors import ConfigError

__all__ = ["Head", "UPerNet", "conv_norm", "make_head"]

Head = Literal["segmentation", "depth"]


def conv_norm(inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (at stride 1) and a BatchNorm."""
    padding = kernel // 2 if stride == 1 else 0
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """ConvNeXt's block: 7x7 depthwise, 1x1 to four times the width, GELU, 1x1 back; (N, C, H, W) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = conv_norm(width, width, 7, groups=width)
        self.expand = conv_norm(width, 4 * width)
        self.act = nn.GELU()
        self.reduce = conv_norm(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = x + self.depthwise(x)
        result: Tensor = x + self.reduce(self.act(self.expand(inner)))
        return result


class ConvNeXt(nn.Module):
    """The four levels of features of ConvNeXt: (N, in_channels, H, W) to maps at 1/4, 1/8, 1/16 and 1/32."""

    def __init__(self, in_channels: int, depths: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        before = [in_channels, *widths[:-1]]
        self.down = nn.ModuleList(
            conv_norm(i, o, 2 if level else 4, stride=2 if level else 4)
            for level, (i, o) in enumerate(zip(before, widths, strict=True))
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width) for _ in range(depth))) for depth, width in zip(depths, widths, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for down, stage in zip(self.down, self.stages, strict=True):
            x = stage(down(x))
            features.append(x)
        return features


class Pyramid(nn.Module):
    """Pooling to 1, 2, 4 and 6 cells a side, each through a 1x1 convolution, beside the map itself (PSPNet)."""

    def __init__(self, width: int, cells: Sequence[int] = (1, 2, 4, 6)) -> None:
        super().__init__()
        part = width // len(cells)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), *conv_norm(width, part), nn.ReLU(inplace=True)) for n in cells
        )
        self.fuse = nn.Sequential(
            *conv_norm(width + part * len(cells), width, 3), nn.ReLU(inplace=True), nn.Dropout2d(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = [x, *(_resize(branch(x), x) for branch in self.branches)]
        result: Tensor = self.fuse(torch.cat(parts, 1))
        return result


class UPerNet(nn.Module):
    """UPerNet on ConvNeXt: images (N, in_channels, H, W) to raw predictions (N, channels, H, W); H, W at least 32.

    Args:
        classes: channels of the result with the head of segmentation.
        head: ``segmentation``, or ``depth``: one channel, which the task reads with ``output: sigmoid``.
        in_channels: channels of the image.
        depths, widths: blocks and channels of ConvNeXt's four levels.
        features: twice the channels of the head.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(
        self,
        classes: int = 150,
        head: Head = "segmentation",
        in_channels: int = 3,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        features: int = 256,
    ) -> None:
        super().__init__()
        if not len(depths) == len(widths) == 4 or min(*depths, *widths) < 1 or widths[-1] % 4:
            raise ConfigError(
                f"depths={list(depths)}, widths={list(widths)}; ConvNeXt has four levels, each with at least 1 block and 1 "
                "channel, the last width a multiple of 4"
            )
        width = widths[0]
        self.backbone = ConvNeXt(in_channels, depths, widths)
        self.pyramid = Pyramid(widths[-1])
        self.laterals = nn.ModuleList(conv_norm(w, width) for w in widths[1:])
        self.smooth = conv_norm(width, width, 3)
        self.fuse = nn.Sequential(*conv_norm(4 * width, width, 3), nn.ReLU(inplace=True))
        self.neck = conv_norm(width, features // 2, 3)
        self.head = make_head(head, features // 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        first, second, third, fourth = self.backbone(x)
        deeper = (second, third, self.pyramid(fourth))
        levels = [first, *(lateral(level) for lateral, level in zip(self.laterals, deeper, strict=True))]
        sums = [_resize(levels[i], levels[i - 1]) + levels[i - 1] for i in (3, 2, 1)]
        smooth = [level + self.smooth(level) for level in sums]
        maps = [smooth[2], *(_resize(level, smooth[2]) for level in (smooth[1], smooth[0], levels[3]))]
        x = self.neck(self.fuse(torch.cat(maps, 1)))
        result: Tensor = self.head(F.interpolate(x, size, mode="bilinear", align_corners=False))
        return result


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def make_head(kind: str, width: int, classes: int) -> nn.Sequential:
    """The authors' head: 3x3 convolution, BatchNorm, ReLU, 1x1 convolution; at the image's resolution.

    Raises:
        ConfigError: there is no such head.
    """
    if kind == "segmentation":
        return nn.Sequential(*conv_norm(width, width, 3), nn.ReLU(inplace=True), nn.Conv2d(width, classes, 1))
    if kind == "depth":
        return nn.Sequential(*conv_norm(width, 32, 3), nn.ReLU(inplace=True), nn.Conv2d(32, 1, 1))
    raise ConfigError(f"head={kind!r} is not known; use segmentation or depth")
