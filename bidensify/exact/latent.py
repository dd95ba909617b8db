"""A latent layer where no gradient is needed: the definition, with sums by the layer's own convolution.

The convolution is taken over -1 and +1 in float32, where its sums are exact integers in any order.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bidensify._util.modes import quiet
from bidensify.errors import ConfigError
from bidensify.exact.definition import check_flips, own_codes
from bidensify.exact.fold import fold
from bidensify.exact.forward import binarize, forward
from bidensify.kernels import popcounts

__all__ = ["WEIGHTED_FUNCTIONS", "evaluate", "own_signal", "signs_in_use", "weight_argument"]

# What a convolution or linear layer calls with (input, weight, ...).
WEIGHTED_FUNCTIONS = (
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    nn.functional.linear,
)  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The layer at work and what its ``weight`` answers; of each thread and task.
_in_use: ContextVar[tuple[Any, Tensor] | None] = ContextVar("signs", default=None)
# Classes whose forward does more than one layer on its binary weight.
_unusual: weakref.WeakSet[type] = weakref.WeakSet()


def weight_argument(args: tuple[Any, ...], kwargs: Any) -> Any:
    """The weight among the arguments of one of ``WEIGHTED_FUNCTIONS``."""
    return args[1] if len(args) > 1 else kwargs.get("weight")


def signs_in_use(layer: Any) -> Tensor | None:
    """What ``layer.weight`` is while ``layer`` is evaluated, else None."""
    found = _in_use.get()
    return found[1] if found is not None and found[0] is layer else None


class _NotPlain(Exception):
    """The layer's forward is not one plain layer function on its binary weight."""


class _LayerSums(TorchFunctionMode):
    """The bare layer on -1 and +1. As a mode it gives the layer's one convolution another weight and takes its bias away.

    Attributes:
        scale, offset: of the weights, (C_out,); known after the first ``dot`` where the layer makes its weight on the way.
    """

    def __init__(self, layer: Any, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.layer, self.args, self.kwargs = layer, args, kwargs
        self.scale = self.offset = self.signs = None
        self.used: Tensor | None = None
        self.results: list[Tensor] = []
        if not layer.makes_weight:
            signs, self.scale, self.offset = layer.binary_weight()
            self.signs = signs.float()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func not in WEIGHTED_FUNCTIONS:
            return func(*args, **options)
        weight = weight_argument(args, options)
        if self.layer.makes_weight:
            if self.signs is None:
                with torch._C.DisableTorchFunction():
                    signs, self.scale, self.offset = self.layer.weight_binarizer.codes(weight.detach())
                    self.signs = signs.float()
        elif weight is not self.used:
            return func(*args, **options)
        used = self.signs if self.used is None else self.used
        if len(args) > 1:
            args = (args[0], used, *((None, *args[3:]) if len(args) > 2 else ()))
        else:
            options["weight"] = used
        options.pop("bias", None)
        self.results.append(func(*args, **options))
        return self.results[-1]

    def _run(self, signs: Tensor, weight: Tensor | None) -> Tensor:
        linear = isinstance(self.layer, nn.Linear)
        self.used, self.results = weight, []
        token = None if self.layer.makes_weight else _in_use.set((self.layer, weight))  # type: ignore[arg-type]
        try:
            with self:
                y: Tensor = self.layer.bare_forward(
                    signs.permute(0, 2, 3, 1) if linear else signs, *self.args, **self.kwargs
                )
        finally:
            if token is not None:
                _in_use.reset(token)
        if len(self.results) != 1 or y is not self.results[0]:
            _unusual.add(type(self.layer))
            raise _NotPlain
        if linear:
            y = y.permute(0, 3, 1, 2)
        # Elsewhere a transform (Winograd, FFT) may stand behind a convolution, whose sums are integers to rounding.
        return y if y.device.type == "cpu" else torch.round(y)

    def dot(self, signs: Tensor) -> Tensor:
        """See ``Sums``."""
        counted = self._counted(signs)
        return self._run(signs, self.signs) if counted is None else counted

    def _counted(self, signs: Tensor) -> Tensor | None:
        """The same by popcounts, where the bare layer is a plain convolution that kernels take."""
        layer, weight = self.layer, self.signs
        plain = issubclass(type(layer), nn.Conv2d) and not self.args and not self.kwargs and layer.plain_forward()
        if not plain or weight is None or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return None
        if not popcounts.takes(signs, weight):
            return None
        ones = weight.new_ones(weight.shape[0])
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        planes, levels = layer.binarizer.planes, None
        if planes == 2:
            # Of -3, -1, 1 and 3: four levels two apart.
            levels = signs.new_tensor([-2.0, 2.0]).repeat(signs.shape[0], 1)
        counted: Tensor = popcounts.binary_conv(signs, None, levels, weight, ones, None, *geometry, planes)
        return counted

    def window(self, signs: Tensor) -> Tensor:
        """See ``Sums``."""
        assert self.signs is not None
        return self._run(signs, torch.ones_like(self.signs))


def _applies(layer: Any, x: Any) -> bool:
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
        and layer.weight_binarizer.packable
        and binarizer.dim == (-1 if linear else 1)
        and x.shape[binarizer.dim] == binarizer.channels
        and all(quiet(part) for part in layer.modules() if part is not layer and part is not layer.bypass)
        and not (norm is not None and norm.training)
        # A norm inside a binarizer that takes the batch's statistics (while it is calibrated) has no fixed threshold.
        and not any(part.training for part in binarizer.children())
    )


def own_signal(bypass: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    """``bypass(x, size)`` of a bypass that says no ``exact`` of its own, which kernels do not compute.

    Args:
        bypass: a module of the form of ``bidensify.nn.Bypass``.
        x: (N, C_in, H, W).
        size: (H', W').

    Returns:
        (N, C_out, H', W') in the dtype of ``x``.
    """
    if getattr(bypass, "dim", 1) == -1:
        side: Tensor = bypass(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    else:
        side = bypass(x, size)
    return side.to(x.dtype)


def _signal(layer: Any, x: Tensor, size: tuple[int, int]) -> Tensor | None:
    bypass = layer.bypass
    if bypass is None:
        return None
    said: Tensor | None = None
    if hasattr(bypass, "exact") and quiet(bypass):
        said = bypass.exact(x.float(), size)
    return own_signal(bypass, x, size).float() if said is None else said


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def evaluate(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """``layer(x)`` in evaluation mode without gradients, or None where the layer is to be called as in training.

    Args:
        layer: a binary layer (``bidensify.nn.BinaryLayer``).
        x: (N, C_in, H, W), or (N, ..., C_in) of a linear layer.
        args, kwargs: what else the layer's forward takes (the output size of a transposed convolution).

    Returns:
        In the dtype of ``x``; (N, C_out, H', W') in channels_last, as packed layers give it.
    """
    if not _applies(layer, x):
        return None
    with torch.no_grad(), _no_autocast(x.device.type):
        try:
            return _evaluate(layer, x, args, kwargs)
        except (ConfigError, NotImplementedError, _NotPlain):
            # No norm to fold, or parts of no form that a packed layer has.
            return None


def _evaluate(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    shape, linear = x.shape, isinstance(layer, nn.Linear)
    nhwc = x.reshape(shape[0], -1, 1, shape[-1]) if linear else x.permute(0, 2, 3, 1)
    image = nhwc.contiguous().permute(0, 3, 1, 2)
    sums = _LayerSums(layer, args, kwargs)
    stored = layer.binarizer.stored()
    if stored is None:
        bits = binarize(image, {}, *own_codes(layer.binarizer, image), planes=layer.binarizer.planes)
    else:
        held = {name: value.detach().to(image.device).float().flatten() for name, value in stored.items()}
        bits = binarize(image, held, planes=layer.binarizer.planes)
    flips = layer.binarizer.flips()
    if flips is not None:
        bits = replace(bits, signs=bits.signs * flips.detach().to(bits.signs).view(1, -1, 1, 1))
    dot = sums.dot(bits.signs)
    assert sums.scale is not None
    if flips is not None:
        check_flips(layer.binarizer, bits.middle is not None, sums.offset)
    after = fold(layer, sums.scale, sums.offset)
    signal = _signal(layer, image, (dot.shape[2], dot.shape[3]))
    late = layer.activation_first and after.activation is not None

    def outside(y: Tensor) -> Tensor:
        return y.permute(0, 2, 3, 1).reshape(*shape[:-1], y.shape[1]) if linear else y

    y = outside(
        forward(bits, dot, sums, after, None if late else signal, signal_last=layer.activation_first, dtype=x.dtype)
    )
    if after.activation is not None:
        y = after.activation(y)
    return y + outside(signal.to(y.dtype)) if late and signal is not None else y
