"""Results of full-precision operations between packed layers, put where packed layers' outputs lie (``kernels.memory``).

Each operation runs as it would, told where to write: the same kernel of torch's, the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bidensify.kernels import memory
from bidensify.kernels import training_ops as ops
from bidensify.kernels.library import library

__all__ = ["PLACED", "placed"]


def placed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of ``func``, or None where it is not one of these operations on a dense channels_last tensor."""
    run = _RUN.get(func)
    if run is None or not args or type(args[0]) is not Tensor:
        return None
    # Autocast knows the plain operations only.
    return None if library() is None or torch.is_autocast_enabled("cpu") else run(*args, **kwargs)


def _dense(x: Any, large: bool = True) -> bool:
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.device.type == "cpu"
        and (not large or memory.takes(x.shape, x.dtype))
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _add(input: Tensor, other: Any = None, **more: Any) -> Tensor | None:
    if more or not _dense(input) or type(other) not in (Tensor, torch.nn.Parameter) or other.dtype != input.dtype:
        return None
    sizes = zip(reversed(other.shape), reversed(input.shape), strict=False)
    if other.dim() > 4 or any(own not in (1, size) for own, size in sizes):
        return None
    return torch.add(input, other, out=memory.empty(input.shape, input.dtype))


def _max_pool(
    input: Tensor, kernel_size: Any = None, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False,
    return_indices: Any = False,
) -> Tensor | None:  # fmt: skip
    if return_indices or kernel_size is None or not _dense(input):
        return None
    # The indices are as large as the result or twice that, and nobody wants them.
    arguments = [_pair(kernel_size), _pair(stride) if stride else [], _pair(padding), _pair(dilation), ceil_mode]
    shape = torch.ops.aten.max_pool2d_with_indices(input.to("meta"), *arguments)[0].shape
    out, indices = memory.empty(shape, input.dtype), memory.empty(shape, torch.int64)
    torch.ops.aten.max_pool2d_with_indices.out(input, *arguments, out=out, indices=indices)
    return out


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _batch_norm(
    input: Tensor, mean: Any = None, variance: Any = None, weight: Any = None, bias: Any = None, training: Any = False,
    momentum: Any = 0.1, eps: Any = 1e-5,
) -> Tensor | None:  # fmt: skip
    if training or mean is None or variance is None or not _dense(input) or mean.dtype != input.dtype:
        return None
    out = memory.empty(input.shape, input.dtype)
    saved = input.new_empty(0), input.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        input, weight, bias, mean, variance, False, momentum, eps, out=out, save_mean=saved[0], save_invstd=saved[1]
    )
    return out


def _interpolate(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: Any = None, **more: Any
) -> Tensor | None:  # fmt: skip
    # The result is what is large. With one sample torch may take a map in channels_last for one that is not, by its strides, and
    # copy what its kernel made into the other order.
    if mode != "bilinear" or any(more.values()) or not _dense(input, large=False):
        return None
    height, width = input.shape[2:]
    scales: tuple[float | None, float | None] = (None, None)
    if size is not None and scale_factor is None:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
    elif size is None and isinstance(scale_factor, int | float) and scale_factor == int(scale_factor) > 0:
        height, width = height * int(scale_factor), width * int(scale_factor)
        scales = (float(scale_factor), float(scale_factor))
    else:
        return None
    shape = (*input.shape[:2], height, width)
    if not memory.takes(shape, input.dtype):
        return None
    out = memory.empty(shape, input.dtype)
    if shape == tuple(input.shape) and scales == (None, None):
        # Each value once its own plus three times 0 times another: itself, if it is finite.
        return out.copy_(input)
    torch.ops.aten.upsample_bilinear2d.out(input, shape[2:], bool(align_corners), *scales, out=out)
    return out


def _post(input: Tensor, *parts: Any, **more: Any) -> Tensor | None:
    if more or not _dense(input):
        return None
    return ops.post_into(memory.empty(input.shape, input.dtype), input, *parts)


_RUN: dict[Any, Callable[..., Tensor | None]] = {
    F.batch_norm: _batch_norm,
    F.interpolate: _interpolate,
    F.max_pool2d: _max_pool,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    ops.post: _post,
}
PLACED = frozenset(_RUN)
