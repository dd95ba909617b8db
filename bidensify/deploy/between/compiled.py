"""``torch.compile`` of a packed network: what lies between its packed layers becomes a few fused loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bidensify._util.machine import has_compiler
from bidensify.errors import PackError
from bidensify.nn.binary_layer import state_of

__all__ = ["compile", "compiled"]


class _Call:
    """What calling the network does: the compiled forward, without gradients (freezing needs that)."""

    def __init__(self, model: nn.Module, dynamic: bool | None) -> None:
        self.run: Any = torch.compile(model._call_impl, dynamic=dynamic, options={"freezing": True})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.run(*args, **kwargs)


def compile(model: nn.Module, *, dynamic: bool | None = None) -> nn.Module:
    """Compiles a packed network with ``torch.compile``, in place: sums, upsampling, norms and activations between packed layers
    become few passes over memory, and the weights of float layers are constants in the order that their kernels read.

    The first call compiles, for half a minute to minutes; torch keeps what it compiled on disk (``TORCHINDUCTOR_CACHE_DIR``),
    so that the next process takes seconds. A single packed layer gives the same bits as before; a network differs from its eager
    self by rounding, since the float layers sum in another order. The network keeps its class and attributes, its ``state_dict``
    and its files; copies and files of it are not compiled.

    Args:
        model: a network that ``pack`` or ``from_pretrained`` returned.
        dynamic: None compiles for the first size of input, and for all sizes at the second; True for all at once; False for each.

    Returns:
        ``model``.

    Raises:
        PackError: ``model`` is not packed, or this machine has no C++ compiler, which torch needs.
    """
    if not isinstance(model, nn.Module) or state_of(model) != "packed":
        raise PackError(f"{type(model).__name__} is not packed; compile what pack() or from_pretrained() returned")
    if not has_compiler():
        raise PackError(
            "torch.compile needs a C++ compiler and there is none on the PATH; install g++, or run uncompiled"
        )
    model._compiled_call_impl = _Call(model, dynamic)
    return model


def compiled(model: nn.Module) -> bool:
    """Whether ``model`` is compiled by ``compile``."""
    return isinstance(model._compiled_call_impl, _Call)
