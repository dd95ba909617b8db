"""Small networks, each with one thing before a packed layer that lies, or whose kernel wants it, in another order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidensify.nn import BiDenseConv2d, BiDenseLinear

__all__ = ["BEFORE", "Net"]


def _pyramid(x: Tensor) -> Tensor:
    sizes = (1, 2, 3, 6)
    pooled = [F.adaptive_avg_pool2d(x, size) for size in sizes]
    return torch.cat([x, *(F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False) for y in pooled)], 1)


def _windows(x: Tensor, side: int = 4) -> Tensor:
    n, c, h, w = x.shape
    y = torch.roll(x.permute(0, 2, 3, 1), (-2, -2), (1, 2)).reshape(n, h // side, side, w // side, side, c)
    y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, c)
    y = F.scaled_dot_product_attention(y, y, y)
    y = y.reshape(n, h // side, w // side, side, side, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return torch.roll(y, (2, 2), (1, 2)).permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = x.flatten(2).transpose(1, 2)
    y = F.layer_norm(y, (c,)) @ torch.eye(c)
    return y.transpose(1, 2).reshape(n, c, h, w)


def _shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)


def _mixed(x: Tensor) -> Tensor:
    y = F.gelu(F.linear(x.permute(0, 2, 3, 1), torch.ones(8, 16)))
    return F.linear(y, torch.ones(16, 8)).permute(0, 3, 1, 2)


# name -> (what comes before, channels that it makes of 16).
BEFORE = {
    "a pyramid of pools": (_pyramid, 80),
    "a pool of one pixel, enlarged": (
        lambda x: torch.cat([x, F.interpolate(F.adaptive_avg_pool2d(x, 1), x.shape[2:], mode="bilinear")], 1), 32),
    "a pool that does not divide": (lambda x: F.adaptive_avg_pool2d(x, (5, 7)), 16),
    "a largest value": (lambda x: F.adaptive_max_pool2d(x, 1) + x, 16),
    "a pool with a remainder": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), 16),
    "squeeze and excite": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), 16),
    "a map over channels": (lambda x: x * torch.sigmoid(torch.cat([x.mean(1, True), x.amax(1, True)], 1).sum(1, True)), 16),
    "a soft-max over channels": (lambda x: torch.softmax(x, 1), 16),
    "slices": (lambda x: x[:, 4:12, ::2, 1:], 8),
    "halves swapped": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 16),
    "split, one part through a sigmoid": (lambda x: torch.cat([x[:, :4], torch.sigmoid(x[:, 4:])], 1), 16),
    "turned": (lambda x: x.transpose(2, 3).flip(3), 16),
    "windows": (_windows, 16),
    "tokens": (_tokens, 16),
    "shuffled channels": (_shuffled, 16),
    "pixels to channels": (lambda x: F.pixel_unshuffle(x, 2), 64),
    "channels to pixels": (lambda x: F.pixel_shuffle(x, 2), 4),
    "enlarged": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), 16),
    "enlarged to another size": (lambda x: F.interpolate(x, (13, 10)), 16),
    "enlarged twice over": (lambda x: F.interpolate(x, scale_factor=2), 16),
    "enlarged by other factors": (lambda x: F.interpolate(x, scale_factor=(3, 2)) * F.interpolate(x, (36, 32), mode="area"), 16),
    "a pool of one pixel, repeated": (lambda x: F.interpolate(F.adaptive_avg_pool2d(x, 1), scale_factor=3) + 1, 16),
    "one channel, repeated": (lambda x: F.interpolate(x[:, :1], scale_factor=(1, 4)) + 1, 1),
    "enlarged by a cubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), 16),
    "padded": (lambda x: F.pad(x, (1, 2, 0, 1)), 16),
    "reflected": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), 16),
    "normed by groups": (lambda x: F.group_norm(x, 4) + x, 16),
    "normed by images": (lambda x: F.instance_norm(x), 16),
    "normed over channels": (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2), 16),
    "a length of one": (lambda x: F.normalize(x, dim=1), 16),
    "stacked": (lambda x: torch.stack([x, x + 1, x * 2], 1).sum(1), 16),
    "many parts": (lambda x: torch.cat([x * (i + 1) for i in range(7)], 1), 112),
    "compared": (lambda x: torch.where(x > 0, x, x.mean(1, keepdim=True)), 16),
    "outer": (lambda x: x.mean(2, keepdim=True) * x.mean(3, keepdim=True), 16),
    "gathered": (lambda x: x[:, [3, 1, 2, 0]], 4),
    "repeated": (lambda x: x.repeat(1, 2, 1, 1), 32),
    "unfolded": (lambda x: F.fold(F.unfold(x, 2, stride=2), (12, 16), 2, stride=2), 16),
    "turned and back by linear layers": (_mixed, 16),
}  # fmt: skip


class Net(nn.Module):
    """A stem, what is named, a packed layer on it and one on its pixels as tokens, a head that another pool weighs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.before, channels = BEFORE[name]
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.first = BiDenseConv2d(16, 16, 3, padding=1)
        self.layer = BiDenseConv2d(channels, 24, 3, padding=1)
        self.line = BiDenseLinear(channels, 12)
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.first(self.stem(x))
        z = self.before(y)
        tokens = self.line(z.flatten(2).transpose(1, 2))
        return self.head(self.layer(z)), self.before(F.relu(y)), tokens
