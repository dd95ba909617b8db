"""What a binary layer's parts start from: the layer's own weights, its norm, its LayerScale."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bidensify.config import BidensifyConfig
from bidensify.methods import LayerParts, get_method
from bidensify.methods.around import rectifier, rprelu
from bidensify.nn import RPReLU
from bidensify.nn.used_weight import used_weight
from bidensify.rewrite.apply.norms import centre, new_norm
from bidensify.rewrite.plan.entries import LayerPlan
from bidensify.rewrite.weights import draw_zeros

__all__ = ["Start", "slope_value", "start", "start_slope", "takes_slope"]


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


def slope_value(modules: Mapping[str, nn.Module], path: str | None) -> Tensor | None:
    """The slopes of a negative side that a PReLU, or a parameter by itself, holds; None without one."""
    module = None if path is None else modules.get(path)
    if isinstance(module, nn.PReLU):
        return module.weight
    holder, _, name = (path or "").rpartition(".")
    return modules[holder]._parameters.get(name) if holder in modules else None


def takes_slope(method: str) -> bool:
    """Whether the activation of a method starts as the network's own, so with its slope."""
    return get_method(method).activation in (rectifier, rprelu)


@torch.no_grad()
def start_slope(activation: nn.Module, method: str, slope: Tensor | float | None) -> None:
    """Starts an RPReLU from the slope of the activation that it replaces, where its method starts it as the network's own: from
    slopes that were learned as they are, from those of ReLU and LeakyReLU if they are above its own (``rprelu``).
    """
    if slope is None or not isinstance(activation, RPReLU) or not takes_slope(method):
        return
    if isinstance(slope, float):
        own = get_method(method).activation is rprelu
        activation.slope.clamp_(min=slope) if own else activation.slope.fill_(slope)
    elif slope.numel() in (1, activation.channels):
        activation.slope.copy_(slope.reshape(-1).expand(activation.channels))


@torch.no_grad()
def start(
    layer: LayerPlan,
    module: nn.Module,
    norm: nn.Module | None,
    gamma: Tensor | None,
    config: BidensifyConfig,
    *,
    draw: bool = True,
    slope: Tensor | None = None,
) -> Start:
    """Makes a layer's parts of the float layer.

    Args:
        layer: its plan.
        module: the float layer; its bias goes into a new norm.
        norm: the BatchNorm that the layer takes over, or None.
        gamma: of its LayerScale: a norm of ``layer.layer_scale`` is multiplied by it.
        config: the plan's.
        slope: what ``slope_value`` gives for ``layer.slope_from``.
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
        start_slope(activation, layer.method, layer.slope if slope is None else slope)
        if isinstance(activation, RPReLU) and norm is not None and method.centred:
            # A bypass that joins behind the activation is no part of what the activation is given.
            centre(activation, norm, bypass=layer.bypass and not method.activation_first)
    return Start(norm, parts, activation, latent)
