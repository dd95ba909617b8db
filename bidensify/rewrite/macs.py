"""Multiply-accumulates of convolutions and linear layers."""

from __future__ import annotations

from math import prod

from torch import nn

__all__ = ["macs_of"]


def macs_of(module: nn.Module, output: tuple[int, ...]) -> int:
    """Multiply-accumulates per sample of one call of a convolution or linear layer.

    Args:
        module: the layer.
        output: its output's shape, batch first.
    """
    numel = prod(output[1:])
    if isinstance(module, nn.Linear):
        return numel * module.in_features
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # Every input value feeds all taps; counted from the weight and the input's positions, which are the output's
        # divided by the stride.
        positions = numel // module.out_channels
        stride = prod(module.stride)
        taps = prod(module.kernel_size)
        return positions * module.in_channels * (module.out_channels // module.groups) * taps // stride
    if isinstance(module, nn.modules.conv._ConvNd):
        taps = prod(module.kernel_size)
        return numel * (module.in_channels // module.groups) * taps
    return 0
