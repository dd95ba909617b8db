"""The shared library of training kernels: found by path, called through ctypes.

Nothing here is needed: without the library (or on another device or dtype) the same equations run as torch operations.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Codes",
    "Finish",
    "Geometry",
    "Post",
    "PostGrad",
    "Shape",
    "available",
    "call",
    "geometry",
    "instruction_set",
    "instruction_sets",
    "supports",
    "use",
]

VARIABLE = "BIDENSIFY_TRAIN_KERNELS"
_ABI = 2
_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Shape(ctypes.Structure):
    """``bdt_shape``."""

    _fields_ = [("n", _L), ("c", _L), ("s", _L), ("last", _I), ("half", _I), ("threads", _I)]


class Dab(ctypes.Structure):
    """``bdt_dab``."""

    _fields_ = [
        ("scale", _I),
        ("groups", _L),
        *((name, _P) for name in ("x", "k", "b", "a", "mean", "beta", "distance", "alpha", "y", "fused")),
    ]


class DabGrad(ctypes.Structure):
    """``bdt_dab_grad``."""

    _fields_ = [
        ("scale", _I),
        ("groups", _L),
        *((name, _P) for name in ("x", "grad", "grad_fused", "mean", "beta", "distance", "alpha")),
        *((name, _P) for name in ("grad_x", "grad_k", "grad_b", "grad_a")),
    ]


class Post(ctypes.Structure):
    """``bdt_post``."""

    _fields_ = [
        ("eps", ctypes.c_double),
        *((name, _P) for name in ("x", "bypass", "mean", "variance", "weight", "bias")),
        *((name, _P) for name in ("bias_in", "slope", "bias_out", "y")),
    ]


class PostGrad(ctypes.Structure):
    """``bdt_post_grad``."""

    _fields_ = [
        ("forward", Post),
        *((name, _P) for name in ("grad", "grad_x", "grad_bypass")),
        *((f"grad_{name}", _P) for name in ("weight", "bias", "bias_in", "slope", "bias_out")),
    ]


class Codes(ctypes.Structure):
    """``bdt_codes``."""

    _fields_ = [(name, _P) for name in ("x", "k", "b", "a", "beta", "alpha", "y")]


class Finish(ctypes.Structure):
    """``bdt_finish``."""

    _fields_ = [(name, _P) for name in ("dot", "half", "extra", "scale", "bias", "slope", "post", "y")]


def _candidates() -> list[Path]:
    folders = [Path(__file__).parent]
    # An editable install leaves what it compiled in site-packages, and the Python files where they are.
    folders += [Path(place) / "bidensify" / "nn" for place in sys.path if place]
    return [folder / "_train.so" for folder in folders]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    if os.environ.get(VARIABLE, "1") == "0":
        return None
    reason = "they were not built"
    for path in _candidates():
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            found = library.bdt_abi_version()
        except (OSError, AttributeError) as error:
            reason = f"{path.name} cannot be loaded ({error})"
            continue
        if found != _ABI:
            reason = f"{path.name} is of interface {found}, this package needs {_ABI}"
            continue
        library.bdt_instruction_set.restype = ctypes.c_char_p
        library.bdt_moments.argtypes = [_P, _P, _P, _P]
        library.bdt_weight_forward.argtypes = [_L, _L, _I, _P, _I, _P, _P]
        library.bdt_eval_signs.argtypes = [_L, _L, _I, _P, _P, _P]
        library.bdt_weight_backward.argtypes = [_L, _L, _I, _P, _P, _P, _P]
        return library
    warnings.warn(
        f"bidensify trains on the CPU without its kernels, about a third slower and with more memory: {reason}. To get "
        f"them, reinstall bidensify where a C++17 compiler is on the PATH; {VARIABLE}=0 says that this is as intended",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def available() -> bool:
    """Whether the library is in use. BIDENSIFY_TRAIN_KERNELS=0 in the environment leaves it out."""
    return _library() is not None


def instruction_set() -> str:
    """ "avx512", "avx2", "portable", or "none" where there is no library."""
    library = _library()
    return "none" if library is None else str(library.bdt_instruction_set().decode())


def supports(x: Tensor) -> bool:
    """Whether the kernels take ``x``: float32 or bfloat16 on the CPU, outside of compilation, tracing and export."""
    return (
        x.device.type == "cpu"
        and (x.dtype == torch.float32 or x.dtype == torch.bfloat16)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and _library() is not None
        and x.numel() > 0
    )


def instruction_sets() -> tuple[str, ...]:
    """Every instruction set that this processor runs, fastest first."""
    library = _library()
    if library is None:
        return ()
    chosen = instruction_set()
    found = tuple(name for name in ("avx512", "avx2", "portable") if library.bdt_use(name.encode()) == 0)
    use(chosen)
    return found


def use(name: str) -> None:
    """Computes with one instruction set from now on (all give the same to rounding; for tests and comparisons).

    Raises:
        ValueError: the library has it not, or this processor does not run it.
    """
    library = _library()
    if library is None or library.bdt_use(name.encode()):
        raise ValueError(f"instruction set {name!r} is not among {instruction_sets()}")


class Geometry(NamedTuple):
    """(N, C, S) of a dense tensor; ``last``: channels are innermost in memory."""

    n: int
    c: int
    s: int
    last: bool

    def shape(self, x: Tensor) -> Shape:
        """As the kernels take it."""
        return Shape(self.n, self.c, self.s, self.last, x.dtype == torch.bfloat16, torch.get_num_threads())


def geometry(x: Tensor, dim: int) -> Geometry | None:
    """The geometry of ``x`` with its channels on ``dim`` (1 or -1), or None where it is not dense in a known order."""
    if dim == -1:
        rest = math.prod(x.shape[1:-1])
        return Geometry(x.shape[0], x.shape[-1], rest, True) if x.dim() > 1 and x.is_contiguous() else None
    if x.dim() < 2:
        return None
    if x.is_contiguous():
        return Geometry(x.shape[0], x.shape[1], math.prod(x.shape[2:]), False)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return Geometry(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], True)
    return None


def call(name: str, *arguments: object) -> None:
    """Runs a kernel.

    Raises:
        RuntimeError: the kernel refused its arguments or found no memory.
    """
    library = _library()
    assert library is not None
    status = getattr(library, name)(*arguments)
    if status:
        reason = "no memory" if status == 2 else f"status {status}"
        raise RuntimeError(f"training kernel {name} failed: {reason}")
