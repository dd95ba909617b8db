"""Bi-Real Net: Enhancing the Performance of 1-bit CNNs (Liu et al., ECCV 2018).

Weights: w_b = s_o * sign(w), s_o = mean |w| per output channel, without gradient; gradient 1[|w| <= 1], not scaled by s_o, as in
the authors' PyTorch code.
Activations: sign(x); gradient 2 max(0, 1 - |x|), the derivative of a piecewise polynomial (eq. 6).

Around a layer the authors have a shortcut at each convolution, y = BatchNorm(conv) + x where x has the output's shape, and no
activation: the sign is the only non-linearity. Where the shape changes, the shortcut is average pooling and a 1x1 convolution
in full precision; so the 1x1 convolution with a stride on a residual network's shortcut stays, and where there is none the
layer has no bypass.

Where we differ: average pooling is not put in front of a network's own strided projection.
"""

from __future__ import annotations

from torch import nn

from bidensify.config import BidensifyConfig
from bidensify.methods.around import downsampling_shortcut, scaled_sign
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import SignBinarizer


def _no_activation(channels: int, dim: int) -> nn.Module:
    return nn.Identity()


@register_method(
    "bireal", activation=_no_activation, bypass="same", keeps=downsampling_shortcut, act_bits=(1, 2),
    citation="Liu et al., ECCV 2018",
)  # fmt: skip
def bireal(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """sign with the polynomial estimator on activations, channel-scaled sign on weights."""
    binarizer = SignBinarizer(spec.in_channels, spec.dim, ste="polynomial", planes=config.act_bits)
    return LayerParts(binarizer, weight_binarizer=scaled_sign(spec))
