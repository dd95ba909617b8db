"""Which tensors the kernels of training and of evaluation take, and with which instruction set they run."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from bidensify.kernels.library import training_library
from bidensify.kernels.structures import Shape

__all__ = ["Geometry", "available", "dense", "geometry", "instruction_set", "instruction_sets", "supports", "use"]

VARIABLE = "BIDENSIFY_TRAIN_KERNELS"


def available() -> bool:
    """Whether the kernels are in use. BIDENSIFY_TRAIN_KERNELS=0 in the environment leaves them out."""
    return os.environ.get(VARIABLE, "1") != "0" and training_library() is not None


def supports(x: Tensor) -> bool:
    """Whether the kernels take ``x``: float32 or bfloat16 on the CPU, outside of compilation, tracing and export."""
    return (
        x.device.type == "cpu"
        and (x.dtype == torch.float32 or x.dtype == torch.bfloat16)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and available()
        and x.numel() > 0
    )


def instruction_set() -> str:
    """ "avx512", "avx2", "portable", or "none" where there is no library."""
    found = training_library()
    return "none" if found is None else str(found.bdt_instruction_set().decode())


def instruction_sets() -> tuple[str, ...]:
    """Every instruction set that this processor runs, fastest first."""
    loaded = training_library()
    if loaded is None:
        return ()
    chosen = instruction_set()
    found = tuple(name for name in ("avx512", "avx2", "portable") if loaded.bdt_use(name.encode()) == 0)
    use(chosen)
    return found


def use(name: str) -> None:
    """Computes with one instruction set from now on (all give the same to rounding; for tests and comparisons).

    Raises:
        ValueError: the library has it not, or this processor does not run it.
    """
    loaded = training_library()
    if loaded is None or loaded.bdt_use(name.encode()):
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
        rest = math.prod(x.shape[2:])
        # Maps of one pixel lie the same in both orders; kernels that may leave values out do so with channels innermost.
        return Geometry(x.shape[0], x.shape[1], rest, rest == 1 and x.dim() == 4)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return Geometry(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], True)
    return None


def dense(x: Tensor, dim: int) -> Tensor:
    """``x``, copied where its strides are not those of a dense tensor."""
    return x if geometry(x, dim) is not None else x.contiguous()
