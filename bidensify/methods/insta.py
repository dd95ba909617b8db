"""INSTA-BNN: Binary Neural Network with INSTAnce-aware Threshold (Lee et al., ICCV 2023, arXiv 2204.07439).

Weights: w_b = s_o * sign(w), s_o = mean |w| per output channel, without gradient; gradient 1[|w| <= 1], not scaled by s_o.
Activations: sign(x - T_c) with T_c = alpha_c E[x_c] + beta_c E[x_c^3] + b_c, the mean and the third moment over the positions of
the sample's own channel; alpha, beta and b learned per channel, 0 at first. The third moment holds mean, variance and skewness in
one number. Gradient 2 max(0, 1 - |x - T_c|), to the threshold with the opposite sign, and on through the moments.

BiDense's binarizer is its nearest relative: the mean alone, and a scale beside it. Two moments are of no form that packed layers
store, so the part is kept in them and asked for its thresholds.

Around a layer the authors build on ReActNet: y = BatchNorm(conv) + x, then RPReLU.

Where we differ: no code of the authors is known; alpha, beta and b start at 0 (ReActNet's sign). Their RPReLU has a shift that
depends on the sample too (INSTA-PReLU), and INSTA-Th+ computes thresholds by a block like squeeze-and-excitation: both are left
out, since they are float layers of their own beside the binary one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidensify.config import BidensifyConfig
from bidensify.exact import block_sums
from bidensify.methods.around import rprelu, scaled_sign
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import ActivationBinarizer, straight_through, threshold_sign
from bidensify.nn.dab import statistics_dtype


class InstanceSign(ActivationBinarizer):
    """sign(x - T_c), T_c of the sample's own mean and third moment."""

    work = 6

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__(channels, dim)
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.b = nn.Parameter(torch.zeros(channels))

    def _threshold(self, x: Tensor, mean: Tensor, third: Tensor) -> Tensor:
        alpha, beta, b = (self._shaped(each, x).to(mean.dtype) for each in (self.alpha, self.beta, self.b))
        return (alpha * mean + beta * third + b).to(x.dtype)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and third moment, detached, summed in one order for every memory format."""
        x = x.detach()
        if torch.compiler.is_compiling():
            # A graph for other runtimes has an order of its own.
            wide, space = x.to(statistics_dtype(x)), self._spatial(x)
            return wide.mean(space, keepdim=True), wide.pow(3).mean(space, keepdim=True)
        wide = x.to(statistics_dtype(x))
        flat = torch.cat([wide, wide.pow(3)]).movedim(self.dim, 1).reshape(2 * len(x), self.channels, -1)
        found = (block_sums(flat) / flat.shape[2]).to(flat.dtype).chunk(2)
        ones = [1] * (x.dim() - 2)
        shape = (len(x), self.channels, *ones) if self.dim == 1 else (len(x), *ones, self.channels)
        return found[0].view(shape), found[1].view(shape)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = x.new_ones(())
        return self._threshold(x, *self._moments(x)).detach(), -one, one

    def binarize(self, x: Tensor) -> Tensor:
        threshold, low, high = self.codes(x)
        wide, space = x.to(statistics_dtype(x)), self._spatial(x)
        moments = (
            (wide.mean(space, keepdim=True), wide.pow(3).mean(space, keepdim=True)) if space else (wide, wide.pow(3))
        )
        through = threshold_sign(x, self._threshold(x, *moments), high)
        return straight_through(torch.where(x.detach() >= threshold, high, low), through)

    def calibrate(self, x: Tensor) -> None:
        """Sets b so that each channel has both signs."""
        rest = self._threshold(x, *self._moments(x)) - self._shaped(self.b, x).to(x.dtype)
        self.b.copy_(self._even_thresholds(x, rest))


@register_method("insta", activation=rprelu, bypass="all", citation="Lee et al., ICCV 2023")
def insta(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """A threshold of the sample's own moments on activations, channel-scaled sign on weights."""
    return LayerParts(binarizer=InstanceSign(spec.in_channels, spec.dim), weight_binarizer=scaled_sign(spec))
