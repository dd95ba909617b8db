"""What stands around a binary layer: pieces that several methods share."""

from __future__ import annotations

from torch import nn

from bidensify.methods.registry import LayerSpec, rectifier, rprelu
from bidensify.nn import WeightBinarizer

__all__ = ["downsampling_shortcut", "hardtanh", "linear_alone", "rectifier", "rprelu", "scaled_sign"]


def hardtanh(channels: int, dim: int) -> nn.Module:
    """The clipped identity, which bounds what a bypass adds up and keeps both signs."""
    return nn.Hardtanh()


def scaled_sign(spec: LayerSpec) -> WeightBinarizer:
    """s_o * sign(w), s_o = mean |w| of an output channel without gradient; the gradient 1[|w| <= 1], unscaled.

    Bi-Real Net's weights in the authors' code, taken over by ReActNet, BiSRNet, INSTA-BNN and BiBERT.
    """
    return WeightBinarizer(transposed=spec.transposed, groups=spec.groups, ste_scaled=False)


def downsampling_shortcut(spec: LayerSpec) -> str:
    """Why a 1x1 convolution with a stride stays: it is the projection of a residual network's shortcut.

    The authors of Bi-Real Net, IR-Net, ReCU and AdaBin leave every projection in full precision. One without a stride (behind a
    pooling, as in Bi-Real Net and AdaBin, or where the channels alone change, as in a ResNet of bottlenecks) is told from any
    other 1x1 convolution by nothing in its shape, so it is binarized here; a rule keeps it: ``Rule("*.downsample.*", "keep")``.
    """
    if spec.kind == "conv2d" and spec.kernel_size == (1, 1) and max(spec.stride) > 1:
        return "the authors leave the 1x1 convolution of a downsampling shortcut in full precision"
    return ""


def linear_alone(spec: LayerSpec) -> str:
    """Why anything but a linear layer stays."""
    return "" if spec.kind == "linear" else "the method binarizes the linear layers of transformers alone"
