"""Steps 2, 5, 6 and 7 of the definition (see ``bidensify.exact``), as torch operations on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bidensify.errors import ConfigError
from bidensify.exact.fold import Folded
from bidensify.exact.sums import block_sums

__all__ = [
    "BEST_STEP",
    "activation_scale",
    "check_flips",
    "finish",
    "fusion_down_in_order",
    "own_codes",
    "plus_minus",
    "thresholds",
]

# The best step of four levels of a Gaussian, in its mean distances.
BEST_STEP = 1.248


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


def activation_scale(x: Tensor, beta: Tensor, a: Tensor, planes: int = 1) -> Tensor:
    """alpha = exp(a * (mean |x - beta| - 1)) per sample; with two planes the step 1.248 * exp(a) * mean |x - beta|.

    Args:
        x: (N, C, H, W).
        beta: (N, C) or (1, C) float32.
        a: one element.
        planes: bit planes of the activations.

    Returns:
        (N,) float32.
    """
    total = block_sums((x.float() - beta[:, :, None, None]).abs().flatten(2)).sum(1)
    mean = total / (x.shape[1] * x.shape[2] * x.shape[3])
    if planes == 2:
        return (BEST_STEP * torch.exp(a.to(total.dtype)) * mean).float().reshape(-1)
    return torch.exp(a.to(total.dtype) * (mean - 1)).float().reshape(-1)


def plus_minus(flags: Tensor) -> Tensor:
    """+1 where ``flags`` holds, else -1; float32."""
    # Numbers in place of the tensors would be copied to a GPU at each call, and the CPU waits for copies.
    one = torch.ones((), device=flags.device)
    return torch.where(flags, one, -one)


def own_codes(binarizer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A part's own thresholds and values, as its ``codes`` says them.

    Args:
        binarizer: an activation binarizer; with ``dim=-1`` it is asked with (N, H * W, C).
        x: (N, C, H, W).

    Returns:
        (N, C) thresholds and (N, 2) low and high values, float32.

    Raises:
        ConfigError: a threshold that varies over space, or values that are not one pair per sample.
    """
    n, c = x.shape[:2]
    name = type(binarizer).__name__
    with torch.no_grad():
        beta, low, high = binarizer.codes(x if binarizer.dim == 1 else x.permute(0, 2, 3, 1).flatten(1, 2))
    if beta.dim() > 2 and any(size != 1 for size in (beta.shape[2:] if binarizer.dim == 1 else beta.shape[1:-1])):
        raise ConfigError(
            f"{name}: a threshold of shape {tuple(beta.shape)} varies over space; packed layers take one per channel"
        )
    beta = beta.reshape(beta.shape[0], -1) if beta.dim() > 2 else beta.reshape(1, -1)
    for value in (low, high):
        if value.numel() not in (1, n):
            raise ConfigError(
                f"{name}: an activation value of shape {tuple(value.shape)} is not one per sample; it cannot be packed"
            )
    levels = torch.stack([low.reshape(-1).expand(n), high.reshape(-1).expand(n)], 1)
    return beta.expand(n, c).float().contiguous(), levels.float().contiguous()


def check_flips(binarizer: Any, lopsided: bool, offset: Tensor | None) -> None:
    """Raises ConfigError where channels that are turned round cannot be had by turning their weight bits.

    Args:
        binarizer: an activation binarizer whose ``flips()`` is not None.
        lopsided: its two values are not one value with either sign.
        offset: of the weights, or None.
    """
    if lopsided or offset is not None:
        raise ConfigError(
            f"{type(binarizer).__name__} turns the values of some channels round, which packed weights take over by their "
            f"bits; {'its two values are not -alpha and alpha' if lopsided else 'these weights have an offset'}: keep the layer"
        )


def fusion_down_in_order(x: Tensor, groups: int) -> Tensor:
    """Fusion-down of (N, C, H, W) to ``groups`` channels, members added in the order of their channels; channels_last."""
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


def finish(dot: Tensor, half: Tensor | None, extra: Tensor | None, late: Tensor | None, after: Folded) -> Tensor:
    """What follows the integer sums: steps 5 to 7.

    Args:
        dot: (N, C_out, H', W') float32.
        half: (N,) float32, or None for 1.
        extra: (N, C_out, H', W') float32 that is added before the activation, or None.
        late: the same, added behind it, or None.
        after: what is constant per output channel.

    Returns:
        (N, C_out, H', W') float32.
    """

    def shaped(parameter: Tensor) -> Tensor:
        return parameter.view(1, -1, 1, 1)

    factor = shaped(after.scale) if half is None else shaped(after.scale) * half.view(-1, 1, 1, 1)
    # Out of place: this is also what the operator decomposes into for export.
    y = dot * factor + shaped(after.bias)
    if extra is not None:
        y = y + extra
    if after.slope is not None:
        y = torch.where(y > 0, y if after.rise is None else y * shaped(after.rise), y * shaped(after.slope))
    if after.clamp is not None:
        low, high = after.clamp
        y = torch.where(y > high, high, y)
        y = torch.where(y < low, low, y)
    if after.post is not None:
        y = y + shaped(after.post)
    return y if late is None else y + late
