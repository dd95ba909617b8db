"""IR-Net: Forward and Backward Information Retention for Accurate Binary Neural Networks (Qin et al., CVPR 2020).

Weights, Libra parameter binarization: v = (w - mean_o) / std_o per output channel, std_o unbiased, gradient through
both; w_b = 2^round(log2(mean |v|)) * sign(v), the power of two without gradient.
Activations: sign(x).
Both signs have the error decay estimator as gradient, k t (1 - tanh(t u)^2) with t = 10^(-3 + 4 progress) and
k = max(1 / t, 1): the identity at the beginning of training, the sign's own derivative at its end.

Around a layer the authors have a shortcut at each convolution, y = Hardtanh(BatchNorm(conv) + x) where x has the output's shape;
where it has not, a 1x1 convolution in full precision is the shortcut, which stays.

Where we differ: an output channel that one weight feeds, or equal ones, is not standardised (0 / 0): v = w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bidensify.config import BidensifyConfig
from bidensify.methods.around import downsampling_shortcut, hardtanh
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import SignBinarizer, TransformedWeight


class LibraWeight(TransformedWeight):
    """2^round(log2(mean |v|)) * sign(v)."""

    def transform(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        mean, deviation, _ = self.moments(weight, correction=1)
        v = (weight - self.like(mean, weight)) / self.like(deviation, weight)
        size = self.rows(v.detach()).abs().mean(1)
        return v, torch.exp2(torch.log2(size).round()), None


@register_method(
    "irnet", activation=hardtanh, bypass="same", keeps=downsampling_shortcut, citation="Qin et al., CVPR 2020"
)
def irnet(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """sign with the scheduled tanh estimator on activations and on standardised weights."""
    return LayerParts(
        binarizer=SignBinarizer(spec.in_channels, spec.dim, ste="tanh"),
        weight_binarizer=LibraWeight(transposed=spec.transposed, groups=spec.groups, ste="tanh"),
    )
