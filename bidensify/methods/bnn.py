"""BNN: Binarized Neural Networks (Hubara et al., NeurIPS 2016).

A layer is y = BatchNorm(conv(sign(x), sign(w))): no scales, no bypass. Both signs take the clipped identity as STE
(eq. 4), and a hard tanh stands where a ReLU-like activation did, since the sign behind it needs both signs.
"""

from __future__ import annotations

from bidensify.config import BidensifyConfig
from bidensify.methods.around import hardtanh
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import SignBinarizer, WeightBinarizer


@register_method("bnn", activation=hardtanh, bypass=False, act_bits=(1, 2), citation="Hubara et al., NeurIPS 2016")
def bnn(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """sign on activations and on weights."""
    return LayerParts(
        binarizer=SignBinarizer(spec.in_channels, spec.dim, planes=config.act_bits),
        weight_binarizer=WeightBinarizer(transposed=spec.transposed, groups=spec.groups, scaled=False),
    )
