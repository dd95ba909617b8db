"""DoReFa-Net: Training Low Bitwidth CNNs with Low Bitwidth Gradients (Zhou et al., arXiv 1606.06160), 1-bit weights.

Weights: w_b = E * sign(w), E = mean |w| over the whole layer, without gradient; the gradient goes through as it is.
Activations: round(clip(x, 0, 1)) in {0, 1}; with ``act_bits=2`` round(3 clip(x, 0, 1)) / 3; gradient 1 where 0 <= x <= 1.

The rounding's tie, x = 0.5, is 0, as torch.round and TensorFlow have it: the threshold is the next number above 0.5 (in half
precision, where that number is no more, 0.5 itself). With two bits 3 x 0.5 is rounded up, to the even 2.

Around a layer nothing changes: BatchNorm and activation stay the network's own. The authors clip to [0, 1] in place of the ReLU,
which the binarizer's own clip is as well. Gradients have 32 bits here, as in their configuration 1-1-32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bidensify.config import BidensifyConfig
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import ActivationBinarizer, WeightBinarizer, straight_through, threshold_levels

# From 0.5 to the next float32.
_NEXT = 2.0**-24


class ZeroOne(ActivationBinarizer):
    """{0, 1} with a threshold just above 0.5; {0, 1/3, 2/3, 1} with two planes."""

    def __init__(self, channels: int, dim: int = 1, planes: int = 1) -> None:
        super().__init__(channels, dim)
        self.planes = planes
        if planes == 2:
            self.work = 3

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.planes == 2:
            return x.new_full((), 0.5), x.new_full((), 1 / 6), x.new_full((), 5 / 6)
        threshold = 0.5 + (2.0**-53 if x.dtype == torch.float64 else _NEXT)
        return x.new_full((), threshold), x.new_zeros(()), x.new_ones(())

    def stored(self) -> dict[str, Tensor] | None:
        if self.planes == 2:
            return {"b": torch.full((self.channels,), 0.5), "levels": torch.tensor([1 / 6, 5 / 6])}
        return {"b": torch.full((self.channels,), 0.5 + _NEXT), "levels": torch.tensor([0.0, 1.0])}

    def binarize(self, x: Tensor) -> Tensor:
        threshold, low, high = self.codes(x)
        if self.planes == 2:
            values = threshold_levels(x.detach(), threshold, (high - low) / 2) + (high + low) / 2
            return straight_through(values, x.clamp(0, 1))
        return straight_through(torch.where(x.detach() >= threshold, high, low), x.clamp(0, 1))


class LayerScale(WeightBinarizer):
    """One scale for the whole layer."""

    def channel_scale(self, weight: Tensor) -> Tensor:
        per_channel = super().channel_scale(weight)
        return per_channel.mean().expand(len(per_channel))


@register_method("dorefa", act_bits=(1, 2), citation="Zhou et al., arXiv 1606.06160")
def dorefa(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """{0, 1} on activations, one scale per layer on weights."""
    return LayerParts(
        binarizer=ZeroOne(spec.in_channels, spec.dim, config.act_bits),
        weight_binarizer=LayerScale(transposed=spec.transposed, groups=spec.groups, ste="identity", ste_scaled=False),
    )
