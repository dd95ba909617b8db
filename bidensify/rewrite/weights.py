"""Weights that have no sign: an output channel fed by zeros alone would stay at 0, since its scale and its gradient are 0."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bidensify.nn import WeightBinarizer

__all__ = ["draw_zeros", "shares_weight", "zero_channels"]


def _parts(module: nn.Module) -> WeightBinarizer:
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    return WeightBinarizer(transposed=transposed, groups=int(getattr(module, "groups", 1)))


def zero_channels(module: nn.Module) -> Tensor | None:
    """(C_out,) bool: which output channels of a convolution or linear layer are fed by zeros alone.

    Returns:
        None where there are none, or no values to look at (the meta device, a weight that is made of other parameters).
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.is_meta:
        return None
    zero = ~_parts(module).rows(weight.detach()).any(1)
    return zero if bool(zero.any()) else None


def shares_weight(module: nn.Module, network: Iterable[nn.Module]) -> bool:
    """Whether another module of a network has a layer's weight too; with other values that one would compute something else."""
    weight = module._parameters.get("weight")
    others = (value for other in network if other is not module for value in other._parameters.values())
    return weight is not None and any(value is weight for value in others)


def draw_zeros(module: nn.Module) -> bool:
    """Draws the weights of such channels, as ``nn.Conv2d`` and ``nn.Linear`` do; the same every time.

    Returns:
        Whether there were any.
    """
    zero = zero_channels(module)
    if zero is None:
        return False
    parts, weight = _parts(module), module._parameters["weight"]
    assert weight is not None
    bound = parts.rows(weight).shape[1] ** -0.5
    drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        weight.copy_(torch.where(parts.like(zero, weight), drawn, weight))
    return True
