"""Straight PyTorch formulations of the layers' equations, differentiated by autograd alone."""

from __future__ import annotations

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    return torch.where(x.detach() >= 0, 1.0, -1.0).to(x.dtype)


def bireal(x: Tensor) -> Tensor:
    """Value sign(x), gradient of the piecewise polynomial of Bi-Real Net (eq. 6)."""
    smooth = torch.where(x < 0, 2 * x + x * x, 2 * x - x * x)
    smooth = torch.where(x < -1, -torch.ones_like(x), torch.where(x >= 1, torch.ones_like(x), smooth))
    return smooth + (sign(x) - smooth).detach()


def clipped(x: Tensor) -> Tensor:
    """Value sign(x), gradient of hardtanh."""
    smooth = x.clamp(-1, 1)
    return smooth + (sign(x) - smooth).detach()


def mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    # torch reduces over everything where it is given no dimension.
    return x.mean(dims, keepdim=True) if dims else x


def dab(x: Tensor, k: Tensor, b: Tensor, a: Tensor, act_scale: str, dim: int = 1) -> Tensor:
    """alpha * sign(x - (k mean + b)), alpha = exp(a (mean|x - beta| - 1)); statistics take no gradient."""
    spatial = tuple(range(2, x.dim())) if dim == 1 else tuple(range(1, x.dim() - 1))
    shifted = x - (k * mean(x.detach(), spatial) + b)
    distance = shifted.detach().abs()
    if act_scale == "none":
        return bireal(shifted)
    dims = tuple(range(1, x.dim())) if act_scale == "per_tensor" else spatial
    return torch.exp(a * (mean(distance, dims) - 1)) * bireal(shifted)


def rprelu(x: Tensor, bias_in: Tensor, slope: Tensor, bias_out: Tensor) -> Tensor:
    shape = (1, -1, 1, 1)
    x = x + bias_in.view(shape)
    return torch.where(x > 0, x, x * slope.view(shape)) + bias_out.view(shape)


def batch_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = y.mean((0, 2, 3), keepdim=True)
    variance = ((y - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (y - mean) / (variance + eps).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
