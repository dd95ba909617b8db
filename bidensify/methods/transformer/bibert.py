"""BiBERT: Accurate Fully Binarized BERT (Qin et al., ICLR 2022).

Weights: w_b = s_o * sign(w - mean_o), s_o = mean |w| of the uncentred weights per output channel, without gradient; gradient
1[|w - mean_o| <= 1], not scaled by s_o, and on through the mean.
Activations: sign(x); gradient 1[|x| <= 1].

Around a layer the authors change nothing: LayerNorm, residual adds, GELU and the layers' biases stay, no norm is added. Word
embeddings and the classifier stay in full precision.

Where we differ: the authors binarize what enters the two products of attention too (Bi-Attention: queries, keys and values by
their signs, attention by a threshold in place of the softmax) and distil it (direction-matching distillation). Here attention
stays in full precision. One weight alone is not centred.
"""

from __future__ import annotations

from torch import Tensor

from bidensify.config import BidensifyConfig
from bidensify.methods.around import linear_alone
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import SignBinarizer, TransformedWeight


class CentredSign(TransformedWeight):
    """s_o * sign(w - mean_o)."""

    def transform(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return weight - self.like(self.moments(weight)[0], weight), self.channel_scale(weight), None


@register_method("bibert", norm="none", keeps=linear_alone, citation="Qin et al., ICLR 2022")
def bibert(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """sign on activations, sign of centred weights."""
    return LayerParts(
        binarizer=SignBinarizer(spec.in_channels, spec.dim),
        weight_binarizer=CentredSign(transposed=spec.transposed, groups=spec.groups, ste_scaled=False),
    )
