"""The arithmetic of evaluation, which latent layers, packed layers and kernels share bit for bit.

A sign flips where an activation crosses its threshold, and one flipped sign moves many others behind it: a network of
binary layers gives the same answer twice only if every rounding is the same. So this is a definition, for any memory
format, number of threads and instruction set (numbers are float32 where nothing else is said, each operation rounds):

* sums over space: blocks of 64 consecutive positions, in a block quads (x0 + x1) + (x2 + x3) of consecutive positions
  added one after the other, a missing position counting as 0; block sums are added in float64, where their order does
  not show (on a GPU, which has no kernels of its own here, float64 is taken throughout: equal to rounding);
* beta = k * mean + b, rounded to the input's dtype; distance: the same blocks of |x - beta|, added over channels too;
  alpha = exp(a * (mean distance - 1)) in float64, rounded once;
* dot = the integer sum of products of signs, padded positions contributing 0;
* BatchNorm, the weights' scale and what else is constant per output channel: ``fold``, in float64, rounded once;
* y = dot * (scale * half) + bias, where an input is middle +- half (``alpha`` is half); then the full-precision signals,
  summed first: ((bypass + residual) + (sum of signs * middle) * scale); then y > 0 ? y : y * slope; then + post.

Source of the layer itself: BiDense (arXiv 2411.10346), eq. 1-6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bidensify.errors import ConfigError
from bidensify.nn.binarizer import ActivationBinarizer
from bidensify.nn.bypass import Bypass
from bidensify.nn.folding import Folded, fold
from bidensify.nn.sums import BLOCK, any_order, block_sums

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
    "plus_minus",
    "thresholds",
]


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


def plus_minus(flags: Tensor) -> Tensor:
    """+1 where ``flags`` holds, else -1; float32."""
    # Numbers in place of the tensors would be copied to a GPU at each call, and the CPU waits for copies.
    one = torch.ones((), device=flags.device)
    return torch.where(flags, one, -one)


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
