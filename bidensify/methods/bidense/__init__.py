"""BiDense: binarization for dense prediction (arXiv 2411.10346); the paper's two ablations are the files beside this one.

A layer is y = RPReLU(BatchNorm(binary_conv(DAB(x)))) + CFB(x), with

* w_b = s_o * sign(w), s_o = mean |w| per output channel (eq. 2);
* DAB: beta_c = k_c * mean(x_c) + b_c, s = x - beta, a_b = exp(a * (mean|s| - 1)) * sign(s) (section 3.2);
  with ``act_bits=2``, which the paper does not have, a_b = step * (sign(s) + sign(s - step * sign(s)) / 2) with
  step = 1.248 * exp(a) * mean|s|;
* CFB: the parameter-free fusion-up / fusion-down of x (section 3.3).

In the paper RPReLU stands behind the sum. Here the bypasses of a row of layers are one linear path through the network, which
trains to more where blocks are plain, and to no more where residuals are inverted (benchmarks/RESULTS.md);
``bidense-in-paper`` is the paper's layer.

Where else this differs from the paper's code, and why, is said in ``bidensify.nn.dab`` and ``bidensify.nn.bypass``.
"""

from __future__ import annotations

from bidensify.config import BidensifyConfig
from bidensify.methods.around import rprelu
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import DistributionAdaptiveBinarizer, WeightBinarizer

__all__ = ["bidense"]


@register_method(
    "bidense",
    activation=rprelu,
    bypass="all",
    activation_first=True,
    act_bits=(1, 2),
    citation="BiDense, arXiv 2411.10346",
)
def bidense(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """DAB on activations, channel-scaled sign on weights."""
    return LayerParts(
        binarizer=DistributionAdaptiveBinarizer(spec.in_channels, config.act_scale, spec.dim, config.act_bits),
        weight_binarizer=WeightBinarizer(transposed=spec.transposed, groups=spec.groups),
    )
