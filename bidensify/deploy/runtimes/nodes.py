"""Nodes of captured programs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["enlarged", "same_size", "valued"]


def valued(node: fx.Node) -> fx.Node:
    """Gives a new node its fake value, of those of its arguments, and returns it."""
    args, kwargs = tree_map_only(fx.Node, lambda each: each.meta["val"], (node.args, node.kwargs))
    one: Any = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    target: Any = node.target
    with one.fake_mode:
        node.meta["val"] = target(*args, **kwargs)
    return node


def same_size(a: Tensor, b: Any) -> bool:
    """Whether ``b`` is a tensor of the same size, for certain where sizes vary."""
    return (
        isinstance(b, Tensor)
        and a.dim() == b.dim()
        and all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape))
    )


def enlarged(node: fx.Node, most: int) -> tuple[int, int] | None:
    """The whole factors, up to ``most``, by which an ``upsample_nearest2d.vec`` repeats rows and columns; None: it does not.

    Which pixel is the nearest follows from the scale that was asked for, and 5 pixels times 4.1 are 20, too.
    """
    given: Any = node.args[0]
    before, after = given.meta["val"].shape[2:], node.meta["val"].shape[2:]
    scales: Any = (node.args[2] if len(node.args) > 2 else node.kwargs.get("scale_factors")) or [None, None]
    found = []
    for old, new, scale in zip(before, after, scales, strict=True):
        times = next((k for k in range(1, most + 1) if statically_known_true(new == k * old)), None)
        if times is None or scale not in (None, times):
            return None
        found.append(times)
    return found[0], found[1]
