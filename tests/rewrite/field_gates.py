"""Restoration networks with products and attention over channels, small: NAFNet, Restormer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NAFNet", "Restormer"]


class NAFBlock(nn.Module):
    """Chen et al. 2022: SimpleGate (a product of halves), simplified channel attention, learned residual scales."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, c), nn.GroupNorm(1, c)
        self.conv1, self.conv2 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.conv3, self.conv4, self.conv5 = nn.Conv2d(c, c, 1), nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.beta = nn.Parameter(torch.full((1, c, 1, 1), 0.5))
        self.gamma = nn.Parameter(torch.full((1, c, 1, 1), 0.5))

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return a * b

    def forward(self, inp: Tensor) -> Tensor:
        x = self.gate(self.conv2(self.conv1(self.norm1(inp))))
        x = self.conv3(x * self.sca(x))
        y = inp + x * self.beta
        x = self.conv5(self.gate(self.conv4(self.norm2(y))))
        return y + x * self.gamma


class NAFNet(nn.Module):
    """A U of NAF blocks with additive skips and a global residual."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.intro, self.ending = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.encoders = nn.ModuleList([nn.Sequential(NAFBlock(width)), nn.Sequential(NAFBlock(2 * width))])
        self.downs = nn.ModuleList([nn.Conv2d(width, 2 * width, 2, 2), nn.Conv2d(2 * width, 4 * width, 2, 2)])
        self.middle = nn.Sequential(NAFBlock(4 * width))
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(k * width, 2 * k * width, 1, bias=False), nn.PixelShuffle(2)) for k in (4, 2)
        )
        self.decoders = nn.ModuleList([nn.Sequential(NAFBlock(2 * width)), nn.Sequential(NAFBlock(width))])

    def forward(self, inp: Tensor) -> Tensor:
        x = self.intro(inp)
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle(x)
        for decoder, up, skip in zip(self.decoders, self.ups, skips[::-1]):
            x = decoder(up(x) + skip)
        return self.ending(x) + inp


class Restormer(nn.Module):
    """Zamir et al. 2022: attention over channels, gated depthwise feed-forward, bias-free LayerNorm by hand."""

    class Norm(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(c))

        def forward(self, x: Tensor) -> Tensor:
            variance = x.var(1, keepdim=True, unbiased=False)
            return x / torch.sqrt(variance + 1e-5) * self.weight.view(1, -1, 1, 1)

    class Block(nn.Module):
        def __init__(self, c: int, heads: int = 2) -> None:
            super().__init__()
            self.norm1, self.norm2, self.heads = Restormer.Norm(c), Restormer.Norm(c), heads
            self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
            self.qkv, self.qkv_dwconv = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(3 * c, 3 * c, 3, padding=1, groups=3 * c)
            self.project_attn, self.project_out = nn.Conv2d(c, c, 1), nn.Conv2d(2 * c, c, 1)
            self.project_in, self.dwconv = nn.Conv2d(c, 4 * c, 1), nn.Conv2d(4 * c, 4 * c, 3, padding=1, groups=4 * c)

        def attention(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            q, k, v = self.qkv_dwconv(self.qkv(x)).reshape(b, 3 * self.heads, c // self.heads, h * w).chunk(3, dim=1)
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            weights = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
            return self.project_attn((weights @ v).reshape(b, c, h, w))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            x1, x2 = self.dwconv(self.project_in(self.norm2(x))).chunk(2, dim=1)
            return x + self.project_out(F.gelu(x1) * x2)

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.encoder, self.latent = Restormer.Block(c), Restormer.Block(2 * c)
        self.down = nn.Sequential(nn.Conv2d(c, c // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))
        self.up = nn.Sequential(nn.Conv2d(2 * c, 4 * c, 3, padding=1, bias=False), nn.PixelShuffle(2))
        self.reduce, self.decoder = nn.Conv2d(2 * c, c, 1), Restormer.Block(c)
        self.output = nn.Conv2d(c, 3, 3, padding=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.encoder(self.patch_embed(image))
        y = self.up(self.latent(self.down(x)))
        return self.output(self.decoder(self.reduce(torch.cat([y, x], 1)))) + image
