"""The packed operator in plain PyTorch: bits are unpacked to run. Every device, any dtype; what kernels are tested against."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bidensify.nn import Bypass
from bidensify.runtime.bits import signs_from_tiles
from bidensify.runtime.spec import LayerSpec

__all__ = ["convolve", "make_bypass", "packed_reference"]


@lru_cache(maxsize=4096)
def make_bypass(spec: LayerSpec) -> Bypass:
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


def convolve(x: Tensor, signs: Tensor, spec: LayerSpec) -> Tensor:
    """The bare convolution of x (N, C_in, H, W) with ``signs`` of ``spec.weight_shape``, padded taps contributing 0."""
    if spec.kind == "conv_transpose":
        out, per_group, kh, kw = spec.weight_shape
        weight = signs.view(spec.groups, out // spec.groups, per_group, kh, kw).transpose(1, 2).flatten(0, 1)
        top, left, _, _ = spec.padding
        return F.conv_transpose2d(
            x, weight, None, spec.stride, (top, left), spec.output_padding, spec.groups, spec.dilation
        )
    top, left, bottom, right = spec.pads(x.shape[2], x.shape[3])
    if (top, left) == (bottom, right):
        return F.conv2d(x, signs, None, spec.stride, (top, left), spec.dilation, spec.groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), signs, None, spec.stride, 0, spec.dilation, spec.groups)


def packed_reference(
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: LayerSpec,
    thresholds: Tensor | None = None,
    levels: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = activation(scale * conv(binarize(x), signs) + bias + bypass(x)).

    Args:
        x: (N, C_in, H, W).
        tiles: int32 of ``spec.tiles_shape``.
        side: (``spec.side_length``,) float32.
        spec: the layer.
        thresholds: (N, C_in) of a custom binarizer, else None.
        levels: (N, 2) low and high values of a custom binarizer, else None.
        residual: (N, C_out, H', W') added before the activation, else None.

    Returns:
        (N, C_out, H', W') in the dtype of ``x``.
    """
    part = {name: side[start : start + length] for name, (start, length) in spec.layout.items()}
    channels = (1, -1, 1, 1)
    xf = x.float()
    beta = xf.new_zeros((1, 1, 1, 1))
    if thresholds is not None:
        beta = thresholds.float()[:, :, None, None]
    if spec.mean_threshold:
        beta = part["k"].view(channels) * xf.mean((2, 3), keepdim=True)
    if spec.shift:
        beta = beta + part["b"].view(channels)
    # The latent layer rounds its threshold to the dtype of its input before it compares.
    beta = beta.to(x.dtype).float()
    low, high = xf.new_full((1, 1, 1, 1), -1.0), xf.new_ones((1, 1, 1, 1))
    if levels is not None:
        low, high = levels.float()[:, 0, None, None, None], levels.float()[:, 1, None, None, None]
    elif spec.levels:
        low, high = part["levels"][0].view(1, 1, 1, 1), part["levels"][1].view(1, 1, 1, 1)
    elif spec.alpha:
        distance = (xf - beta).abs().mean((1, 2, 3), keepdim=True)
        high = torch.exp(part["a"] * (distance - 1))
        low = -high
    signs = signs_from_tiles(tiles, spec)
    bits = torch.where(xf >= beta, 1.0, -1.0)
    y = convolve(bits, signs, spec) * ((high - low) / 2)
    if levels is not None or spec.levels:
        y = y + convolve(torch.ones_like(bits[:1]), signs, spec) * ((high + low) / 2)
    y = y * part["scale"].view(channels) + part["bias"].view(channels)
    if spec.bypass:
        y = y + make_bypass(spec)(xf, y.shape[2:])
    if residual is not None:
        y = y + residual.float()
    if spec.slope:
        y = torch.where(y > 0, y, y * part["slope"].view(channels))
    if spec.post:
        y = y + part["post"].view(channels)
    return y.to(x.dtype)
