"""``pack``: every binary layer of a model becomes a packed one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bidensify._util.listeners import announce
from bidensify._util.wrappers import unwrap
from bidensify.deploy.backends import check_kernel
from bidensify.deploy.between.compiled import compile as compile_packed
from bidensify.deploy.between.mode import defer_concatenations
from bidensify.deploy.freeze import freeze
from bidensify.deploy.layers import PackedLayer, packed_layers
from bidensify.errors import ConfigError, PackError
from bidensify.kernels import memory
from bidensify.nn import BinaryLayer, binary_layers
from bidensify.nn.used_weight import copy_model

__all__ = ["pack", "replace_layers", "set_float_dtype", "set_kernel"]

# What every module keeps its parts in.
_TABLES = frozenset(vars(nn.Module()))


def pack(
    model: nn.Module, *, kernel: str = "auto", float_dtype: torch.dtype | None = None, compile: bool = False
) -> nn.Module:
    """Freezes a binarized model to bits.

    The result is a deep copy in evaluation mode whose binary layers are ``PackedConv2d``, ``PackedConvTranspose2d`` and
    ``PackedLinear`` at the same paths. It computes what ``model`` computes in evaluation mode; ``model`` is left alone.
    No parameter of the result takes a gradient: train the latent network and pack it again.

    Args:
        model: a model with binary layers (made by ``bidensify``), in any mode.
        kernel: "auto" (the fastest that this machine has), "reference", "portable", "avx2", "avx512" or "neon". The
            environment variable BIDENSIFY_KERNEL says what "auto" is.
        float_dtype: dtype of what is not binary (``torch.bfloat16`` halves its memory and time); None keeps it. The
            model still takes and gives float32.
        compile: the result goes through ``bidensify.compile``: faster between its layers, equal to rounding.

    Raises:
        PackError: ``model`` is no network or has no binary layer, or a layer cannot be frozen exactly; the message names it.
        ConfigError: an unknown kernel or dtype.
    """
    check_kernel(kernel)
    _check_dtype(float_dtype)
    if not isinstance(model, nn.Module):
        raise PackError(f"{type(model).__name__} is no nn.Module; give the network that bidensify() returned")
    model = unwrap(model)
    layers = dict(binary_layers(model))
    if not layers:
        packed_already = len(packed_layers(model))
        state = (
            f"it is packed already ({packed_already} layers)" if packed_already else "convert it with bidensify() first"
        )
        raise PackError(f"{type(model).__name__} has no binary layer to pack; {state}")
    # Packed before the copy, so that the copy never holds latent weights.
    frozen = {path: freeze(layer, kernel, path) for path, layer in layers.items()}
    memo: dict[int, Any] = {id(layer): frozen[path] for path, layer in layers.items()}
    packed: nn.Module = frozen[""] if "" in frozen else copy_model(model, memo)
    packed.eval()
    settle(packed)
    if compile:
        compile_packed(packed)
    if float_dtype is not None:
        return set_float_dtype(packed, float_dtype)
    announce(packed)
    return packed


def settle(packed: nn.Module) -> nn.Module:
    """Puts the weights of float convolutions in channels_last, the order that packed layers read and write, lets packed
    layers read concatenations in parts, and freezes the parameters: no gradient passes a packed layer.
    """
    packed.requires_grad_(False)
    for module in packed.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not isinstance(module, BinaryLayer):
            module.to(memory_format=torch.channels_last)
    return packed if isinstance(packed, PackedLayer) else defer_concatenations(packed)


def replace_layers(model: nn.Module, layers: dict[str, PackedLayer]) -> nn.Module:
    """Puts packed layers at their paths, in place; other references to the same module are replaced too.

    Args:
        model: a model whose module at each path is the latent layer.
        layers: path -> packed layer.

    Returns:
        ``model`` (or the packed layer itself where the path is "").
    """
    by_id = {id(model.get_submodule(path)): layer for path, layer in layers.items()}
    if id(model) in by_id:
        return by_id[id(model)]
    seen: set[int] = set()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in by_id:
                parent._modules[name] = by_id[id(child)]
        for name, value in list(vars(parent).items()):
            if name not in _TABLES:
                vars(parent)[name] = _replaced(value, by_id, seen)
    return model


def _replaced(value: Any, by_id: dict[int, PackedLayer], seen: set[int]) -> Any:
    """``value`` with the layers in it replaced: lists and dictionaries in place, tuples by others where one is in them."""
    if type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
        items = [_replaced(item, by_id, seen) for item in value]
        changed = any(new is not old for new, old in zip(items, value))
        return value if not changed else tuple(items) if type(value) is tuple else type(value)(*items)
    if isinstance(value, list | dict) and id(value) not in seen:
        # It may hold itself.
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            new = _replaced(item, by_id, seen)
            if new is not item:
                value[key] = new
    return by_id.get(id(value), value)


def set_kernel(model: nn.Module, kernel: str) -> nn.Module:
    """Chooses the kernel of every packed layer, in place."""
    check_kernel(kernel)
    for layer in packed_layers(model).values():
        layer.kernel = kernel
    return model


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"float_dtype={dtype!r} must be None, torch.float32, torch.bfloat16 or torch.float16")


class _CastIn:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _cast(args, self.dtype), _cast(kwargs, self.dtype)


class _CastOut:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, self.dtype)


def set_float_dtype(packed: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Runs everything that is not binary in ``dtype``, in place; inputs and outputs of the model are cast.

    Packed layers keep their side parameters in float32 and take and give ``dtype``. Called again, the last dtype holds.
    """
    _check_dtype(dtype)
    packed.to(dtype)
    packed._bidensify_float_dtype = dtype  # type: ignore[assignment]
    for hooks in (packed._forward_pre_hooks, packed._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _CastIn | _CastOut)]:
            del hooks[key]
            packed._forward_pre_hooks_with_kwargs.pop(key, None)
    if dtype != torch.float32:
        packed.register_forward_pre_hook(_CastIn(dtype), with_kwargs=True)
        packed.register_forward_hook(_CastOut(torch.float32))
    announce(packed)
    return packed


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return memory.cast(value, dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(v, dtype) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        cast = {key: _cast(v, dtype) for key, v in value.items()}
        # A ModelOutput is a dictionary whose class takes its items as keywords.
        return cast if type(value) is dict else type(value)(**cast)
    return value
