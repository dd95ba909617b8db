"""The single layers that ``bidensify bench`` times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bidensify.nn import BiDenseConv2d, BiDenseConvTranspose2d, BiDenseLinear

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A layer and its input.

    Args:
        name: what tables call it.
        kind: "conv", "conv_transpose" or "linear".
        shape: of the input, (N, C, H, W) or (N, tokens, C).
        out_channels: C_out.
        kernel, stride, padding, groups: as in torch.
        target: ratio to float that the project aims at with the machine's fastest kernel, or None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    out_channels: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    target: float | None = None

    def build(self, act_bits: int = 1) -> tuple[nn.Module, nn.Module]:
        """(float layer + BatchNorm + ReLU, latent BiDense layer of ``act_bits``), both in evaluation mode."""
        latent: nn.Module
        out, k, s, p, g = self.out_channels, self.kernel, self.stride, self.padding, self.groups
        if self.kind == "linear":
            channels = self.shape[-1]
            # BatchNorm over tokens folds into a linear layer, so the float side is given it for nothing.
            return nn.Sequential(nn.Linear(channels, out), nn.ReLU()).eval(), BiDenseLinear(
                channels, out, act_bits=act_bits
            ).eval()
        channels = self.shape[1]
        body: nn.Module
        if self.kind == "conv_transpose":
            body = nn.ConvTranspose2d(channels, out, k, s, p, groups=g, bias=False)
            latent = BiDenseConvTranspose2d(channels, out, k, s, p, groups=g, act_bits=act_bits)
        else:
            body = nn.Conv2d(channels, out, k, s, p, groups=g, bias=False)
            latent = BiDenseConv2d(channels, out, k, s, p, groups=g, act_bits=act_bits)
        floats = nn.Sequential(body, nn.BatchNorm2d(out), nn.ReLU()).eval()
        return floats.to(memory_format=torch.channels_last), latent.eval()

    def input(self) -> Tensor:
        """A random input, channels_last."""
        x = torch.randn(self.shape)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


CASES: tuple[Case, ...] = (
    Case("3x3 256->256 at 64x64", "conv", (1, 256, 64, 64), 256, 3, 1, 1, target=10),
    Case("3x3 64->64 at 128x128", "conv", (1, 64, 128, 128), 64, 3, 1, 1, target=7),
    Case("3x3 512->512 at 16x16", "conv", (1, 512, 16, 16), 512, 3, 1, 1, target=8),
    Case("1x1 256->256 at 64x64", "conv", (1, 256, 64, 64), 256, target=5),
    Case("7x7 depthwise 96 at 128x128", "conv", (1, 96, 128, 128), 96, 7, 1, 3, 96, target=1.5),
    Case("transposed 2x2/2 256->128 at 32x32", "conv_transpose", (1, 256, 32, 32), 128, 2, 2, target=4),
    Case("linear 4096x384->1536", "linear", (1, 4096, 384), 1536, target=4),
    Case("3x3/2 128->256 at 64x64", "conv", (1, 128, 64, 64), 256, 3, 2, 1),
)
