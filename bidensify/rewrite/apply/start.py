"""What a binary layer's parts start from: the layer's own weights, its norm, its LayerScale."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bidensify.config import BidensifyConfig
from bidensify.methods import LayerParts, get_method
from bidensify.nn import RPReLU
from bidensify.nn.used_weight import used_weight
from bidensify.rewrite.apply.norms import centre, new_norm
from bidensify.rewrite.plan.entries import LayerPlan
from bidensify.rewrite.weights import draw_zeros

__all__ = ["Start", "start"]


class Start(NamedTuple):
    """The parts of a layer with their first values, and the float weight that it convolves with."""

    norm: nn.Module | None
    parts: LayerParts
    activation: nn.Module | None
    latent: Tensor


def _weight(layer: LayerPlan, module: nn.Module) -> Tensor:
    """The float weight that the layer convolves with now."""
    parameter = module._parameters.get("weight")
    if layer.makes_weight or parameter is None:
        return used_weight(module)
    return parameter


@torch.no_grad()
def start(
    layer: LayerPlan,
    module: nn.Module,
    norm: nn.Module | None,
    gamma: Tensor | None,
    config: BidensifyConfig,
    *,
    draw: bool = True,
) -> Start:
    """Makes a layer's parts of the float layer.

    Args:
        layer: its plan.
        module: the float layer; its bias goes into a new norm.
        norm: the BatchNorm that the layer takes over, or None.
        gamma: of its LayerScale: a norm of ``layer.layer_scale`` is multiplied by it.
        config: the plan's.
        draw: whether its weights without a sign are drawn; not where another module has the weight too.
    """
    method = get_method(layer.method)
    dim = -1 if layer.kind == "linear" else 1
    latent = _weight(layer, module)
    if norm is None and (method.norm == "after" or layer.layer_scale is not None):
        norm = new_norm(layer, module, latent)
    if norm is not None and gamma is not None:
        for parameter in (norm.weight, norm.bias):
            parameter.mul_(gamma.reshape(-1))  # type: ignore[operator]
    # Behind the norm, which starts from the weights as they were: what gave nothing gives next to nothing.
    if draw and draw_zeros(module):
        latent = _weight(layer, module)
    settings = dataclasses.replace(config, act_scale=layer.act_scale, act_bits=layer.act_bits)
    parts = method.parts(layer.spec(module, latent), settings)
    activation = None
    if layer.activation and method.activation is not None:
        activation = method.activation(layer.out_channels, dim).to(device=latent.device, dtype=latent.dtype)
        if isinstance(activation, RPReLU) and norm is not None and method.centred:
            centre(activation, norm, bypass=layer.bypass)
    return Start(norm, parts, activation, latent)
