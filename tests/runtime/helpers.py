"""Latent layers with parameters away from their initial values, so that a forgotten one shows."""

from __future__ import annotations

import torch
from torch import nn

from bidensify.nn import BinaryLayer, RPReLU


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics, affines and thresholds in every binary layer; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for layer in model.modules():
            if not isinstance(layer, BinaryLayer):
                continue
            for name, parameter in layer.binarizer.named_parameters():
                fill(parameter, -0.3, 0.3) if name != "a" else parameter.fill_(0.4)
            if layer.norm is not None:
                fill(layer.norm.running_mean, -1, 1)
                fill(layer.norm.running_var, 0.5, 2)
                fill(layer.norm.weight, -1.5, 1.5)
                fill(layer.norm.bias, -1, 1)
            if isinstance(layer.activation, RPReLU):
                for parameter in layer.activation.parameters():
                    fill(parameter, -0.5, 0.5)
    return model.eval()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over the largest value."""
    assert got.shape == want.shape
    return float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-12))
