"""A latent layer where no gradient is needed: the arithmetic that packed layers have (``bidensify.nn.arithmetic``).

The convolution is taken over -1 and +1 in float32, where its sums are exact integers in any order.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bidensify.errors import ConfigError
from bidensify.nn import arithmetic, evaluation_ops
from bidensify.nn.binarizer import ActivationBinarizer, DistributionAdaptiveBinarizer, SignBinarizer
from bidensify.nn.bypass import Bypass
from bidensify.nn.ste import sign
from bidensify.nn.weight import WEIGHTED_FUNCTIONS, weight_argument

if TYPE_CHECKING:
    from bidensify.nn.layer import BinaryLayer

__all__ = ["evaluate", "signs_in_use"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The layer at work and the signs that its ``weight`` answers; of each thread and task.
_in_use: ContextVar[tuple[BinaryLayer, Tensor] | None] = ContextVar("signs", default=None)
# Classes whose forward does more than one layer on its binary weight.
_unusual: weakref.WeakSet[type] = weakref.WeakSet()


def signs_in_use(layer: BinaryLayer) -> Tensor | None:
    """What ``layer.weight`` is while ``layer`` is evaluated, else None."""
    found = _in_use.get()
    return found[1] if found is not None and found[0] is layer else None


class _Bare(TorchFunctionMode):
    """Gives the layer's one convolution signs for its weight and takes its bias away; notes what it gave.

    Attributes:
        results: what convolutions returned.
        scale: s_o as (C_out,), or None where it is 1.
    """

    def __init__(self, layer: BinaryLayer, signs: Tensor | None, scale: Tensor | None) -> None:
        super().__init__()
        self.layer = layer
        self.signs = signs
        self.scale = scale
        self.results: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func not in WEIGHTED_FUNCTIONS:
            return func(*args, **options)
        weight = weight_argument(args, options)
        if self.signs is None:
            # The layer made its weight on the way here.
            with torch._C.DisableTorchFunction():
                signs, self.scale = sign(weight).float(), self.layer.weight_binarizer.channel_scale(weight)
        elif weight is self.signs:
            signs = self.signs
        else:
            return func(*args, **options)
        if len(args) > 1:
            args = (args[0], signs, *((None, *args[3:]) if len(args) > 2 else ()))
        else:
            options["weight"] = signs
        options.pop("bias", None)
        self.results.append(func(*args, **options))
        return self.results[-1]


class _Convolution:
    """The bare layer on -1 and +1: integers."""

    def __init__(self, layer: BinaryLayer, args: Any, kwargs: Any) -> None:
        self.layer, self.args, self.kwargs = layer, args, kwargs
        self.scale: Tensor | None = None
        self.signs: Tensor | None = None
        if not layer.makes_weight:
            signs, self.scale = layer.binary_weight()
            self.signs = signs.float()

    def __call__(self, bits: Tensor) -> Tensor | None:
        """(N, C_in, H, W) -> (N, C_out, H', W'), or None where the layer's forward is not one plain layer function."""
        linear = isinstance(self.layer, nn.Linear)
        token = None if self.signs is None else _in_use.set((self.layer, self.signs))
        try:
            with _Bare(self.layer, self.signs, self.scale) as bare:
                y = self.layer.bare_forward(bits.permute(0, 2, 3, 1) if linear else bits, *self.args, **self.kwargs)
        finally:
            if token is not None:
                _in_use.reset(token)
        if len(bare.results) != 1 or y is not bare.results[0]:
            _unusual.add(type(self.layer))
            return None
        self.scale = bare.scale
        if linear:
            y = y.permute(0, 3, 1, 2)
        # Elsewhere a transform (Winograd, FFT) may stand behind a convolution, whose sums are integers to rounding.
        return y if y.device.type == "cpu" else torch.round(y)


def _quiet(module: nn.Module | None) -> bool:
    """Whether nobody listens to ``module``, so that it need not be called."""
    return module is None or not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _applies(layer: BinaryLayer, x: Any) -> bool:
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES or layer.training or not layer.binarize_weights:
        return False
    if torch._C._get_tracing_state() is not None or x.numel() == 0 or type(layer) in _unusual:
        return False
    linear = isinstance(layer, nn.Linear)
    if (x.dim() < 2) if linear else (x.dim() != 4):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())):
        return False
    binarizer, norm = layer.binarizer, layer.norm
    return (
        binarizer.enabled
        and not binarizer.calibrating
        and binarizer.packable
        and binarizer.dim == (-1 if linear else 1)
        and x.shape[binarizer.dim] == binarizer.channels
        and _quiet(binarizer)
        and _quiet(layer.weight_binarizer)
        and _quiet(norm)
        and not (norm is not None and norm.training)
        and (norm is None or isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d))
    )


def _bits(binarizer: ActivationBinarizer, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(-1 and +1, half, middle) of x (N, C, H, W): the binarized input is middle +- half per sample."""
    half = middle = None
    if type(binarizer) is SignBinarizer:
        beta = x.new_zeros((1, 1), dtype=torch.float32)
    elif type(binarizer) is DistributionAdaptiveBinarizer:
        k, b = binarizer.k.detach().float().flatten(), binarizer.b.detach().float().flatten()
        a = binarizer.a.detach().float().reshape(1) if binarizer.act_scale == "per_tensor" else None
        if evaluation_ops.evaluates(x):
            bits, alpha = evaluation_ops.codes(x, k, b, a)
            return bits, None if a is None else alpha, None
        beta = arithmetic.thresholds(x, k, b)
        half = None if a is None else arithmetic.activation_scale(x, beta, a)
    else:
        beta, levels = arithmetic.codes(binarizer, x)
        beta = beta.to(x.dtype).float()
        half, middle = (levels[:, 1] - levels[:, 0]) / 2, (levels[:, 1] + levels[:, 0]) / 2
    return arithmetic.plus_minus(x.float() >= beta[:, :, None, None]), half, middle


def _extra(layer: BinaryLayer, x: Tensor, size: tuple[int, int]) -> Tensor | None:
    bypass = layer.bypass
    if bypass is None:
        return None
    if type(bypass) is Bypass and bypass.grouping == "interleaved" and _quiet(bypass):
        return arithmetic.bypass_signal(bypass, x.float(), size)
    return arithmetic.own_signal(bypass, x, size).float()


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def evaluate(layer: BinaryLayer, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """``layer(x)`` in evaluation mode without gradients, or None where the layer is to be called as in training.

    Args:
        layer: the binary layer.
        x: (N, C_in, H, W), or (N, ..., C_in) of a linear layer.
        args, kwargs: what else the layer's forward takes (the output size of a transposed convolution).

    Returns:
        In the dtype of ``x``; (N, C_out, H', W') in channels_last, as packed layers give it.
    """
    if not _applies(layer, x):
        return None
    with torch.no_grad(), _no_autocast(x.device.type):
        return _evaluate(layer, x, args, kwargs)


def _evaluate(layer: BinaryLayer, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    shape, linear = x.shape, isinstance(layer, nn.Linear)
    nhwc = x.reshape(shape[0], -1, 1, shape[-1]) if linear else x.permute(0, 2, 3, 1)
    image = nhwc.contiguous().permute(0, 3, 1, 2)
    convolution = _Convolution(layer, args, kwargs)
    try:
        bits, half, middle = _bits(layer.binarizer, image)
        y = convolution(bits)
        if y is None:
            return None
        folded = arithmetic.fold(layer, convolution.scale)
    except (ConfigError, NotImplementedError):
        # No norm to fold, or a binarizer of no form that a packed layer has.
        return None
    extra = _extra(layer, image, (y.shape[2], y.shape[3]))
    if middle is not None:
        sums = convolution(torch.ones_like(bits[:1]))
        assert sums is not None
        part = (sums * middle.view(-1, 1, 1, 1)) * folded.scale.view(1, -1, 1, 1)
        extra = part if extra is None else extra + part
    y = _finish(y, half, extra, folded, x.dtype)
    if linear:
        y = y.permute(0, 2, 3, 1).reshape(*shape[:-1], y.shape[1])
    return y if folded.activation is None else folded.activation(y)


def _finish(
    dot: Tensor, half: Tensor | None, extra: Tensor | None, folded: arithmetic.Folded, dtype: torch.dtype
) -> Tensor:
    """``arithmetic.finish`` and the rounding to ``dtype``."""
    # Packed layers give channels_last, and the float layers behind round by the format that they get.
    dot = dot.contiguous(memory_format=torch.channels_last)
    extra = None if extra is None else extra.contiguous(memory_format=torch.channels_last)
    parts = (half, extra, folded.scale, folded.bias, folded.slope, folded.post)
    if not evaluation_ops.evaluates(dot) or dtype not in (torch.float32, torch.bfloat16):
        return arithmetic.finish(dot, *parts).to(dtype)
    out = dot if dtype == torch.float32 else torch.empty_like(dot, dtype=dtype)
    evaluation_ops.finish(dot, *parts, out)
    return out
