"""BatchNorm beside binary layers, and which of a layer's steps the training kernels do: the norm with what follows it, and the
convolution itself on bits, by popcounts (``bidensify.kernels.popcounts``)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bidensify._util.modes import quiet
from bidensify.exact.fold import Affine, batch_norm
from bidensify.kernels import autograd, popcounts
from bidensify.kernels import training_ops as ops
from bidensify.nn.contract import ActivationBinarizer, Declares, Split

__all__ = ["BatchNormLast", "convolve", "countable", "fusible_norm", "make_norm"]


class BatchNormLast(Declares, nn.BatchNorm1d):
    """BatchNorm over the last dimension: (..., C), statistics over all other dimensions."""

    def folded(self) -> Affine | None:
        """Scale and shift by the running statistics."""
        return batch_norm(self)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.reshape(-1, input.shape[-1])).reshape(input.shape)


def make_norm(channels: int, weight_scale: Tensor | None = None, like: Tensor | None = None) -> nn.BatchNorm2d:
    """A BatchNorm2d on the device and in the dtype of ``like``; ``weight_scale`` (C,) starts its weight."""
    norm = nn.BatchNorm2d(channels)
    if weight_scale is not None:
        with torch.no_grad():
            norm.weight.copy_(weight_scale)
    return norm if like is None else norm.to(device=like.device, dtype=like.dtype)


def fusible_norm(norm: nn.Module, y: Tensor, dim: int) -> bool:
    """Whether ``kernels.autograd.post`` does what calling ``norm`` on ``y`` would do."""
    if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or not norm.affine or norm.weight.dtype != torch.float32:
        return False
    if type(norm).forward is not (nn.BatchNorm2d if dim == 1 else BatchNormLast).forward or not quiet(norm):
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


def countable(layer: Any, x: Tensor) -> bool:
    """Whether ``layer``, a binary layer that binarizes both, is a plain convolution of an input that kernels take on bits."""
    if not isinstance(layer, nn.Conv2d):
        return False
    binary = cast(Any, layer)
    binarizer, weights = binary.binarizer, binary.weight_binarizer
    return (
        binary.binarize_weights
        and not binary.makes_weight
        and binary.plain_forward()
        and binary.padding_mode == "zeros"
        and not isinstance(binary.padding, str)
        and popcounts.takes(x, weight := cast(Tensor, binary.latent_weight))
        and quiet(weights)
        and quiet(binarizer)
        and bool(weights.native(weight))
        and bool(binarizer.enabled)
        and binarizer.dim == 1
        and type(binarizer).weigh is ActivationBinarizer.weigh
        and _unit(binarizer) is not None
    )


def _unit(binarizer: ActivationBinarizer) -> bool | None:
    """Whether the binarized values are -1 and +1; None where they are not known to be of one scale per sample."""
    stored = binarizer.stored()
    return None if stored is None else binarizer.planes == 1 and not ("a" in stored or "levels" in stored)


def convolve(layer: Any, a: Tensor, split: Split | None) -> Tensor | None:
    """The layer's convolution of its binarized input, or None where it takes torch's.

    Args:
        layer: a binary layer that is ``countable``.
        a: its binarized input.
        split: what ``a`` comes from, or None where ``a`` has its values.
    """
    if split is None:
        if not _unit(layer.binarizer) or not popcounts.takes(a, layer.latent_weight):
            return None
        source, thresholds, levels, again = a.detach(), None, None, lambda: source
    elif split.codes is None:
        return None
    else:
        source, again = split.source, split.remake
        thresholds, levels = split.codes
    weight, weights = layer.latent_weight, layer.weight_binarizer
    # Torch's own forward uses the weight once and hands its gradient on: it may be overwritten.
    binary, scale = autograd.binarize_rows(weight, scaled=weights.scaled, ste_scaled=weights.ste_scaled, owned=True)
    latent = weight.detach()
    return popcounts.convolve(
        a,
        binary,
        layer.bias,
        source=source,
        thresholds=thresholds,
        levels=levels,
        weight=latent,
        scale=scale,
        remake=(again, lambda: ops.weight_again(latent, scale)),
        geometry=(layer.stride, layer.padding, layer.dilation, layer.groups),
        planes=layer.binarizer.planes,
    )
