"""What a program writes in place: programs of ``torch.export`` still hold such operators."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

__all__ = ["Writes"]


class Writes:
    """Where in a graph values change, with all that share their memory: views, and what in-place operators return."""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._same: dict[fx.Node, fx.Node] = {}
        found = []
        for node in graph.nodes:
            for value, written in _shared(node):
                self._same[self._memory(value)] = self._memory(node)
                if written:
                    found.append(node)
        self._writes = [(self._memory(node), self._order[node]) for node in found]

    def _memory(self, node: fx.Node) -> fx.Node:
        while node in self._same and self._same[node] is not node:
            node = self._same[node]
        return node

    def between(self, values: Any, first: fx.Node, last: fx.Node) -> bool:
        """Whether one of ``values`` changes between two operators."""
        memories = {self._memory(value) for value in values}
        low, high = self._order[first], self._order[last]
        return any(memory in memories and low < position < high for memory, position in self._writes)


def _shared(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """(input, whether it is written) of those inputs whose memory an operator gives on or writes."""
    if node.op != "call_function":
        return
    if isinstance(node.target, torch._ops.OpOverload):
        for i, argument in enumerate(node.target._schema.arguments):
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            # In evaluation a dropout is its input.
            if argument.alias_info is not None or node.target is torch.ops.aten.dropout.default:
                written = argument.alias_info is not None and argument.alias_info.is_write
                yield from ((leaf, written) for leaf in tree_leaves(value) if isinstance(leaf, fx.Node))
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        # What lies inside may write.
        yield from ((value, True) for value in node.all_input_nodes)
    elif node.target is operator.getitem:
        yield node.all_input_nodes[0], False
