"""Memory of packed layers' outputs: the kernel library keeps it from layer to layer and from run to run.

A packed network is so fast that filling fresh pages can be a third of its time, and whether the C library's allocator
hands out fresh pages depends on what the process did before. Outputs from 64 KiB up therefore lie in mappings of the
kernel library (csrc/packed/memory.cpp), which keeps as much as recent runs needed at once. They are torch tensors like others,
taken over through DLPack, whose memory goes back when their last view is gone, in any thread; their storage alone cannot
grow (``resize_`` to more elements is an error, as with every tensor whose memory is not torch's own).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from bidensify.kernels.library import library

__all__ = ["Room", "cast", "channels_last", "empty", "kept", "release_memory", "room", "takes"]

# Below, a tensor is a few pages at most, and taking it over costs more than they do.
_LEAST = 64 << 10
# DLPack's code and bits.
_DTYPES = {torch.float32: (2, 32), torch.bfloat16: (4, 16), torch.int64: (0, 64)}
_new_capsule: Any = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


def takes(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether ``empty`` has memory of the library for a tensor of this shape and dtype."""
    if dtype not in _DTYPES or library() is None:
        return False
    return shape[0] * shape[1] * shape[2] * shape[3] * _DTYPES[dtype][1] >= 8 * _LEAST


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``."""
    plain = type(x) is Tensor and x.dim() == 4 and x.device.type == "cpu" and x.dtype != dtype
    if not plain or torch.is_grad_enabled() or not takes(x.shape, dtype):
        return x.to(dtype)
    if torch.compiler.is_compiling() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.to(dtype)
    return empty(x.shape, dtype).copy_(x)


def channels_last(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) itself where it is dense in channels_last, else a copy that is."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return empty(x.shape, x.dtype).copy_(x)


class Room:
    """Memory for tensors of one shape and dtype, as often as they are wanted; made by ``room``."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._shape, self._dtype = tuple(shape), dtype
        self._made: Any = None
        if takes(shape, dtype):
            found = library()
            assert found is not None
            self._made, self._free = found.bd_tensor_new, found.bd_tensor_free
            self._arguments = ((ctypes.c_int64 * 4)(*shape), *_DTYPES[dtype])

    def empty(self) -> Tensor:
        """An uninitialized (N, C, H, W), channels_last, on the CPU."""
        made = None if self._made is None else self._made(*self._arguments)
        if made is None:
            return torch.empty(self._shape, dtype=self._dtype, memory_format=torch.channels_last)
        try:
            return from_dlpack(_new_capsule(made, b"dltensor", None))
        except BaseException:
            self._free(made)
            raise


@lru_cache(maxsize=1024)
def room(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Room:
    """See ``Room``."""
    return Room(shape, dtype)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized (N, C, H, W), channels_last, on the CPU."""
    return room(tuple(shape), dtype).empty()


def release_memory() -> None:
    """Gives the memory that is kept for outputs, and holds none, back to the system.

    What recent runs did not need goes back by itself; call this where a program goes on without running packed networks.
    """
    found = library()
    if found is not None:
        found.bd_memory_release()


def kept() -> tuple[int, int]:
    """Bytes in outputs that are alive, and bytes kept for outputs, with these."""
    live, total = ctypes.c_int64(), ctypes.c_int64()
    found = library()
    if found is not None:
        found.bd_memory_count(ctypes.byref(live), ctypes.byref(total))
    return live.value, total.value
