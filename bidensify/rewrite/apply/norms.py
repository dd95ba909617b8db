"""The norm of a binary layer, taken over from the network or new, and the activation that starts from it."""

from __future__ import annotations

from math import pi
from typing import cast

import torch
from torch import Tensor, nn

from bidensify.nn import BatchNormLast, RPReLU
from bidensify.nn.used_weight import pretrained_spread
from bidensify.rewrite.kinds import is_frozen_norm
from bidensify.rewrite.plan.entries import LayerPlan

__all__ = ["centre", "new_norm", "taken_norm"]

# Mean square of ReLU(x) for normal x of unit variance (He et al., "Delving Deep into Rectifiers", ICCV 2015, section 2.2).
_POWER_BEHIND_RELU = 0.5


def taken_norm(norm: nn.Module) -> nn.BatchNorm2d:
    """A plain BatchNorm2d that takes over the parameters and statistics of ``norm`` (fused with an activation or frozen, too)."""
    if is_frozen_norm(norm):
        like = cast(Tensor, norm.weight)
        taken = nn.BatchNorm2d(len(like), eps=getattr(norm, "eps", 1e-5), device=like.device, dtype=like.dtype)
        taken.load_state_dict(
            {name: value for name, value in norm._buffers.items() if name in taken.state_dict()}, strict=False
        )
        return taken.train(norm.training)
    assert isinstance(norm, nn.BatchNorm2d)
    taken = nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    taken._parameters = dict(norm._parameters)
    taken._buffers = dict(norm._buffers)
    taken.training = norm.training
    return taken


def new_norm(layer: LayerPlan, module: nn.Module, weight: Tensor) -> nn.Module:
    """A BatchNorm for a layer without one: it keeps the output's spread, and takes over the layer's bias.

    Without data the input's power is not known; it is taken to be that behind a ReLU of unit signals.
    """
    cls = BatchNormLast if layer.kind == "linear" else nn.BatchNorm2d
    norm = cls(layer.out_channels, device=weight.device, dtype=weight.dtype)
    spread = pretrained_spread(
        weight, transposed=layer.kind == "conv_transpose2d", groups=layer.groups, stride=layer.stride
    )
    bias = module._parameters.get("bias")
    with torch.no_grad():
        norm.weight.copy_(spread * _POWER_BEHIND_RELU**0.5)
        if bias is not None:
            norm.bias.copy_(bias)
    if bias is not None:
        module._parameters["bias"] = None
    norm.train(module.training)
    return norm


def centre(activation: RPReLU, norm: nn.Module, *, bypass: bool) -> None:
    """Centres the activation on what it is given: the norm's output and, with a bypass, what earlier layers handed on.

    The norm's bias and weight are mean and deviation of its output. A PReLU of slope a leaves the share
    k = (1 + a^2) / 2 - (1 - a)^2 / (2 pi) of a centred normal signal's variance, so that in a row of layers with bypasses the
    sum of both tends to 1 / (1 - k) times the variance of one branch.
    """
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    like = activation.bias_out
    deviation = torch.ones_like(like) if weight is None else weight
    if bypass:
        slope = activation.slope
        left = (1 + slope**2) / 2 - (1 - slope) ** 2 / (2 * pi)
        # A slope of 1 lets all of it through, and so would any row of layers.
        deviation = deviation / (1 - left).clamp(min=0.01).sqrt()
    activation.centre(torch.zeros_like(like) if bias is None else bias, deviation)
