"""What follows a layer's dot products and is constant per output channel, folded into a scale and a shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bidensify.errors import ConfigError
from bidensify.nn.activation import RPReLU
from bidensify.nn.sums import wide

if TYPE_CHECKING:
    from bidensify.nn.layer import BinaryLayer

__all__ = ["Folded", "fold"]


@dataclass(frozen=True)
class Folded:
    """What is constant per output channel, each (C_out,) float32.

    Attributes:
        scale, bias: of the integer dot products: the weights' scale, the layer's bias, BatchNorm and RPReLU's first shift.
        slope, post: the activation's negative side and last shift, or None.
        activation: what is left to be called, or None.
    """

    scale: Tensor
    bias: Tensor
    slope: Tensor | None
    post: Tensor | None
    activation: nn.Module | None


def fold(layer: BinaryLayer, weight_scale: Tensor | None) -> Folded:
    """Folds everything behind the dot products, in float64, rounded once.

    Args:
        layer: a binary layer.
        weight_scale: s_o as (C_out,), or None where it is 1.

    Raises:
        ConfigError: the layer's norm has no running statistics.
    """
    device = next(layer.parameters()).device
    dtype = wide(device)
    norm: Any = layer.norm
    bias = getattr(layer, "bias", None)
    out = int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]
    scale = torch.ones(out, dtype=dtype, device=device)
    if weight_scale is not None:
        scale = weight_scale.detach().to(dtype).flatten()
    shift = torch.zeros_like(scale) if bias is None else bias.detach().to(dtype)
    if norm is not None:
        if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
            raise ConfigError(
                f"its norm {type(norm).__name__} has no running statistics to fold; use BatchNorm with "
                "track_running_stats=True"
            )
        gain = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
        if norm.weight is not None:
            gain = gain * norm.weight.detach().to(dtype)
        shift = (shift - norm.running_mean.to(dtype)) * gain
        if norm.bias is not None:
            shift = shift + norm.bias.detach().to(dtype)
        scale = scale * gain
    activation: nn.Module | None = layer.activation
    slope = post = None
    if type(activation) is RPReLU:
        # The first shift is added where the bias is.
        shift = shift + activation.bias_in.detach().to(dtype)
        slope, post = activation.slope.detach(), activation.bias_out.detach()
    elif type(activation) is nn.ReLU:
        slope = torch.zeros_like(scale)
    elif type(activation) is nn.LeakyReLU:
        slope = torch.full_like(scale, activation.negative_slope)
    elif type(activation) is nn.PReLU and not isinstance(layer, nn.Linear):
        slope = activation.weight.detach().expand(out).contiguous()
    if slope is not None or type(activation) is nn.Identity:
        activation = None
    return Folded(
        scale.float(),
        shift.float(),
        None if slope is None else slope.float(),
        None if post is None else post.float(),
        activation,
    )
