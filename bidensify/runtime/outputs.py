"""Memory of packed layers' outputs: the kernel library keeps it from layer to layer and from run to run.

A packed network is so fast that filling fresh pages can be a third of its time, and whether the C library's allocator
hands out fresh pages depends on what the process did before. Outputs from a few KiB up therefore lie in mappings of the
kernel library (csrc/memory.cpp), which keeps as much as recent runs needed at once. They are torch tensors like others,
taken over through DLPack, whose memory goes back when their last view is gone, in any thread; their storage alone cannot
grow (``resize_`` to more elements is an error, as with every tensor whose memory is not torch's own).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = ["empty", "kept", "release_memory", "use"]

# Below, a tensor is a few pages at most, and taking it over costs more than they do.
_LEAST = 64 << 10
_DTYPES = {torch.float32: (0, 4), torch.bfloat16: (1, 2)}
_new_capsule: Any = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


_library: ctypes.CDLL | None = None


def use(library: ctypes.CDLL) -> None:
    """Takes memory from ``library`` from now on, unless it was built without it."""
    global _library
    if not hasattr(library, "bd_output_new"):
        return
    library.bd_output_new.argtypes = [ctypes.POINTER(ctypes.c_int64), ctypes.c_int32]
    library.bd_output_new.restype = ctypes.c_void_p
    library.bd_output_free.argtypes, library.bd_output_free.restype = [ctypes.c_void_p], None
    library.bd_memory_release.argtypes, library.bd_memory_release.restype = [], None
    library.bd_memory_count.argtypes = [ctypes.POINTER(ctypes.c_int64)] * 2
    library.bd_memory_count.restype = None
    _library = library


def empty(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """An uninitialized (N, C, H, W), channels_last, on the CPU."""
    number, size = _DTYPES.get(dtype, (0, 0))
    if _library is not None and shape[0] * shape[1] * shape[2] * shape[3] * size >= _LEAST:
        made = _library.bd_output_new((ctypes.c_int64 * 4)(*shape), number)
        if made is not None:
            try:
                return from_dlpack(_new_capsule(made, b"dltensor", None))
            except BaseException:
                _library.bd_output_free(made)
                raise
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def release_memory() -> None:
    """Gives the memory that is kept for outputs, and holds none, back to the system.

    What recent runs did not need goes back by itself; call this where a program goes on without running packed networks.
    """
    if _library is not None:
        _library.bd_memory_release()


def kept() -> tuple[int, int]:
    """Bytes in outputs that are alive, and bytes kept for outputs, with these."""
    live, total = ctypes.c_int64(), ctypes.c_int64()
    if _library is not None:
        _library.bd_memory_count(ctypes.byref(live), ctypes.byref(total))
    return live.value, total.value
