"""What ExecuTorch's own kernels would compute one element at a time, written as additions, which XNNPACK takes, and as joins, in
which whole runs are copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bidensify.deploy.runtimes.nodes import enlarged, valued

__all__ = ["for_xnnpack"]

_aten = torch.ops.aten
# The largest factor of an enlargement that is written so; XNNPACK joins no more tensors at once.
_MOST = 5


def for_xnnpack(graph: fx.Graph) -> None:
    """Sums of stacked tensors become additions in their order; nearest enlargements by whole factors, where sizes are fixed,
    repeat each pixel's channels, then each row. The values stay the same, but for the sum of an order that no runtime promises.
    """
    for node in list(graph.nodes):
        if node.target is _aten.sum.dim_IntList:
            _sum(graph, node)
        elif node.target is _aten.upsample_nearest2d.vec:
            _enlargement(graph, node)
    graph.eliminate_dead_code()


def _sum(graph: fx.Graph, node: fx.Node) -> None:
    stack: Any = node.args[0]
    if stack.target is not _aten.stack.default or len(stack.users) > 1 or len(node.args) > 2 or node.kwargs:
        return
    parts, value = stack.args[0], stack.meta["val"]
    axis = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    axes: Any = node.args[1] or []
    # Integers are summed in another type than theirs.
    if not value.is_floating_point() or len(parts) < 2:
        return
    if [each % value.dim() for each in axes] != [axis % value.dim()]:
        return
    # What is written into a part behind the stack is not in the sum.
    with graph.inserting_before(stack):
        total = parts[0]
        for part in parts[1:]:
            total = _call(graph, _aten.add.Tensor, total, part)
    node.replace_all_uses_with(total)


def _enlargement(graph: fx.Graph, node: fx.Node) -> None:
    given: Any = node.args[0]
    before, after = given.meta["val"], node.meta["val"]
    sizes = [*before.shape, *after.shape[2:]]
    if not all(isinstance(size, int) for size in sizes):
        return
    factors = enlarged(node, _MOST)
    if factors is None or factors == (1, 1):
        return
    n, c, h, _, rows, columns = sizes
    down, across = factors
    with graph.inserting_before(node):
        x = _call(graph, _aten.permute.default, given, [0, 2, 3, 1])
        if across > 1:
            x = _call(graph, _aten.cat.default, [x] * across, 3)
        x = _call(graph, _aten.reshape.default, x, [n, h, columns * c])
        if down > 1:
            x = _call(graph, _aten.cat.default, [x] * down, 2)
        x = _call(graph, _aten.reshape.default, x, [n, rows, columns, c])
        made = _call(graph, _aten.permute.default, x, [0, 3, 1, 2])
    node.replace_all_uses_with(made)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return valued(graph.call_function(target, args))
