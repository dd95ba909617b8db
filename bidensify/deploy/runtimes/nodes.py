"""New nodes of captured programs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["valued"]


def valued(node: fx.Node) -> fx.Node:
    """Gives a new node its fake value, of those of its arguments, and returns it."""
    args, kwargs = tree_map_only(fx.Node, lambda each: each.meta["val"], (node.args, node.kwargs))
    one: Any = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    target: Any = node.target
    with one.fake_mode:
        node.meta["val"] = target(*args, **kwargs)
    return node
