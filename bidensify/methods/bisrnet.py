"""BiSRNet: Binarized Spectral Compressive Imaging (Cai et al., NeurIPS 2023), its BiSR convolution.

Weights: w_b = s_o * sign(w), s_o = mean |w| per output channel, without gradient; gradient 1[|w| <= 1], not scaled by s_o.
Activations: sign(k_c x + b_c), k and b learned per channel, 1 and 0 at first; the gradient is that of tanh(beta u) at
u = k_c x + b_c, beta learned per layer, 1 at first, also for beta itself.

In a packed layer the threshold is -b / k; a channel whose k has become negative is turned round, and with it the weight bits
that it meets.

Around a layer the authors have y = RPReLU(conv) + x: no BatchNorm, the activation before the shortcut. Where the channels
change, convolutions side by side with a shortcut each (twice as many channels) or their average (half as many): BiDense's
fusion-up and fusion-down of the bypass. Where the map changes, the shortcut is pooled with it.

Where we differ: a network's own BatchNorm behind a convolution stays (it was trained with it); calibration on a few batches
starts b so that each channel has both signs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidensify.config import BidensifyConfig
from bidensify.methods.around import rprelu, scaled_sign
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import AffineSign


class RedistributedSign(AffineSign):
    """sign(k_c x + b_c) behind a tanh of learned steepness."""

    work = 2

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__(channels, dim)
        self.k = nn.Parameter(torch.ones(channels))
        self.b = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.ones(1))

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.k, self.b

    def surrogate(self, x: Tensor) -> Tensor:
        k, b = (self._shaped(parameter, x).to(x.dtype) for parameter in (self.k, self.b))
        return torch.tanh(self.beta.to(x.dtype) * (k * x + b))

    def calibrate(self, x: Tensor) -> None:
        self.b.copy_(-self.k * self._even_thresholds(x))


@register_method(
    "bisrnet", activation=rprelu, bypass="all", norm="none", activation_first=True, citation="Cai et al., NeurIPS 2023"
)
def bisrnet(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """A sign behind a learned scale and shift on activations, channel-scaled sign on weights."""
    return LayerParts(binarizer=RedistributedSign(spec.in_channels, spec.dim), weight_binarizer=scaled_sign(spec))
