"""ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions (Liu et al., ECCV 2020).

Weights: w_b = s_o * sign(w), s_o = mean |w| per output channel, without gradient; gradient 1[|w| <= 1], not scaled by s_o.
Activations, RSign: sign(x + b_c), b learned per channel; gradient 2 max(0, 1 - |x + b_c|).

Around a layer the authors have a shortcut at each convolution, y = BatchNorm(conv) + x, then RPReLU. Where the map gets
smaller, x is average-pooled; where a convolution doubles the channels, it is two convolutions side by side, each with its
shortcut, which is one convolution with fusion-up: so the bypass is BiDense's everywhere, also where C_out is no multiple of
C_in, which the authors' networks do not have.

Where we differ: calibration on a few batches starts b so that each channel has both signs; theirs starts at 0. The authors'
distributional loss belongs to a recipe (distillation of the output), not to the layer.
"""

from __future__ import annotations

from bidensify.config import BidensifyConfig
from bidensify.methods.around import rprelu, scaled_sign
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import ShiftedSign


@register_method("react", activation=rprelu, bypass="all", act_bits=(1, 2), citation="Liu et al., ECCV 2020")
def react(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """A sign with a learned shift on activations, channel-scaled sign on weights."""
    binarizer = ShiftedSign(spec.in_channels, spec.dim, planes=config.act_bits)
    return LayerParts(binarizer, weight_binarizer=scaled_sign(spec))
