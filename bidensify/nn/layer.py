"""What makes a convolution or a linear layer binary: a mixin that goes before its actual class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from bidensify.nn import fused, native, ops
from bidensify.nn.activation import RPReLU
from bidensify.nn.binarizer import ActivationBinarizer, DistributionAdaptiveBinarizer
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

    def native(self, weight: Tensor) -> bool:
        """Whether the training kernels binarize ``weight``: output channels outermost in memory, float32."""
        return (
            not self.transposed
            and weight.dtype == torch.float32
            and native.supports(weight)
            and native.geometry(weight, 1) is not None
        )

    def forward(self, weight: Tensor) -> Tensor:
        if self.native(weight):
            return fused.binarize_rows(weight, scaled=self.scaled)[0]
        return binarize_weight(weight, self.scale(weight))

    def extra_repr(self) -> str:
        return "" if self.scaled else "scaled=False"


class BatchNormLast(nn.BatchNorm1d):
    """BatchNorm over the last dimension: (..., C), statistics over all other dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.reshape(-1, input.shape[-1])).reshape(input.shape)


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
        recomputed: fused.Recomputed | None = self.__dict__.get("_recomputed")
        binarizer = self.weight_binarizer
        if recomputed is None or not fused.plain_module(binarizer, WeightBinarizer) or not binarizer.native(latent):
            return cast(Tensor, binarizer(latent))
        weight, scale = fused.binarize_rows(latent, scaled=binarizer.scaled, owned=self._torch_forward())
        source = latent.detach()
        recomputed.add(weight, source, lambda: ops.weight_again(source, scale))
        return weight

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
        if native.supports(x) and not _any_global_hook():
            return self._fused_forward(x, *args, **kwargs)
        y = self.conv_only(self.binarizer(x), *args, **kwargs)
        if self.norm is not None:
            y = self.norm(y)
        if self.bypass is not None:
            y = y + self.bypass(x, y.shape[-2:] if self.bypass.dim == 1 else None).to(y.dtype)
        return cast(Tensor, self.activation(y))

    def _torch_forward(self) -> bool:
        """Whether ``conv_only`` is torch's own, which uses its input and weight once and hands their gradients on."""
        function = getattr(super().forward, "__func__", None)
        inner = getattr(type(self), "_conv_forward", None)
        return function in _TORCH_FORWARDS and inner in (None, nn.Conv2d._conv_forward)

    def _fused_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``forward`` with whichever parts the training kernels know; the others are called as they are."""
        binarizer, bypass, dim = self.binarizer, self.bypass, self.binarizer.dim
        recomputed = fused.Recomputed()
        passed = None
        if (
            isinstance(binarizer, DistributionAdaptiveBinarizer)
            and fused.plain_module(binarizer, DistributionAdaptiveBinarizer)
            and binarizer.enabled
            and not binarizer.calibrating
            and binarizer.native(x)
            and x.shape[dim] == binarizer.channels
        ):
            x = fused.dense(x, dim)
            groups = 0
            if bypass is not None and fused.plain_module(bypass, Bypass) and bypass.grouping == "interleaved":
                groups = min(bypass.out_channels, binarizer.channels)
            a, passed, statistics = binarizer.split(x, groups, self._torch_forward())
            passed = passed if groups else None
            source, scale = x.detach(), ops.SCALES[binarizer.act_scale]
            recomputed.add(a, source, lambda: ops.dab_again(source, statistics, scale, dim))
        else:
            a = binarizer(x)
        self.__dict__["_recomputed"] = recomputed
        try:
            with recomputed.hooks():
                y = self.conv_only(a, *args, **kwargs)
        finally:
            self.__dict__.pop("_recomputed", None)
            recomputed.forget()
        del a
        side = None
        if bypass is not None:
            size = y.shape[-2:] if bypass.dim == 1 else None
            side = bypass(x, size) if passed is None else bypass.after_fusion_down(passed, size)
        return self._finish(y, side, dim)

    def _finish(self, y: Tensor, side: Tensor | None, dim: int) -> Tensor:
        """activation(norm(y) + side)."""
        norm, activation = self.norm, self.activation
        ready = native.supports(y)
        if norm is not None and not (ready and _fusible_norm(norm, y, dim)):
            y, norm = norm(y), None
            ready = native.supports(y)
        fuse_activation = (
            ready
            and type(activation) is RPReLU
            and fused.plain_module(activation, RPReLU)
            and activation.dim == dim
            and activation.channels == y.shape[dim]
            and activation.slope.dtype == torch.float32
        )
        if norm is not None or fuse_activation:
            if side is not None and side.shape != y.shape:
                raise RuntimeError(f"bypass gives shape {tuple(side.shape)}, the layer {tuple(y.shape)}")
            y = fused.post(y, side, cast(Any, norm), activation if fuse_activation else None, dim)
        elif side is not None:
            y = y + side.to(y.dtype)
        return y if fuse_activation else cast(Tensor, activation(y))

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__dict__.get("_made_from")
        if base is None:
            return super().__reduce_ex__(protocol)
        return _rebuild, (base,), self.__dict__


_any_global_hook: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook
_TORCH_FORWARDS = (nn.Conv2d.forward, nn.ConvTranspose2d.forward, nn.Linear.forward)


def _fusible_norm(norm: nn.Module, y: Tensor, dim: int) -> bool:
    """Whether ``fused.post`` does what calling ``norm`` on ``y`` would do."""
    if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or not norm.affine or norm.weight.dtype != torch.float32:
        return False
    if not fused.plain_module(norm, nn.BatchNorm2d if dim == 1 else BatchNormLast):
        return False
    batch = norm.training or not norm.track_running_stats
    # Gradients through running statistics, a batch of one value (an error) and modes that watch torch's functions
    # (statistics over several processes) are left to torch.
    return (
        y.shape[dim] == norm.num_features
        and (batch or not torch.is_grad_enabled())
        and y.numel() // y.shape[dim] > 1
        and torch._C._len_torch_function_stack() == 0
    )


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
