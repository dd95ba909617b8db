"""The definition in ``bidensify.exact``, read step by step into NumPy loops: latent and packed layers give these bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bidensify.deploy.backends import available_kernels
from bidensify.deploy.freeze import freeze
from bidensify.exact import block_sums
from bidensify.nn import (
    ActivationBinarizer,
    Bypass,
    DistributionAdaptiveBinarizer,
    RPReLU,
    WeightBinarizer,
    make_binary,
)

F32 = np.float32
Array = np.ndarray[Any, np.dtype[Any]]


def in_blocks(values: Array) -> np.float64:
    """Step 1: one row of float32 values."""
    total = np.float64(0)
    for start in range(0, len(values), 64):
        block = np.zeros(64, F32)
        block[: len(values) - start] = values[start : start + 64]
        partial = F32(0)
        for quad, first in enumerate(range(0, 64, 4)):
            found = (block[first] + block[first + 1]) + (block[first + 2] + block[first + 3])
            partial = found if quad == 0 else partial + found
        total += np.float64(partial)
    return total


class Free(WeightBinarizer):
    """Signs of the latent weight under a scale and an offset of its own per output channel."""

    scale: Tensor
    away: Tensor | None

    def __init__(self, scale: Tensor, offset: Tensor | None, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("scale", scale)
        self.register_buffer("away", offset)

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return torch.where(weight.detach() >= 0, 1.0, -1.0), self.scale, self.away


class TwoValues(ActivationBinarizer):
    """A threshold per channel, and two values that are not opposite."""

    def __init__(self, channels: int, planes: int) -> None:
        super().__init__(channels)
        self.planes = planes
        self.b = nn.Parameter(torch.linspace(-0.4, 0.4, channels))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.b.view(1, -1, 1, 1).to(x.dtype), x.new_tensor(-0.3), x.new_tensor(1.1)

    def stored(self) -> dict[str, Tensor]:
        return {"b": self.b, "levels": torch.tensor([-0.3, 1.1])}


def by_hand(layer: Any, x: Array) -> Array:
    """Steps 1 to 7 for a convolution with a BatchNorm, RPReLU and an identity bypass or none; (N, C_out, H', W') float32."""
    n, channels, height, width = x.shape
    weight = layer.latent_weight.detach().numpy()
    scale, offset = layer.weight_binarizer.scale.numpy(), layer.weight_binarizer.away
    outs, per_group, kh, kw = weight.shape
    # 2: thresholds, scales, signs.
    binarizer = layer.binarizer
    free = isinstance(binarizer, TwoValues)
    beta = np.zeros((n, channels), F32)
    half, middle = np.ones(n, F32), np.zeros(n, F32)
    for i in range(n):
        for c in range(channels):
            shift = F32(binarizer.b.flatten()[c].item())
            if not free:
                mean = F32(in_blocks(x[i, c].ravel()) / (height * width))
                shift = F32(binarizer.k.flatten()[c].item()) * mean + shift
            beta[i, c] = shift
        if free:
            low, high = F32(-0.3), F32(1.1)
            half[i], middle[i] = (high - low) / F32(2), (high + low) / F32(2)
        else:
            rows = [in_blocks(np.abs(x[i, c].ravel() - beta[i, c])) for c in range(channels)]
            distance = np.sum(np.array(rows)) / (channels * height * width)
            a = np.float64(binarizer.a.item())
            half[i] = F32(np.exp(a * (distance - 1)) if binarizer.planes == 1 else 1.248 * np.exp(a) * distance)
    signs = np.where(x >= beta[:, :, None, None], 1, -1)
    if binarizer.planes == 2:
        for i, c, row, column in np.ndindex(x.shape):
            first = signs[i, c, row, column]
            second = 1 if x[i, c, row, column] >= beta[i, c] + F32(first) * half[i] else -1
            signs[i, c, row, column] = 2 * first + second
        half = half / F32(2)
    # 4: the norm, in float64.
    norm, activation = layer.norm, layer.activation
    gain = norm.weight.detach().double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    bias = norm.bias.detach().double() - norm.running_mean.double() * gain
    if layer.bias is not None:
        bias = layer.bias.detach().double() * gain + bias
    bias = bias + activation.bias_in.detach().double()
    factor = (torch.from_numpy(scale).double() * gain).float().numpy()
    away = None if offset is None else (offset.double() * gain).float().numpy()
    shift = bias.float().numpy()
    slope, post = activation.slope.detach().numpy(), activation.bias_out.detach().numpy()
    # 3, 5, 6, 7: each output by itself.
    (sh, sw), (ph, pw), (dh, dw) = layer.stride, layer.padding, layer.dilation
    tall = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    wide = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    y: Array = np.zeros((n, outs, tall, wide), F32)
    for i, o, row, column in np.ndindex(y.shape):
        first = o // (outs // layer.groups) * per_group
        dot = window = ones = taps = 0
        for c, u, v in np.ndindex(per_group, kh, kw):
            r, s = row * sh - ph + u * dh, column * sw - pw + v * dw
            if 0 <= r < height and 0 <= s < width:
                sign = 1 if weight[o, c, u, v] >= 0 else -1
                dot += int(signs[i, first + c, r, s]) * sign
                window += int(signs[i, first + c, r, s])
                ones += sign
                taps += 1
        value = F32(dot) * (factor[o] * half[i]) + shift[o]
        other = x[i, o, row, column] if layer.bypass is not None else None
        if free:
            term = (F32(ones) * middle[i]) * factor[o]
            other = term if other is None else other + term
        if away is not None:
            both: Any = F32(window) * half[i]
            if free:
                both = both + F32(taps) * middle[i]
            term = both * away[o]
            other = term if other is None else other + term
        if other is not None:
            value = value + other
        y[i, o, row, column] = (value if value > 0 else value * slope[o]) + post[o]
    return y


@st.composite
def layers(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A binary convolution with random parameters, and an input."""
    groups = draw(st.sampled_from([1, 1, 2]))
    channels = groups * draw(st.integers(1, 9))
    same = draw(st.booleans())
    outs = channels if same else groups * draw(st.integers(1, 7))
    geometry = (3, 1, 1, 1) if same else draw(st.sampled_from([(1, 1, 0, 1), (3, 2, 1, 1), (2, 1, 1, 2), (3, 1, 0, 1)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))

    def random(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    kernel, stride, padding, dilation = geometry
    layer: Any = nn.Conv2d(channels, outs, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    layer.__class__ = make_binary(nn.Conv2d)
    planes = draw(st.sampled_from([1, 2]))
    two_values = draw(st.booleans())
    binarizer: Any = (
        TwoValues(channels, planes) if two_values else DistributionAdaptiveBinarizer(channels, planes=planes)
    )
    layer.install(
        binarizer=binarizer,
        weight_binarizer=Free(random(outs, low=0.1), random(outs) if draw(st.booleans()) else None, groups=groups),
        norm=nn.BatchNorm2d(outs),
        bypass=Bypass(channels, outs, kernel, stride, padding, dilation) if same and draw(st.booleans()) else None,
        activation=RPReLU(outs),
    )
    with torch.no_grad():
        for name, value in layer.named_parameters():
            value.copy_(random(*value.shape, low=-0.5, high=0.5) if name != "binarizer.a" else torch.tensor(0.4))
        layer.norm.running_mean.copy_(random(outs))
        layer.norm.running_var.copy_(random(outs, low=0.5, high=2.0))
    size = (draw(st.integers(3, 9)), draw(st.integers(3, 10)))
    return layer.eval(), random(draw(st.integers(1, 2)), channels, *size, low=-2.0, high=2.4)


@settings(max_examples=40, deadline=None)
@given(layers())
def test_layers_are_the_definition_to_the_bit(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    want = torch.from_numpy(by_hand(layer, x.numpy()))
    with torch.no_grad():
        assert torch.equal(layer(x), want)
        for kernel in available_kernels():
            assert torch.equal(freeze(layer, kernel=kernel)(x), want), kernel


@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 200])
def test_sums_are_taken_in_blocks(length: int) -> None:
    values = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(length)) * 1e3
    want = [[in_blocks(row.numpy()) for row in rows] for rows in values]
    assert block_sums(values).tolist() == np.array(want).tolist()
