"""BiDense without its binarizer: the ablation that has the channel-adaptive bypass alone (arXiv 2411.10346, ablation study).

A layer is y = RPReLU(BatchNorm(binary_conv(sign(x + b_c)))) + CFB(x): in place of DAB stands ReActNet's learned threshold
with the Bi-Real estimator, as in the authors' code for this ablation (``CFBConv2d``); weights as in ``bidense``, also their
estimator, so that the binarizer of activations is all that differs.
"""

from __future__ import annotations

from bidensify.config import BidensifyConfig
from bidensify.methods.around import rprelu
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import ShiftedSign, WeightBinarizer


@register_method(
    "bidense-cfb",
    activation=rprelu,
    bypass="all",
    activation_first=True,
    act_bits=(1, 2),
    citation="BiDense, arXiv 2411.10346",
)
def bidense_cfb(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """A threshold per channel on activations, channel-scaled sign on weights."""
    return LayerParts(
        binarizer=ShiftedSign(spec.in_channels, spec.dim, planes=config.act_bits),
        weight_binarizer=WeightBinarizer(transposed=spec.transposed, groups=spec.groups),
    )
