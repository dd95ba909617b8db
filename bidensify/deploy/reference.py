"""The packed operator in plain PyTorch: bits are unpacked to run. Every device, any dtype; what kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bidensify.deploy.bits import signs_from_tiles
from bidensify.deploy.spec import PackedSpec
from bidensify.exact import Folded, binarize, forward
from bidensify.nn import Bypass

__all__ = ["convolve", "from_tokens", "make_bypass", "packed_reference", "tokens", "whole"]


@lru_cache(maxsize=4096)
def make_bypass(spec: PackedSpec) -> Bypass:
    """The bypass of a packed layer (it has no parameters)."""
    return Bypass(
        spec.in_channels,
        spec.out_channels,
        spec.kernel,
        spec.stride,
        spec.bypass_padding,
        spec.dilation,
        transposed=spec.kind == "conv_transpose",
    )


def convolve(x: Tensor, signs: Tensor, spec: PackedSpec) -> Tensor:
    """The bare convolution of x (N, C_in, H, W) with ``signs`` of ``spec.weight_shape``, padded taps contributing 0."""
    if spec.kind == "conv_transpose":
        out, per_group, kh, kw = spec.weight_shape
        weight = signs.view(spec.groups, out // spec.groups, per_group, kh, kw).transpose(1, 2).flatten(0, 1)
        top, left, _, _ = spec.padding
        return F.conv_transpose2d(
            x, weight, None, spec.stride, (top, left), spec.output_padding, spec.groups, spec.dilation
        )
    top, left, bottom, right = spec.pads(x.shape[2], x.shape[3])
    # Whether pads that depend on the size are even is no question to a program of any size.
    if not spec.same and (top, left) == (bottom, right):
        return F.conv2d(x, signs, None, spec.stride, (top, left), spec.dilation, spec.groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), signs, None, spec.stride, 0, spec.dilation, spec.groups)


class _PackedSums:
    """``bidensify.exact.Sums`` of unpacked bits."""

    def __init__(self, weight: Tensor, spec: PackedSpec) -> None:
        self.weight, self.spec = weight, spec

    def _sums(self, signs: Tensor, weight: Tensor) -> Tensor:
        y = convolve(signs, weight, self.spec)
        # A transform (Winograd, FFT) may stand behind the convolution elsewhere: its sums are integers to rounding.
        return y if y.device.type in ("cpu", "meta") else torch.round(y)

    def dot(self, signs: Tensor) -> Tensor:
        """See ``Sums``."""
        return self._sums(signs, self.weight)

    def window(self, signs: Tensor) -> Tensor:
        """See ``Sums``."""
        return self._sums(signs, torch.ones_like(self.weight))


def packed_reference(
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: PackedSpec,
    thresholds: Tensor | None = None,
    levels: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A packed layer, as ``bidensify.exact`` defines it.

    Args:
        x: (N, C_in, H, W).
        tiles: int32 of ``spec.tiles_shape``.
        side: (``spec.side_length``,) float32.
        spec: the layer.
        thresholds: (N, C_in) of a custom binarizer, else None.
        levels: (N, 2) low and high values of a custom binarizer, else None.
        residual: (N, C_out, H', W') added where the bypass is, else None.

    Returns:
        (N, C_out, H', W') in the dtype of ``x``, channels_last.
    """
    part = {name: side[start : start + length] for name, (start, length) in spec.layout.items()}
    bits = binarize(x, part, thresholds, levels, planes=spec.planes, kernels=False)
    sums = _PackedSums(signs_from_tiles(tiles, spec), spec)
    dot = sums.dot(bits.signs)
    signal = None
    if spec.bypass:
        signal = make_bypass(spec).exact(x.float(), (dot.shape[2], dot.shape[3]))
    if residual is not None:
        signal = residual.float() if signal is None else signal + residual.float()
    optional: dict[str, Any] = {name: part.get(name) for name in ("offset", "rise", "slope", "clamp", "post")}
    after = Folded(part["scale"], part["bias"], **optional)
    return forward(bits, dot, sums, after, signal, signal_last=spec.bypass_last, dtype=x.dtype, kernels=False)


def tokens(x: Tensor) -> Tensor:
    """(N, ..., C) as the image (N, C, T, 1) that it is to a 1x1 convolution."""
    return x.reshape(x.shape[0], -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def from_tokens(y: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``tokens``: (N, C', T, 1) -> (N, ..., C') with the sizes of ``like`` between."""
    return y.permute(0, 2, 3, 1).reshape(*like.shape[:-1], y.shape[1])


def whole(parts: Sequence[Tensor], up: Sequence[int]) -> Tensor:
    """The input that lies in parts."""
    made = []
    for x, times in zip(parts, up, strict=True):
        if times != 1:
            n, c, h, w = x.shape
            x = x[:, :, :, None, :, None].expand(n, c, h, times, w, times).reshape(n, c, h * times, w * times)
        made.append(x)
    return made[0] if len(made) == 1 else torch.cat(made, 1)
