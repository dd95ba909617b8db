"""BiDense layers that are built directly (a rewrite exchanges the classes of existing layers instead).

Source: BiDense (arXiv 2411.10346): y = BatchNorm(binary_conv(DAB(x))) + CFB(x), then RPReLU.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bidensify.nn.binary_layer import BinaryLayer
from bidensify.nn.bypass import Bypass
from bidensify.nn.dab import DistributionAdaptiveBinarizer
from bidensify.nn.native import BatchNormLast, make_norm
from bidensify.nn.rprelu import RPReLU
from bidensify.nn.weight import WeightBinarizer

__all__ = ["BiDenseConv2d", "BiDenseConvTranspose2d", "BiDenseLinear"]

_Size = int | tuple[int, int]


class BiDenseConv2d(BinaryLayer, nn.Conv2d):  # type: ignore[misc]
    """Binary convolution with DAB, BatchNorm, CFB and RPReLU.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as ``nn.Conv2d``; padding is
            with zeros, exact: a tap outside the image contributes 0.
        act_scale: "per_tensor", "per_channel" or "none", see ``DistributionAdaptiveBinarizer``.
        act_bits: bits of an activation, 1 or 2.
        activation: False leaves RPReLU out.

    Shape: (N, C_in, H, W) -> (N, C_out, H', W') as ``nn.Conv2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = False,
        act_scale: str = "per_tensor",
        *,
        act_bits: int = 1,
        activation: bool = True,
    ) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.install(
            binarizer=DistributionAdaptiveBinarizer(in_channels, act_scale, planes=act_bits),
            weight_binarizer=WeightBinarizer(),
            norm=make_norm(out_channels),
            bypass=Bypass(in_channels, out_channels, kernel_size, stride, padding, dilation),
            activation=RPReLU(out_channels) if activation else None,
        )


class BiDenseConvTranspose2d(BinaryLayer, nn.ConvTranspose2d):  # type: ignore[misc]
    """Binary transposed convolution with DAB, BatchNorm, CFB and RPReLU; s_o is per *output* channel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation: as
            ``nn.ConvTranspose2d``.
        act_scale, act_bits: see ``BiDenseConv2d``.
        activation: False leaves RPReLU out.

    Shape: (N, C_in, H, W) -> (N, C_out, H', W') as ``nn.ConvTranspose2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: _Size = 0,
        output_padding: _Size = 0,
        groups: int = 1,
        bias: bool = False,
        dilation: _Size = 1,
        act_scale: str = "per_tensor",
        *,
        act_bits: int = 1,
        activation: bool = True,
    ) -> None:
        nn.ConvTranspose2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation
        )
        self.install(
            binarizer=DistributionAdaptiveBinarizer(in_channels, act_scale, planes=act_bits),
            weight_binarizer=WeightBinarizer(transposed=True, groups=groups),
            norm=make_norm(out_channels),
            bypass=Bypass(in_channels, out_channels, kernel_size, stride, padding, dilation, transposed=True),
            activation=RPReLU(out_channels) if activation else None,
        )


class BiDenseLinear(BinaryLayer, nn.Linear):  # type: ignore[misc]
    """Binary linear layer over the last dimension: a pointwise convolution on (N, tokens..., C).

    DAB's statistics run over the tokens of a sample; BatchNorm and CFB over the last dimension.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        act_scale, act_bits: see ``BiDenseConv2d``.
        activation: False leaves RPReLU out.

    Shape: (N, ..., C_in) -> (N, ..., C_out).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        act_scale: str = "per_tensor",
        *,
        act_bits: int = 1,
        activation: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, **kwargs)
        self.install(
            binarizer=DistributionAdaptiveBinarizer(in_features, act_scale, -1, act_bits),
            weight_binarizer=WeightBinarizer(),
            norm=BatchNormLast(out_features),
            bypass=Bypass(in_features, out_features, dim=-1),
            activation=RPReLU(out_features, dim=-1) if activation else None,
        )
