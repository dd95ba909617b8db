"""Sums over space in one fixed order, step 1 of the definition (see ``bidensify.exact``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLOCK", "any_order", "block_sums", "wide"]

BLOCK = 64


def wide(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


# Set while the arithmetic is written out for another runtime, which has an order of its own.
_any_order: ContextVar[bool] = ContextVar("any_order", default=False)


@contextmanager
def any_order() -> Iterator[None]:
    """Within it sums are taken in whatever order ``torch.sum`` likes: a graph of a few nodes, equal to rounding."""
    token = _any_order.set(True)
    try:
        yield
    finally:
        _any_order.reset(token)


def block_sums(x: Tensor) -> Tensor:
    """Sums over the last dimension in the order of the definition.

    Args:
        x: (N, C, P) float32.

    Returns:
        (N, C) float64 (float32 on a device without it). On other devices than the CPU the order is torch's, all in float64.
    """
    if _any_order.get():
        return x.sum(-1)
    if x.device.type not in ("cpu", "meta"):
        # An order of small sums costs a GPU a launch for each; in float64 no order shows, and one launch does.
        return x.sum(-1, dtype=wide(x.device))
    rest = -x.shape[2] % BLOCK
    padded = F.pad(x, (0, rest)) if rest else x  # a pad of nothing would be a copy
    quads = padded.reshape(*x.shape[:2], -1, BLOCK // 4, 4)
    sums = (quads[..., 0] + quads[..., 1]) + (quads[..., 2] + quads[..., 3])
    blocks = sums[..., 0]
    for i in range(1, BLOCK // 4):
        blocks = blocks + sums[..., i]
    total: Tensor = blocks.to(wide(x.device)).sum(-1)
    return total
