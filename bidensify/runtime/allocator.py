"""The C library's allocator, which decides whether a network's temporary tensors are fresh pages in every run."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

# <malloc.h> of glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_PAD = 64 << 20
# glibc takes no more than half a heap for the size from which a block is mapped on its own.
_LARGEST = (1 << 30, 32 << 20)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks for the next tensor in place of giving their pages back to the system.

    A packed network is so fast that filling fresh pages can be a third of its time. It is a setting of the whole process and
    costs resident memory, so call it once at the start of a program that runs networks, and not from a library.

    Returns:
        Whether the C library is glibc and took the settings; elsewhere nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    took = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)
    return bool(took and mallopt(_TRIM_THRESHOLD, _LARGEST[0]) and mallopt(_TOP_PAD, _PAD))
