"""Step 4 of the definition: what is constant per output channel, folded into a scale, a shift and an activation's parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.errors import ConfigError
from bidensify.exact.sums import wide

__all__ = ["Affine", "Folded", "Pointwise", "batch_norm", "fold", "folded"]


@dataclass(frozen=True)
class Affine:
    """What a norm's ``folded()`` says: in evaluation it is x * scale + shift, (C,) each."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Pointwise:
    """What an activation's ``folded()`` says: with u = x + before, it is clamp(u > 0 ? u * rise : u * slope) + after.

    Attributes:
        before, after: (C,) or one element, or None for 0.
        slope, rise: of the negative and of the positive side, (C,) or one element; None for 1.
        low, high: bounds, or None for none.
    """

    before: Tensor | None = None
    slope: Tensor | None = None
    rise: Tensor | None = None
    low: float | None = None
    high: float | None = None
    after: Tensor | None = None


@dataclass(frozen=True)
class Folded:
    """What is constant per output channel, each (C_out,) float32.

    Attributes:
        scale, bias: of the integer dot products: the weights' scale, the layer's bias, the norm, the activation's first shift.
        offset: of the sum of the binarized inputs of each window: the weights' offset, or None for 0.
        rise, slope: of the activation's positive and negative side, or None for 1.
        clamp: (2,) lower and upper bound, or None.
        post: the activation's last shift, or None.
        activation: what is left to be called, or None.
    """

    scale: Tensor
    bias: Tensor
    offset: Tensor | None = None
    rise: Tensor | None = None
    slope: Tensor | None = None
    clamp: Tensor | None = None
    post: Tensor | None = None
    activation: nn.Module | None = None


def batch_norm(norm: Any) -> Affine:
    """What a BatchNorm is in evaluation.

    Raises:
        ConfigError: it has no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ConfigError(
            f"its norm {type(norm).__name__} has no running statistics to fold; use BatchNorm with track_running_stats=True"
        )
    dtype = wide(norm.running_mean.device)
    gain = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.detach().to(dtype)
    shift = -norm.running_mean.to(dtype) * gain
    return Affine(gain, shift if norm.bias is None else shift + norm.bias.detach().to(dtype))


def _one(value: float) -> Tensor:
    return torch.tensor([float(value)])


# What torch's own classes are. A subclass that changes the forward is none of them.
_TORCH: dict[Any, Callable[[Any], Affine | Pointwise]] = {
    nn.modules.batchnorm._BatchNorm.forward: batch_norm,
    nn.Identity.forward: lambda _: Pointwise(),
    nn.ReLU.forward: lambda _: Pointwise(slope=_one(0)),
    nn.ReLU6.forward: lambda _: Pointwise(low=0.0, high=6.0),
    nn.Hardtanh.forward: lambda part: Pointwise(low=float(part.min_val), high=float(part.max_val)),
    nn.LeakyReLU.forward: lambda part: Pointwise(slope=_one(part.negative_slope)),
    nn.PReLU.forward: lambda part: Pointwise(slope=part.weight.detach()),
}


def folded(part: nn.Module) -> Affine | Pointwise | None:
    """What a norm or an activation is in evaluation, as it says itself (or, of torch's own, as is known); None: call it.

    Raises:
        ConfigError: a norm without running statistics.
    """
    said = getattr(part, "folded", None)
    if callable(said):
        result: Affine | Pointwise | None = said()
        return result
    if "forward" in part.__dict__:
        return None
    known = _TORCH.get(type(part).forward)
    return None if known is None else known(part)


def _row(value: Tensor | None, scale: Tensor) -> Tensor | None:
    """(C_out,) float32 of a parameter per channel or for all."""
    return None if value is None else value.detach().to(scale.device).flatten().expand(len(scale)).float().contiguous()


def fold(layer: Any, scale: Tensor, offset: Tensor | None) -> Folded:
    """Folds everything behind the integer sums, in float64, rounded once.

    Args:
        layer: a binary layer: its ``bias``, ``norm`` and ``activation`` are folded.
        scale: of the weights' signs, (C_out,).
        offset: of the weights, (C_out,), or None.

    Raises:
        ConfigError: the layer's norm cannot be folded.
    """
    dtype = wide(scale.device)
    gain = scale.detach().to(dtype).flatten()
    away = None if offset is None else offset.detach().to(dtype).flatten()
    bias = getattr(layer, "bias", None)
    shift = torch.zeros_like(gain) if bias is None else bias.detach().to(dtype)
    if layer.norm is not None:
        norm = folded(layer.norm)
        if not isinstance(norm, Affine):
            raise ConfigError(
                f"its norm {type(layer.norm).__name__} does not say what it is in evaluation; give it folded() -> Affine(scale, "
                "shift), or use BatchNorm"
            )
        factor = norm.scale.to(dtype)
        gain, shift = gain * factor, shift * factor + norm.shift.to(dtype)
        away = None if away is None else away * factor
    said = folded(layer.activation)
    if not isinstance(said, Pointwise) or (
        # A channel of torch's PReLU is dimension 1, which is no channel in a linear layer's output.
        isinstance(layer, nn.Linear) and isinstance(layer.activation, nn.PReLU) and layer.activation.num_parameters > 1
    ):
        return Folded(gain.float(), shift.float(), _row(away, gain), activation=layer.activation)
    if said.before is not None:
        # The first shift is added where the bias is.
        shift = shift + said.before.detach().to(dtype)
    rise, slope = _row(said.rise, gain), _row(said.slope, gain)
    if rise is not None and slope is None:
        slope = torch.ones_like(rise)
    clamp = None
    if said.low is not None or said.high is not None:
        bounds = (-torch.inf if said.low is None else said.low, torch.inf if said.high is None else said.high)
        clamp = torch.tensor(bounds, device=gain.device)
    return Folded(gain.float(), shift.float(), _row(away, gain), rise, slope, clamp, _row(said.after, gain))
