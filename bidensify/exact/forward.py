"""One layer, as the definition has it (see ``bidensify.exact``): the same function for latent and for packed layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bidensify.exact import definition
from bidensify.exact.fold import Folded
from bidensify.kernels import evaluation_ops

__all__ = ["Bits", "Sums", "binarize", "forward"]


@dataclass(frozen=True)
class Bits:
    """A binarized input: middle + half * signs.

    Attributes:
        signs: (N, C_in, H, W) float32 of -1 and +1; with two planes 2 s1 + s2, among -3, -1, 1 and 3, and ``half`` is half a
            step.
        half, middle: (N,) float32, or None for 1 and for 0.
    """

    signs: Tensor
    half: Tensor | None = None
    middle: Tensor | None = None


class Sums(Protocol):
    """A bare layer whose weights are all of magnitude 1: integer sums, padded positions contributing 0."""

    def dot(self, signs: Tensor) -> Tensor:
        """(N, C_in, H, W) of small integers -> (N, C_out, H', W'): the sum of their products with the weights' signs."""
        ...

    def window(self, signs: Tensor) -> Tensor:
        """The same with +1 for every weight."""
        ...


def binarize(
    x: Tensor,
    stored: Mapping[str, Tensor],
    thresholds: Tensor | None = None,
    levels: Tensor | None = None,
    *,
    planes: int = 1,
    kernels: bool = True,
) -> Bits:
    """Step 2: the bits of an input.

    Args:
        x: (N, C_in, H, W).
        stored: which of "k", "b" ((C_in,) each), "a" (one element), "levels" ((2,) low and high), float32, the layer has.
        thresholds: (N, C_in) that a part of the method's own has said for ``x``, in place of k * mean; or None.
        levels: (N, 2) low and high values, likewise; or None.
        planes: bit planes of the result.
        kernels: use the kernels of evaluation where they take ``x``: the same bits.
    """
    k, b, a, constant = (stored.get(name) for name in ("k", "b", "a", "levels"))
    if levels is None and constant is not None:
        levels = constant.view(1, 2).expand(x.shape[0], 2)
    plain = thresholds is None and levels is None and k is not None and b is not None
    if plain and kernels and evaluation_ops.evaluates(x):
        signs, alpha = evaluation_ops.codes(x, k, b, a, planes)
        if a is not None or planes == 1:
            return Bits(signs, None if a is None else alpha)
        return Bits(signs, x.new_full((x.shape[0],), 0.5, dtype=torch.float32))
    if thresholds is None:
        beta = definition.thresholds(x, k, b)
    else:
        beta = (thresholds.float() if b is None else thresholds.float() + b).to(x.dtype).float()
    half = middle = None
    if levels is not None:
        low, high = levels.float().unbind(1)
        half, middle = (high - low) / 2, (high + low) / 2
    elif a is not None:
        half = definition.activation_scale(x, beta, a, planes)
    wide, threshold = x.float(), beta[:, :, None, None]
    first = wide >= threshold
    signs = definition.plus_minus(first)
    if planes == 1:
        return Bits(signs, half, middle)
    step = torch.ones(x.shape[0], device=x.device) if half is None else half
    shift = step.view(-1, 1, 1, 1)
    second = wide >= torch.where(first, threshold + shift, threshold - shift)
    return Bits(2 * signs + definition.plus_minus(second), step / 2, middle)


def forward(
    bits: Bits,
    dot: Tensor,
    sums: Sums,
    after: Folded,
    signal: Tensor | None,
    *,
    signal_last: bool = False,
    dtype: torch.dtype = torch.float32,
    kernels: bool = True,
) -> Tensor:
    """Steps 5 to 7.

    Args:
        bits: the binarized input.
        dot: ``sums.dot(bits.signs)``: 2 P1 + P2 with two planes.
        sums: the bare layer.
        after: what is constant per output channel.
        signal: (N, C_out, H', W') float32, bypass + residual, or None.
        signal_last: it joins behind the activation.
        dtype: of the result.
        kernels: as ``binarize`` has it.

    Returns:
        (N, C_out, H', W') in channels_last.
    """

    def per_sample(value: Tensor) -> Tensor:
        return value.view(-1, 1, 1, 1)

    extra = None if signal_last else signal
    if bits.middle is not None:
        ones = sums.dot(torch.ones_like(bits.signs[:1]))
        extra = _added(extra, (ones * per_sample(bits.middle)) * after.scale.view(1, -1, 1, 1))
    if after.offset is not None:
        window = sums.window(bits.signs)
        if bits.half is not None:
            window = window * per_sample(bits.half)
        if bits.middle is not None:
            window = window + sums.window(torch.ones_like(bits.signs[:1])) * per_sample(bits.middle)
        extra = _added(extra, window * after.offset.view(1, -1, 1, 1))
    late = signal if signal_last else None
    if kernels and late is None and after.rise is None and after.clamp is None:
        return _finish(dot, bits.half, extra, after, dtype)
    y = definition.finish(dot, bits.half, extra, late, after)
    return y.to(dtype).contiguous(memory_format=torch.channels_last)


def _added(extra: Tensor | None, more: Tensor) -> Tensor:
    return more if extra is None else extra + more


def _finish(dot: Tensor, half: Tensor | None, extra: Tensor | None, after: Folded, dtype: torch.dtype) -> Tensor:
    """``definition.finish`` and the rounding to ``dtype``, by a kernel where it takes them."""
    dot = dot.contiguous(memory_format=torch.channels_last)
    extra = None if extra is None else extra.contiguous(memory_format=torch.channels_last)
    if dtype not in (torch.float32, torch.bfloat16) or not evaluation_ops.evaluates(dot):
        return definition.finish(dot, half, extra, None, after).to(dtype)
    out = dot if dtype == torch.float32 else torch.empty_like(dot, dtype=dtype)
    evaluation_ops.finish(dot, half, extra, after.scale, after.bias, after.slope, after.post, out)
    return out
