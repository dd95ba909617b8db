"""A small U-Net, written the way people write plain PyTorch: nothing in it knows that it will be binarized.

Encoder: the BasicBlock of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016). Decoder and skips:
Ronneberger et al., "U-Net" (MICCAI 2015), with bilinear upsampling in place of transposed convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut: (N, C_in, H, W) to (N, C_out, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + shortcut
        result: Tensor = self.relu(out)
        return result


class DecoderBlock(nn.Module):
    """Upsamples ``x`` to the size of ``skip``, concatenates, and applies two conv→BN→ReLU.

    Shapes: x (N, C_in, h, w), skip (N, C_skip, H, W), result (N, C_out, H, W).
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels + skip_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        x = self.conv1(torch.cat([x, skip], dim=1))
        result: Tensor = self.conv2(x)
        return result


class UNet(nn.Module):
    """U-Net on a residual encoder: images (N, in_channels, H, W) to logits (N, num_classes, H, W).

    Args:
        num_classes: channels of the result.
        in_channels: channels of the image.
        width: channels of the first level, at half resolution; every further level doubles them.
        levels: number of encoder levels; level i works at 1/2^(i+1) of the image's size. Any H, W ≥ 2^levels works.
        blocks: BasicBlocks per level.
    """

    def __init__(
        self, num_classes: int = 8, in_channels: int = 3, width: int = 24, levels: int = 4, blocks: int = 1
    ) -> None:
        super().__init__()
        if min(num_classes, in_channels, width, levels, blocks) < 1:
            raise ValueError(
                f"num_classes={num_classes}, in_channels={in_channels}, width={width}, levels={levels}, "
                f"blocks={blocks}: each has to be at least 1"
            )
        widths = [width * 2**level for level in range(levels)]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        stages = []
        previous = width
        for level, channels in enumerate(widths):
            stage = [BasicBlock(previous, channels, stride=1 if level == 0 else 2)]
            stage += [BasicBlock(channels, channels) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            previous = channels
        self.encoder = nn.ModuleList(stages)
        self.decoder = nn.ModuleList(
            DecoderBlock(deep, skip, skip) for deep, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = self.stem(x)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        for block, skip in zip(self.decoder, skips[-2::-1], strict=True):
            x = block(x, skip)
        return F.interpolate(self.head(x), size=size, mode="bilinear", align_corners=False)


def unet(num_classes: int = 8, in_channels: int = 3, width: int = 24, levels: int = 4, blocks: int = 1) -> UNet:
    """Builds the network behind ``"demo:unet"``; the arguments are those of :class:`UNet`."""
    return UNet(num_classes, in_channels, width, levels, blocks)
