"""DoReFa-Net: Training Low Bitwidth CNNs with Low Bitwidth Gradients (Zhou et al., arXiv 1606.06160), 1 bit each.

Weights: w_b = E * sign(w), E = mean |w| over the whole layer, without gradient; the gradient goes through as it is.
Activations: round(clip(x, 0, 1)) in {0, 1}; gradient 1 where 0 <= x <= 1.

The rounding's tie, x = 0.5, is 0, as torch.round and TensorFlow have it: the threshold is the next number above 0.5 (in half
precision, where that number is no more, 0.5 itself).

Around a layer nothing changes: BatchNorm and activation stay the network's own. The authors clip to [0, 1] in place of the ReLU,
which the binarizer's own clip is as well. Gradients have 32 bits here, as in their configuration 1-1-32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bidensify.config import BidensifyConfig
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import ActivationBinarizer, WeightBinarizer, straight_through

# From 0.5 to the next float32.
_NEXT = 2.0**-24


class ZeroOne(ActivationBinarizer):
    """{0, 1} with a threshold just above 0.5."""

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        threshold = 0.5 + (2.0**-53 if x.dtype == torch.float64 else _NEXT)
        return x.new_full((), threshold), x.new_zeros(()), x.new_ones(())

    def stored(self) -> dict[str, Tensor] | None:
        return {"b": torch.full((self.channels,), 0.5 + _NEXT), "levels": torch.tensor([0.0, 1.0])}

    def binarize(self, x: Tensor) -> Tensor:
        threshold, low, high = self.codes(x)
        return straight_through(torch.where(x.detach() >= threshold, high, low), x.clamp(0, 1))


class LayerScale(WeightBinarizer):
    """One scale for the whole layer."""

    def channel_scale(self, weight: Tensor) -> Tensor:
        per_channel = super().channel_scale(weight)
        return per_channel.mean().expand(len(per_channel))


@register_method("dorefa", citation="Zhou et al., arXiv 1606.06160")
def dorefa(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """{0, 1} on activations, one scale per layer on weights."""
    return LayerParts(
        binarizer=ZeroOne(spec.in_channels, spec.dim),
        weight_binarizer=LayerScale(transposed=spec.transposed, groups=spec.groups, ste="identity", ste_scaled=False),
    )
