"""Binarized activations and weights are not kept for the backward pass of a convolution but made again in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Recomputed"]


class Recomputed:
    """Keeps tensors that a convolution wants to save out of memory: they are made again in the backward pass.

    ``add`` names a tensor and what remakes it; inside ``hooks()`` autograd saves these as recipes. An input changed in
    place in between is noticed, as autograd notices it for tensors that it saves itself.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, Tensor, int, Callable[[], Tensor]]] = []

    def add(self, made: Tensor, source: Tensor, remake: Callable[[], Tensor]) -> None:
        """``remake()`` gives ``made`` again, in the same memory order, as long as ``source`` is unchanged."""
        # Without autograd nothing is saved, and tensors of inference mode have no version.
        if torch.is_grad_enabled():
            self._known.append((made, source, source._version, remake))

    def hooks(self) -> AbstractContextManager[Any]:
        """The context in which the convolution runs."""
        return saved_tensors_hooks(self._pack, _unpack) if torch.is_grad_enabled() else nullcontext()

    def forget(self) -> None:
        """Drops the tensors themselves after the convolution ran."""
        self._known.clear()

    def _pack(self, saved: Tensor) -> Any:
        if type(saved) is not Tensor:
            # Fake and other wrapped tensors have no memory of their own to tell them apart by.
            return saved
        for made, source, version, remake in self._known:
            if (
                saved.data_ptr() == made.data_ptr()
                and saved.numel() == made.numel()
                and saved.dtype == made.dtype
                and not saved.is_neg()
            ):
                return source, version, remake, saved.shape, saved.stride()
        return saved


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    source, version, remake, shape, stride = packed
    if source._version != version:
        raise RuntimeError(
            f"one of the variables needed for gradient computation has been modified by an inplace operation: a "
            f"binary layer's input or latent weight of shape {tuple(source.shape)} is at version {source._version}; "
            f"expected version {version}. Change a copy, or change it after backward()"
        )
    remade: Tensor = remake().as_strided(shape, stride)
    return remade
