"""The packed operator in plain PyTorch: bits are unpacked to run. Every device, any dtype; what kernels are tested against."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bidensify.nn import Bypass, arithmetic
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
    """y = activation(scale * conv(binarize(x), signs) + bias + bypass(x)), as ``bidensify.nn.arithmetic`` defines it.

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
    if thresholds is not None:
        beta = thresholds.float()
        if spec.shift:
            beta = beta + part["b"]
        beta = beta.to(x.dtype).float()
    else:
        beta = arithmetic.thresholds(x, part.get("k"), part.get("b"))
    half = middle = None
    if levels is not None or spec.levels:
        pairs = levels.float() if levels is not None else part["levels"].view(1, 2)
        half, middle = (pairs[:, 1] - pairs[:, 0]) / 2, (pairs[:, 1] + pairs[:, 0]) / 2
    elif spec.alpha:
        half = arithmetic.activation_scale(x, beta, part["a"])
    signs = signs_from_tiles(tiles, spec)
    bits = arithmetic.plus_minus(x.float() >= beta[:, :, None, None])
    y = convolve(bits, signs, spec)
    if y.device.type not in ("cpu", "meta"):
        # A transform (Winograd, FFT) may stand behind the convolution there: its sums are integers to rounding.
        y = torch.round(y)
    extra = None
    if spec.bypass:
        extra = arithmetic.bypass_signal(make_bypass(spec), x.float(), (y.shape[2], y.shape[3]))
    if residual is not None:
        extra = residual.float() if extra is None else extra + residual.float()
    if middle is not None:
        sums = convolve(torch.ones_like(bits[:1]), signs, spec)
        more = (sums * middle.view(-1, 1, 1, 1)) * part["scale"].view(1, -1, 1, 1)
        extra = more if extra is None else extra + more
    y = arithmetic.finish(y, half, extra, part["scale"], part["bias"], part.get("slope"), part.get("post"))
    return y.to(x.dtype)
