"""BiDense without its bypass: the ablation that has the distribution-adaptive binarizer alone (arXiv 2411.10346, ablation study).

A layer is y = BatchNorm(binary_conv(DAB(x))), then RPReLU: ``bidense``'s parts, no CFB, which is the authors' layer
(``BiDenseConv2d``) with its ``bypass=False``. The network's own residual adds stay where they are, since no bypass carries what
they carry.

What the authors had where no CFB is, nothing or the shortcut of equal shapes that their ReActNet baseline has around its
depthwise convolutions, neither the abstract nor the published configurations say (they hold no network of this ablation); here
it is nothing.
"""

from __future__ import annotations

from bidensify.methods.around import rprelu
from bidensify.methods.bidense import bidense
from bidensify.methods.registry import register_method

register_method("bidense-dab", activation=rprelu, bypass="none", act_bits=(1, 2), citation="BiDense, arXiv 2411.10346")(
    bidense
)
