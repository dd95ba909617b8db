"""BiViT: Extremely Compressed Binary Vision Transformers (He et al., ICCV 2023).

Weights: w_b = scale_o * sign(w - mean_o); gradient scale_o * 1[|w - mean_o| < 1], and on through the mean. In the MLP scale_o is
mean |w| of the uncentred weights, without gradient; in attention (queries, keys, values and the projection) it is learned and
starts there.
Activations: sign(x); gradient 1[|x| < 1].

Which of the two a layer is, its shape tells: attention's layers lead from C channels to C, 2 C or 3 C (keys and values, or all
three, in one), those of an MLP to another number.

Around a layer the authors change nothing: LayerNorm, residual adds, GELU and biases stay, no norm is added.

Where we differ: the authors binarize what enters the two products of attention too (softmax-aware binarization: attention is 1
where it reaches a quarter of its row's largest); here attention stays in full precision. One weight alone is not centred.
"""

from __future__ import annotations

from torch import Tensor

from bidensify.config import BidensifyConfig
from bidensify.methods.around import linear_alone
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import LearnedScaleWeight, SignBinarizer, TransformedWeight


class CentredSign(TransformedWeight):
    """mean |w| * sign(w - mean_o)."""

    def transform(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return weight - self.like(self.moments(weight)[0], weight), self.channel_scale(weight), None


class LearnedCentredSign(LearnedScaleWeight):
    """alpha_o * sign(w - mean_o)."""

    def transform(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return weight - self.like(self.moments(weight)[0], weight), self.alpha, None


@register_method("bivit", norm="none", keeps=linear_alone, citation="He et al., ICCV 2023")
def bivit(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """sign on activations, sign of centred weights with a fitted or a learned scale."""
    weight: TransformedWeight
    if spec.kind == "linear" and spec.out_channels in (spec.in_channels, 2 * spec.in_channels, 3 * spec.in_channels):
        weight = LearnedCentredSign(spec.out_channels, spec.weight, ste="strict")
    else:
        weight = CentredSign(transposed=spec.transposed, groups=spec.groups, ste="strict")
    return LayerParts(SignBinarizer(spec.in_channels, spec.dim, ste="strict"), weight)
