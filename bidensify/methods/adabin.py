"""AdaBin: Improving Binary Neural Networks with Adaptive Binary Sets (Tu et al., ECCV 2022).

Weights: w_b = alpha_o * sign((w - beta_o) / alpha_o) + beta_o with beta_o = mean w and alpha_o = sqrt(mean (w - beta_o)^2) per
output channel, nothing detached; the sign has IR-Net's estimator k t (1 - tanh(t u)^2) with IR-Net's schedule.
Activations: alpha * (sign((x - beta) / alpha) + beta), alpha and beta learned per layer, 1 and 0 at first: two values
alpha * beta - |alpha| and alpha * beta + |alpha|, threshold beta. With u = x - beta and p = 2 max(0, 1 - |u / alpha|):
dx = g p;  d alpha = sum g (sign(u / alpha) + beta - u / alpha * p);  d beta = sum g (alpha - p).

Around a layer the authors have a shortcut at each convolution, y = Maxout(BatchNorm(conv) + x) where x has the output's shape
(else average pooling and a 1x1 convolution in full precision, which stays). Maxout has two learned slopes per channel,
rise * relu(x) - slope * relu(-x), 1 and 0.25 at first.

Where we differ: alpha_o divides by the weights of the group, the authors' code by those of all input channels. Of one weight, or
of equal ones, alpha_o is mean |w| and beta_o 0: the same value, without 0 / 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidensify.config import BidensifyConfig
from bidensify.methods.around import downsampling_shortcut
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import ActivationBinarizer, Pointwise, TransformedWeight, straight_through, threshold_sign


class AdaptiveSet(ActivationBinarizer):
    """alpha * (beta - 1) and alpha * (beta + 1), whichever is larger where x >= beta."""

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__(channels, dim)
        self.alpha = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.zeros(1))

    def _values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        alpha, beta = self.alpha.detach().to(dtype), self.beta.detach().to(dtype)
        return beta, alpha * beta - alpha.abs(), alpha * beta + alpha.abs()

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._values(x.dtype)

    def stored(self) -> dict[str, Tensor] | None:
        beta, low, high = self._values(torch.float32)
        return {"b": beta.expand(self.channels), "levels": torch.cat([low, high])}

    def binarize(self, x: Tensor) -> Tensor:
        threshold, low, high = self.codes(x)
        alpha, beta = self.alpha.to(x.dtype), self.beta.to(x.dtype)
        signs = threshold_sign((x - beta) / alpha, x.new_zeros(()), x.new_ones(()))
        return straight_through(torch.where(x.detach() >= threshold, high, low), alpha * (signs + beta))


class CentredSet(TransformedWeight):
    """alpha_o * sign((w - beta_o) / alpha_o) + beta_o."""

    def transform(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        mean, deviation, differ = self.moments(weight)
        alpha = torch.where(differ, deviation, self.rows(weight).abs().mean(1))
        return (weight - self.like(mean, weight)) / self.like(deviation, weight), alpha, mean


class Maxout(nn.Module):
    """rise * relu(x) - slope * relu(-x), per channel. Shape: (N, C, ...) or (..., C), kept."""

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.rise = nn.Parameter(torch.ones(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def folded(self) -> Pointwise:
        """Two slopes."""
        return Pointwise(rise=self.rise, slope=self.slope)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) if self.dim == -1 else (-1, *([1] * (x.dim() - 2)))
        return self.rise.to(x.dtype).view(shape) * x.relu() - self.slope.to(x.dtype).view(shape) * (-x).relu()


@register_method(
    "adabin", activation=Maxout, bypass="same", keeps=downsampling_shortcut, citation="Tu et al., ECCV 2022"
)
def adabin(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """Two learned values on activations, two fitted ones per output channel on weights."""
    return LayerParts(
        binarizer=AdaptiveSet(spec.in_channels, spec.dim),
        weight_binarizer=CentredSet(transposed=spec.transposed, groups=spec.groups, ste="tanh"),
    )
