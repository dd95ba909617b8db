"""What makes a convolution or a linear layer binary: a mixin that goes before its actual class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from bidensify.nn.binarizer import ActivationBinarizer
from bidensify.nn.bypass import Bypass
from bidensify.nn.ste import binarize_weight, sign

__all__ = ["BinaryLayer", "WeightBinarizer", "binary_layers", "make_binary", "set_binarization"]


class WeightBinarizer(nn.Module):
    """w_b = s_o * sign(w) with s_o = mean |w| over all the weights that feed output channel o.

    s_o takes no gradient; STE: identity where |w| <= 1, else 0. BiDense (arXiv 2411.10346), eq. 2, after XNOR-Net.

    Args:
        transposed: the weight is (C_in, C_out / groups, kH, kW).
        groups: the layer's groups (needed to find the output channel in a transposed weight).
        scaled: False gives s_o = 1 (BNN).
    """

    def __init__(self, *, transposed: bool = False, groups: int = 1, scaled: bool = True) -> None:
        super().__init__()
        self.transposed = transposed
        self.groups = groups
        self.scaled = scaled

    def scale(self, weight: Tensor) -> Tensor:
        """s_o, broadcastable to ``weight``; detached."""
        weight = weight.detach()
        if not self.scaled:
            return weight.new_ones(())
        if not self.transposed:
            return weight.abs().mean(tuple(range(1, weight.dim())), keepdim=True)
        # (groups, C_in / groups, C_out / groups, kH, kW): the same scale for every input channel of a group.
        grouped = weight.abs().reshape(self.groups, -1, *weight.shape[1:])
        scale = grouped.mean((1, *range(3, grouped.dim())), keepdim=True)
        return scale.expand(-1, grouped.shape[1], *scale.shape[2:]).reshape(weight.shape[0], *scale.shape[2:])

    def channel_scale(self, weight: Tensor) -> Tensor | None:
        """s_o as (C_out,), or None where it is 1."""
        if not self.scaled:
            return None
        weight = weight.detach()
        if not self.transposed:
            return weight.abs().flatten(1).mean(1)
        grouped = weight.abs().reshape(self.groups, -1, *weight.shape[1:])
        return grouped.mean((1, *range(3, grouped.dim()))).flatten()

    def forward(self, weight: Tensor) -> Tensor:
        return binarize_weight(weight, self.scale(weight))

    def extra_repr(self) -> str:
        return "" if self.scaled else "scaled=False"


class BinaryLayer(nn.Module):
    """Mixin of every binary layer: y = activation(norm(layer(binarizer(x), binarized weight)) + bypass(x)).

    It stands before an ``nn.Conv2d``, ``nn.ConvTranspose2d`` or ``nn.Linear`` (or any subclass) in the class's bases.
    The latent weight stays the parameter named "weight" (state_dict, optimizers); reading ``.weight`` gives the
    binarized tensor, so that a subclass's own ``forward`` computes with it.

    Attributes:
        binarizer: turns the input into two values (``ActivationBinarizer``).
        weight_binarizer: turns the latent weight into s_o * sign(w).
        norm: BatchNorm over the output channels, or None.
        bypass: the full-precision signal (``Bypass``), or None where a residual add outside supplies it.
        activation: what follows (Identity where the network's own activation does).
        binarize_weights: False computes with the latent weight (the stage that binarizes activations alone).
        method: name of the method that made the layer.
    """

    binarizer: ActivationBinarizer
    weight_binarizer: WeightBinarizer
    norm: nn.Module | None
    bypass: Bypass | None
    activation: nn.Module
    binarize_weights: bool
    method: str

    def install(
        self,
        *,
        binarizer: ActivationBinarizer,
        weight_binarizer: WeightBinarizer,
        norm: nn.Module | None,
        bypass: Bypass | None,
        activation: nn.Module | None = None,
        method: str = "bidense",
    ) -> None:
        """Gives the layer its parts; until then it is the float layer that it was."""
        self.binarizer = binarizer
        self.weight_binarizer = weight_binarizer
        self.norm = norm
        self.bypass = bypass
        self.activation = nn.Identity() if activation is None else activation
        self.method = method
        self.binarize_weights = True

    @property
    def latent_weight(self) -> nn.Parameter:
        """The float parameter behind the binary weight."""
        return cast(nn.Parameter, self._parameters["weight"])

    def _get_weight(self) -> Tensor:
        latent = self._parameters.get("weight")
        if latent is None:
            raise AttributeError("weight")
        # A layer under construction (or one whose weights are not binarized yet) computes with the latent weight.
        if not self.__dict__.get("binarize_weights", False):
            return latent
        return cast(Tensor, self.weight_binarizer(latent))

    def _set_weight(self, value: nn.Parameter | None) -> None:
        self.register_parameter("weight", value)

    weight = property(_get_weight, _set_weight)

    def binary_weight(self) -> tuple[Tensor, Tensor | None]:
        """(±1 tensor in the latent weight's shape, s_o as (C_out,) or None where it is 1)."""
        latent = self.latent_weight.detach()
        return sign(latent), self.weight_binarizer.channel_scale(latent)

    def conv_only(self, a: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The bare layer of the class below, on an input that is binarized already: C_in -> C_out channels."""
        return cast(Tensor, super().forward(a, *args, **kwargs))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.conv_only(self.binarizer(x), *args, **kwargs)
        if self.norm is not None:
            y = self.norm(y)
        if self.bypass is not None:
            y = y + self.bypass(x, y.shape[-2:] if self.bypass.dim == 1 else None).to(y.dtype)
        return cast(Tensor, self.activation(y))

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__dict__.get("_made_from")
        if base is None:
            return super().__reduce_ex__(protocol)
        return _rebuild, (base,), self.__dict__


_made: dict[type[nn.Module], type[nn.Module]] = {}


def make_binary(base: type[nn.Module]) -> type[nn.Module]:
    """The class with ``BinaryLayer`` before ``base``; the same object for the same ``base``."""
    if base not in _made:
        _made[base] = type(
            f"Binary{base.__name__}",
            (BinaryLayer, base),
            {"_made_from": base, "__module__": base.__module__, "__doc__": f"A 1-bit {base.__name__}."},
        )
    return _made[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    made = make_binary(base)
    return made.__new__(made)


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryLayer]]:
    """(path, layer) of every binary layer, each once, in ``named_modules`` order."""
    for path, module in model.named_modules():
        if isinstance(module, BinaryLayer):
            yield path, module


def set_binarization(model: nn.Module, *, activations: bool, weights: bool) -> None:
    """Switches binarization of activations and of weights on or off in every binary layer.

    The stages of training: (True, False), then (True, True). (False, False) computes in float with the latent weights.
    """
    for _, layer in binary_layers(model):
        layer.binarizer.enabled = activations
        layer.binarize_weights = weights


def make_norm(channels: int, weight_scale: Tensor | None = None, like: Tensor | None = None) -> nn.BatchNorm2d:
    """A BatchNorm2d on the device and in the dtype of ``like``; ``weight_scale`` (C,) starts its weight."""
    norm = nn.BatchNorm2d(channels)
    if weight_scale is not None:
        with torch.no_grad():
            norm.weight.copy_(weight_scale)
    return norm if like is None else norm.to(device=like.device, dtype=like.dtype)


def pretrained_spread(weight: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Standard deviation (C_out,) of the float layer's output for white input of unit variance: the weights' L2 norm.

    A BatchNorm that is added behind a layer without one starts from it, so that the output keeps its scale.
    """
    weight = weight.detach().float()
    if transposed:
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        norms = grouped.pow(2).sum((1, *range(3, grouped.dim()))).sqrt().flatten()
    else:
        norms = weight.flatten(1).norm(dim=1)
    return norms.clamp(min=1e-3)
