"""Tokens (N, H * W, C) that are turned into images before packed layers, and back behind them: packed layers read and write them.

In memory tokens are an image in channels_last, so that nothing has to move between them. But a program turns (N, T, C) into
(N, C, T) and calls that an image (N, C, H, W), and packed layers read channels_last, so that it is turned back: two copies
each way. A spec of version 2 (``deploy/operator.py``) lets a layer read (N, H, W, C), another name of the tokens' own memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from bidensify.deploy.operator import PARTS_INNER, RESULT_INNER
from bidensify.deploy.runtimes.nodes import valued
from bidensify.deploy.runtimes.prepare import LINEAR, of_images
from bidensify.deploy.runtimes.writes import Writes

__all__ = ["lasting", "read_tokens"]

_aten = torch.ops.aten
_PACKED = torch.ops.bidensify.packed_layer.default
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten.flatten.using_ints)
_COPIES = (_aten.contiguous.default, _aten.clone.default)
# torchao defines them where it is imported.
_ROUNDING = ("quantized_decomposed.quantize_per_tensor.default", "quantized_decomposed.dequantize_per_tensor.default")


def lasting(spec: Sequence[int]) -> tuple[bool, bool]:
    """Whether a packed layer's parts, and its result, lie in channels_last; else in the order of their dimensions."""
    inner = spec[1] if spec[0] == 2 else PARTS_INNER | RESULT_INNER if spec[1] == LINEAR else 0
    return not inner & PARTS_INNER, not inner & RESULT_INNER


def read_tokens(graph: fx.Graph) -> int:
    """Lets packed layers read and write tokens; returns how many do. What is turned there and back is not turned at all."""
    turned, changed = _Turned(graph), 0
    for node in list(graph.nodes):
        if node.target is _PACKED and of_images(node.args[4]):
            changed += turned.packed(node)
        else:
            turned.other(node)
    graph.eliminate_dead_code()
    return changed


class _Turned:
    """A walk through a graph that keeps, of each turned tensor, what it was turned from: the node of (N, T, C) for (N, C, T), of
    (N, H, W, C) for (N, C, H, W)."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph, self._writes = graph, Writes(graph)
        self._end = next(node for node in reversed(graph.nodes) if node.op == "output")
        self._inner: dict[Any, fx.Node] = {}

    def packed(self, node: Any) -> bool:
        """Has the layer read tokens where all its parts are some, and write them where nothing reads an image."""
        parts, ints, inner = node.args[0], node.args[4], 0
        if all(part in self._inner for part in parts):
            parts, inner = [self._inner[part] for part in parts], PARTS_INNER
        if node.args[7] is None and node.users and all(self._wants_tokens(user) for user in node.users):
            inner |= RESULT_INNER
        if not inner:
            return False
        made = self._made(node, _PACKED, (parts, *node.args[1:4], [2, inner, *ints[1:]], *node.args[5:]))
        if inner & RESULT_INNER:
            self._inner[node] = made
        else:
            node.replace_all_uses_with(made)
        return True

    def other(self, node: Any) -> None:
        """Keeps what a turn or a view is of, and takes that for what turns it back."""
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return
        given, order = node.args[0], _order(node)
        if order is not None and given in self._inner and order == _back(order) and not _returned(node):
            node.replace_all_uses_with(self._inner[given])
        elif order is not None and order == _forth(order):
            self._inner[node] = given
        elif given in self._inner and _pointwise(node):
            self._inner[node] = self._made(node, node.target, (self._inner[given], *node.args[1:]), node.kwargs)
        elif given in self._inner and self._looks(node):
            size = _size(node)
            inner = self._inner[given]
            self._inner[node] = inner if size is None else self._made(node, _aten.reshape.default, (inner, size))

    def _looks(self, node: Any) -> bool:
        """Whether a node is its input with other names for the pixels."""
        if node.target in _COPIES:
            # What is written later changes either the copy or what it is of.
            return not self._writes.between([node.args[0], node], node, self._end)
        return _size(node) is not None

    def _wants_tokens(self, node: Any) -> bool:
        """Whether a reader of an image turns it, or all that read its view do."""
        order = _order(node)
        if order is not None:
            return order == _back(order) and not _returned(node)
        passes = _pointwise(node) or self._looks(node)
        return passes and bool(node.users) and all(self._wants_tokens(user) for user in node.users)

    def _made(
        self, after: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        with self._graph.inserting_after(after):
            return valued(self._graph.call_function(target, args, dict(kwargs or {})))


def _pointwise(node: Any) -> bool:
    """Whether each value of a result comes of one value of one tensor: an activation, int8's rounding."""
    if any(isinstance(leaf, fx.Node) for leaf in tree_leaves((node.args[1:], node.kwargs))):
        return False
    tags = getattr(node.target, "tags", ())
    return str(node.target) in _ROUNDING or (torch.Tag.pointwise in tags and torch.Tag.inplace not in tags)


def _order(node: Any) -> list[int] | None:
    """Of a transpose or permute of 3 or 4 dimensions: the input's, in the order of the output's."""
    value = node.meta.get("val")
    dims = value.dim() if isinstance(value, Tensor) else 0
    if dims not in (3, 4) or node.target not in (_aten.permute.default, _aten.transpose.int):
        return None
    if node.target is _aten.permute.default:
        return [axis % dims for axis in node.args[1]]
    order, (a, b) = list(range(dims)), (axis % dims for axis in node.args[1:3])
    order[a], order[b] = order[b], order[a]
    return order


def _forth(order: list[int]) -> list[int]:
    """Of tokens to an image."""
    return [0, len(order) - 1, *range(1, len(order) - 1)]


def _back(order: list[int]) -> list[int]:
    """Of an image to tokens."""
    return [0, *range(2, len(order)), 1]


def _size(node: Any) -> list[Any] | None:
    """Of a view that leaves samples and channels as they are, (N, C, ...): the tokens' size [N, ..., C]; None for all else."""
    if node.target not in _VIEWS:
        return None
    given, value = node.args[0].meta["val"], node.meta["val"]
    if value.dim() not in (3, 4) or given.dim() not in (3, 4):
        return None
    n, c = value.shape[:2]
    if not isinstance(n, int) or not isinstance(c, int) or tuple(given.shape[:2]) != (n, c):
        return None
    if value.dim() == 3:
        return [n, -1, c]
    return None if node.target is _aten.flatten.using_ints else [n, *node.args[1][2:], c]


def _returned(node: fx.Node) -> bool:
    """A program's outputs go by the names of their nodes."""
    return any(user.op == "output" for user in node.users)
