"""Sums between packed layers in one pass: of several tensors, of nearest-neighbour upsampled ones where they lie, and with the
RPReLU that follows; ``csrc/packed/sums.cpp``. The terms are added in the order in which the network adds them: the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.kernels import memory
from bidensify.kernels import training_ops as ops
from bidensify.kernels.library import library
from bidensify.kernels.structures import PartArguments, SumArguments

__all__ = [
    "ADDITIONS",
    "POST",
    "SUMS",
    "Part",
    "activation_of",
    "add_up",
    "terms_of_add",
    "terms_of_stack",
    "terms_of_sum",
]

ADDITIONS = frozenset((torch.add, Tensor.add, Tensor.__add__))
SUMS = frozenset((torch.sum, Tensor.sum))
# The activation as an operator, which a sum in front of it takes over.
POST = ops.post
_MOST = 16
_Activation = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """Some channels of a deferred tensor: ``x`` (N, C, H / up, W / up), channels_last, each pixel standing for up x up."""

    x: Tensor
    up: int


def terms_of_add(args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Both terms of an addition, or None where it is more than one."""
    given = dict(zip(("input", "other"), args, strict=False)) | kwargs
    if len(args) > 2 or set(given) != {"input", "other"}:
        return None
    return given["input"], given["other"]


def terms_of_stack(args: Any, kwargs: Any) -> Sequence[Any] | None:
    """What ``torch.stack`` puts side by side on a new first dimension, or None where it does anything else."""
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    if not set(given) <= {"tensors", "dim"} or given.get("dim", 0) != 0:
        return None
    tensors = given.get("tensors")
    return tensors if isinstance(tensors, list | tuple) and 2 <= len(tensors) <= _MOST else None


def terms_of_sum(args: Any, kwargs: Any) -> Any:
    """What ``torch.sum`` adds up over the first dimension, or None where it does anything else."""
    given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    dim = given.get("dim")
    first = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    return given.get("input") if set(given) == {"input", "dim"} and first == 0 and first is not False else None


def activation_of(args: Any, kwargs: Any) -> _Activation | None:
    """The parameters of an RPReLU alone among the arguments of ``training_ops.post``, or None."""
    if kwargs or len(args) != 11 or args[10] != 1 or any(part is not None for part in args[1:6]):
        return None
    parts: _Activation = args[6:9]
    return parts if all(type(part) in (Tensor, nn.Parameter) for part in parts) else None


def add_up(shape: Sequence[int], parts: Sequence[Part], activation: _Activation | None = None) -> Tensor | None:
    """The sum of the parts, and RPReLU of it, or None where the kernel does not take them.

    Args:
        shape: (N, C, H, W) of the result.
        parts: float32, each of all C channels.
        activation: bias_in, slope and bias_out, (C,) each.
    """
    found = library()
    n, c, h, w = shape
    fits = 2 <= len(parts) <= _MOST and all(part.x.shape[1] == c and part.x.dtype == torch.float32 for part in parts)
    if found is None or not hasattr(found, "bd_sum") or not fits or torch.is_autocast_enabled("cpu"):
        return None
    y = memory.empty(shape, torch.float32)
    records = (PartArguments * len(parts))(*(PartArguments(part.x.data_ptr(), c, part.up, part.up) for part in parts))
    arguments = SumArguments(n, h, w, c, torch.get_num_threads(), len(parts), records)
    arguments.y = y.data_ptr()
    if activation is not None:
        if any(part.shape != (c,) or part.dtype != torch.float32 or not part.is_contiguous() for part in activation):
            return None
        arguments.bias_in, arguments.slope, arguments.bias_out = (part.data_ptr() for part in activation)
    return y if found.bd_sum(ctypes.byref(arguments)) == 0 else None
