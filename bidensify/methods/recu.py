"""ReCU: Reviving the Dead Weights in Binary Neural Networks (Xu et al., ICCV 2021).

Weights: w_1 = (w - mean_o) / (sqrt(var_o + 1e-5) / (2 sqrt 2)), var_o unbiased, gradient through both; clamped to [-Q, Q] with
Q = -mean |w_1| ln(2 - 2 tau) over the whole layer, without gradient (the tau-quantile of a Laplace distribution);
w_b = alpha_o * sign(w_1), alpha_o learned; gradient 1 within the clamp. The clamp changes no sign; it is
for the outliers, whose signs hardly ever change.
tau goes from 0.85 to 0.99 with the training's progress p: 0.85 + 0.14 (e^p - 1) / (e - 1).
Activations: sign(x / std) of each sample while training, std unbiased over the whole sample with 1e-5 added to its square,
gradient through it; sign(x) in evaluation, which is the same sign. Gradient 2 max(0, 1 - |u|).

Around a layer the authors have a shortcut at each convolution, y = Hardtanh(BatchNorm(alpha_o conv) + x) where x has the output's
shape; else average pooling with zeros for new channels, or a 1x1 convolution in full precision, which stays.

Where we differ: alpha_o starts at mean |w| of the network's weights, the authors' at random in (0, 1). An output channel that one
weight feeds, or equal ones, is not standardised.
"""

from __future__ import annotations

from math import e, exp, log, sqrt

from torch import Tensor

from bidensify.config import BidensifyConfig
from bidensify.methods.around import downsampling_shortcut, hardtanh
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import LearnedScaleWeight, SignBinarizer, sign, straight_through, threshold_sign


class RevivedWeight(LearnedScaleWeight):
    """alpha_o * sign of the standardised weight, clamped to its tau-quantile."""

    # The quantile, and how many times the mean magnitude it is: a compiled graph takes numbers, not functions of them.
    tau, reach = 0.85, -log(2 - 2 * 0.85)

    def set_progress(self, fraction: float) -> None:
        self.tau = 0.85 + 0.14 * (exp(fraction) - 1) / (e - 1)
        self.reach = -log(2 - 2 * self.tau)

    def transform(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        mean, deviation, _ = self.moments(weight, correction=1)
        gain = 2 * sqrt(2) / (deviation.square() + 1e-5).sqrt()
        standard = (weight - self.like(mean, weight)) * self.like(gain, weight)
        bound = standard.detach().abs().mean() * self.reach
        return standard.clamp(-bound, bound), self.alpha, None


class NormalizedSign(SignBinarizer):
    """sign(x), with the gradient of the normalized sample while training."""

    codes = SignBinarizer.codes
    stored = SignBinarizer.stored

    def binarize(self, x: Tensor) -> Tensor:
        u = x
        if self.training and x[0].numel() > 1:
            u = x / (x.var(tuple(range(1, x.dim())), keepdim=True) + 1e-5).sqrt()
        return straight_through(sign(x), threshold_sign(u, x.new_zeros(()), x.new_ones(()), ste=self.ste))


@register_method(
    "recu", activation=hardtanh, bypass="same", keeps=downsampling_shortcut, citation="Xu et al., ICCV 2021"
)
def recu(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """sign of the normalized sample on activations, sign of clamped standardised weights."""
    weight = RevivedWeight(
        spec.out_channels, spec.weight, transposed=spec.transposed, groups=spec.groups, ste="identity"
    )
    return LayerParts(NormalizedSign(spec.in_channels, spec.dim, ste="polynomial"), weight)
