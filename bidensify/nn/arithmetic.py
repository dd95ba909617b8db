"""The arithmetic of evaluation, which latent layers, packed layers and kernels share bit for bit.

A sign flips where an activation crosses its threshold, and one flipped sign moves many others behind it: a network of
binary layers gives the same answer twice only if every rounding is the same. So this is a definition, for any memory
format, number of threads and instruction set (numbers are float32 where nothing else is said, each operation rounds):

* sums over space: blocks of 64 consecutive positions, in a block quads (x0 + x1) + (x2 + x3) of consecutive positions
  added one after the other, a missing position counting as 0; block sums are added in float64, where their order does
  not show;
* beta = k * mean + b, rounded to the input's dtype; distance: the same blocks of |x - beta|, added over channels too;
  alpha = exp(a * (mean distance - 1)) in float64, rounded once;
* dot = the integer sum of products of signs, padded positions contributing 0;
* BatchNorm, the weights' scale and what else is constant per output channel: ``fold``, in float64, rounded once;
* y = dot * (scale * half) + bias, where an input is middle +- half (``alpha`` is half); then the full-precision signals,
  summed first: ((bypass + residual) + (sum of signs * middle) * scale); then y > 0 ? y : y * slope; then + post.

Source of the layer itself: BiDense (arXiv 2411.10346), eq. 1-6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidensify.errors import ConfigError
from bidensify.nn.activation import RPReLU
from bidensify.nn.binarizer import ActivationBinarizer
from bidensify.nn.bypass import Bypass

if TYPE_CHECKING:
    from bidensify.nn.layer import BinaryLayer

__all__ = [
    "BLOCK",
    "Folded",
    "activation_scale",
    "any_order",
    "block_sums",
    "bypass_signal",
    "codes",
    "finish",
    "fold",
    "own_signal",
    "thresholds",
]

BLOCK = 64


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


# Set while the arithmetic is written out for another runtime, which has an order of its own.
_any_order: ContextVar[bool] = ContextVar("any_order", default=False)


@contextmanager
def any_order() -> Iterator[None]:
    """Within it sums are taken in whatever order ``torch.sum`` likes: a graph of a few nodes, equal to rounding."""
    token = _any_order.set(True)
    try:
        yield
    finally:
        _any_order.reset(token)


def block_sums(x: Tensor) -> Tensor:
    """Sums over the last dimension in the order that is defined above.

    Args:
        x: (N, C, P) float32.

    Returns:
        (N, C) float64 (float32 on a device without it).
    """
    if _any_order.get():
        return x.sum(-1)
    padded = F.pad(x, (0, -x.shape[2] % BLOCK))
    quads = padded.reshape(*x.shape[:2], -1, BLOCK // 4, 4)
    sums = (quads[..., 0] + quads[..., 1]) + (quads[..., 2] + quads[..., 3])
    blocks = sums[..., 0]
    for i in range(1, BLOCK // 4):
        blocks = blocks + sums[..., i]
    total: Tensor = blocks.to(_wide(x.device)).sum(-1)
    return total


def thresholds(x: Tensor, k: Tensor | None, b: Tensor | None) -> Tensor:
    """beta = k * mean(x) + b per sample and channel.

    Args:
        x: (N, C, H, W).
        k: (C,) float32, or None for a threshold that does not depend on the mean.
        b: (C,) float32, or None for 0.

    Returns:
        (N, C) or (1, C) float32, rounded to the dtype of ``x``.
    """
    beta = x.new_zeros((1, x.shape[1]), dtype=torch.float32)
    if k is not None:
        mean = (block_sums(x.float().flatten(2)) / (x.shape[2] * x.shape[3])).float()
        beta = k * mean
    if b is not None:
        beta = beta + b
    return beta.to(x.dtype).float()


def activation_scale(x: Tensor, beta: Tensor, a: Tensor) -> Tensor:
    """alpha = exp(a * (mean |x - beta| - 1)) per sample.

    Args:
        x: (N, C, H, W).
        beta: (N, C) or (1, C) float32.
        a: one element.

    Returns:
        (N,) float32.
    """
    total = block_sums((x.float() - beta[:, :, None, None]).abs().flatten(2)).sum(1)
    mean = total / (x.shape[1] * x.shape[2] * x.shape[3])
    return torch.exp(a.to(total.dtype) * (mean - 1)).float().reshape(-1)


def codes(binarizer: ActivationBinarizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """A method's own thresholds and values, as ``binarizer.codes`` says them.

    Args:
        binarizer: any activation binarizer; with ``dim=-1`` it is asked with (N, H * W, C).
        x: (N, C, H, W).

    Returns:
        (N, C) thresholds and (N, 2) low and high values, float32.

    Raises:
        ConfigError: a threshold that varies over space, or values that are not one pair per sample.
    """
    n, c = x.shape[:2]
    with torch.no_grad():
        beta, low, high = binarizer.codes(x if binarizer.dim == 1 else x.permute(0, 2, 3, 1).flatten(1, 2))
    if beta.dim() > 2 and any(size != 1 for size in (beta.shape[2:] if binarizer.dim == 1 else beta.shape[1:-1])):
        raise ConfigError(
            f"a threshold of shape {tuple(beta.shape)} varies over space; packed layers take one per channel"
        )
    beta = beta.reshape(beta.shape[0], -1) if beta.dim() > 2 else beta.reshape(1, -1)
    for value in (low, high):
        if value.numel() not in (1, n):
            raise ConfigError(
                f"an activation value of shape {tuple(value.shape)} is not one per sample; it cannot be packed"
            )
    levels = torch.stack([low.reshape(-1).expand(n), high.reshape(-1).expand(n)], 1)
    return beta.expand(n, c).float().contiguous(), levels.float().contiguous()


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
    wide = _wide(device)
    norm: Any = layer.norm
    bias = getattr(layer, "bias", None)
    out = int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]
    scale = torch.ones(out, dtype=wide, device=device)
    if weight_scale is not None:
        scale = weight_scale.detach().to(wide).flatten()
    shift = torch.zeros_like(scale) if bias is None else bias.detach().to(wide)
    if norm is not None:
        if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
            raise ConfigError(
                f"its norm {type(norm).__name__} has no running statistics to fold; use BatchNorm with "
                "track_running_stats=True"
            )
        gain = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
        if norm.weight is not None:
            gain = gain * norm.weight.detach().to(wide)
        shift = (shift - norm.running_mean.to(wide)) * gain
        if norm.bias is not None:
            shift = shift + norm.bias.detach().to(wide)
        scale = scale * gain
    activation: nn.Module | None = layer.activation
    slope = post = None
    if type(activation) is RPReLU:
        # The first shift is added where the bias is.
        shift = shift + activation.bias_in.detach().to(wide)
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


def _fusion_down(x: Tensor, groups: int) -> Tensor:
    """``fusion_down`` of (N, C, H, W) with members added in the order of their channels; channels_last."""
    channels = x.shape[1]
    if groups == channels:
        return x
    last = x.permute(0, 2, 3, 1)
    whole, larger = divmod(channels, groups)
    total = last[..., :groups]
    for start in range(groups, whole * groups, groups):
        total = total + last[..., start : start + groups]
    if larger:
        total = torch.cat([total[..., :larger] + last[..., whole * groups :], total[..., larger:]], -1)
    counts = whole + (torch.arange(groups, device=x.device) < larger).to(x.dtype)
    return (total / counts).permute(0, 3, 1, 2)


def bypass_signal(bypass: Bypass, x: Tensor, size: Sequence[int]) -> Tensor:
    """``bypass(x, size)`` in the order of evaluation: averages over space, then over channels.

    Args:
        bypass: interleaved; one over the last dimension is taken for the pointwise one that it is.
        x: (N, C_in, H, W) float32.
        size: (H', W').

    Returns:
        (N, C_out, H', W') float32; ``x`` itself where nothing is to be done.
    """
    channels, out = bypass.in_channels, bypass.out_channels
    averaged = bypass.dim == 1 and bypass.averages(x.shape[-2:], size)
    if out < channels and not averaged:
        # Picking positions commutes with averaging channels, and less is picked this way.
        x = _fusion_down(x, out)
    if bypass.dim == 1:
        x = bypass.to_size(x, size)
    if out < channels:
        return _fusion_down(x, out)
    copies, rest = divmod(out, channels)
    if copies == 1 and rest == 0:
        return x
    return torch.cat([x] * copies + ([_fusion_down(x, rest)] if rest else []), 1)


def own_signal(bypass: nn.Module, x: Tensor, size: Sequence[int]) -> Tensor:
    """``bypass(x, size)`` of a bypass that kernels do not compute.

    Args:
        bypass: a ``Bypass`` of another grouping, or a module of its form.
        x: (N, C_in, H, W).
        size: (H', W').

    Returns:
        (N, C_out, H', W') in the dtype of ``x``.
    """
    if getattr(bypass, "dim", 1) == -1:
        side: Tensor = bypass(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    else:
        side = bypass(x, size)
    return side.to(x.dtype)


def finish(
    dot: Tensor,
    half: Tensor | None,
    extra: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    slope: Tensor | None,
    post: Tensor | None,
) -> Tensor:
    """What follows the dot products, see the module.

    Args:
        dot: (N, C_out, H', W') float32.
        half: (N,) float32, or None for 1.
        extra: (N, C_out, H', W') float32 that is added before the activation, or None.
        scale, bias, slope, post: as in ``Folded``.

    Returns:
        (N, C_out, H', W') float32.
    """
    shape = (1, -1, 1, 1)
    factor = scale.view(shape) if half is None else scale.view(shape) * half.view(-1, 1, 1, 1)
    # Out of place: this is also what the operator decomposes into for export.
    y = dot * factor + bias.view(shape)
    if extra is not None:
        y = y + extra
    if slope is not None:
        y = torch.where(y > 0, y, y * slope.view(shape))
    if post is not None:
        y = y + post.view(shape)
    return y
