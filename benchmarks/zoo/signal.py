"""Counts the full-precision signals that join each binary layer's output, on the graph of the rewritten network itself.

Nothing here asks the planner: the network is recorded as it runs after the rewrite, and the only question asked of a
binary layer is whether it has a bypass. From each binary layer the walk goes forward through what neither mixes nor
replaces a signal (norms, activations, pooling, changes of shape, gates, scales). A residual add on the way joins one more
signal if its other side carries one. At whatever ends the walk (a layer, a concatenation, a product, the output) exactly
one signal must have joined: none is a lost signal, two a doubled one.

An add is residual if one side is the other's own earlier value (identity) or one layer away from it (projection), and
nothing between grows in resolution. Other adds fuse different signals, as the original network does; they join a signal
only for a layer that has none.
"""

from __future__ import annotations

import operator
import re

from torch import fx, nn

from bidensify.nn import BinaryLayer
from bidensify.rewrite.record.recorder import Record

__all__ = ["joined_signals"]

_SEES_THROUGH = re.compile(
    r"norm|relu|elu$|gelu|silu|swish|mish|dropout|droppath|drop_path|stochastic|identity|layerscale|layer_scale|pool|pad|"
    r"upsample|interpolate|pixel_?(un)?shuffle|permute|transpose|^view|reshape|flatten|squeeze|movedim|roll|contiguous|"
    r"clone|^to$|^float$|type_as|detach|chunk|split|unbind|getitem|^_item$|narrow|expand|^neg$|window|tanh$|sigmoid$|"
    r"^mean$|^alias|^half$|^T$|^mT$|affine|^scale",
    re.IGNORECASE,
)
_GATES = re.compile(r"sigmoid|softmax|tanh", re.IGNORECASE)
_GROWS = re.compile(r"upsample|interpolate|transpose\dd|pixel_?shuffle|fold|grid_sample", re.IGNORECASE)
_LIKE = ("expand_as", "type_as", "view_as", "reshape_as")
_PARTS = re.compile(r"^(chunk|split|split_with_sizes|tensor_split|unbind|getitem|narrow|select|index_select)$")
_SUMS = ("add", "sub", "rsub")


class _Graph:
    """A record with what the walk asks of its nodes."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.nodes = list(record.graph.nodes)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.constants: set[fx.Node] = set()
        for node in self.nodes:
            unfed = node.op == "get_attr" or (node.op == "placeholder" and node.target == "constant")
            if unfed or (node.op == "call_function" and self.constants.issuperset(node.all_input_nodes)):
                self.constants.add(node)
        self.before: dict[fx.Node, int] = {}
        for node in self.nodes:
            mask = 1 << self.number[node]
            for source in self.computed(node):
                mask |= self.before[source]
            self.before[node] = mask
        self.gates = self._gate_nodes()

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.record.modules[str(node.target)] if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        module = self.module(node)
        if module is not None:
            return type(module).__name__
        name = str(getattr(node.target, "__name__", node.target))
        if name == "__get__":
            return str(getattr(getattr(node.target, "__self__", None), "__name__", name))
        stripped = name.strip("_")
        return name if name == "_item" else re.sub(r"^[ir](add|mul|sub|truediv)$", r"\1", stripped)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(getattr(node.meta.get("spec"), "shape", ()))

    def computed(self, node: fx.Node) -> list[fx.Node]:
        """The arguments that come from the input: parameters, buffers and constants carry no signal."""
        return [item for item in node.all_input_nodes if item not in self.constants]

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """``computed``, less what only lends its shape or type."""
        return self.computed(node)[:1] if self.name(node) in _LIKE else self.computed(node)

    def is_layer(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        return node.op == "call_function" and re.match(r"conv|linear$", self.name(node)) is not None

    def comes_before(self, early: fx.Node, late: fx.Node) -> bool:
        return bool(self.before[late] >> self.number[early] & 1)

    def data_of_product(self, node: fx.Node) -> fx.Node | None:
        """The side of a product that a gate, a scale or a mask multiplies; None for a product of two signals."""
        sources = self.computed(node)
        if len(sources) == 1:
            return sources[0]
        if len(sources) != 2:
            return None
        for data, gate in (sources, sources[::-1]):
            if self.shape(data) == self.shape(node) and self._is_gate(gate):
                return data
        return None

    def _is_gate(self, node: fx.Node) -> bool:
        while True:
            if _GATES.search(self.name(node)):
                return True
            sources = self.sources(node)
            if len(sources) != 1 or self.is_layer(node) or node.op == "placeholder":
                return False
            node = sources[0]

    def _gate_nodes(self) -> set[fx.Node]:
        """What is computed only to gate: it reads the signal, and the signal does not go through it."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if self.name(node) in ("mul", "truediv") and len(self.computed(node)) == 2:
                data = self.data_of_product(node)
                if data is not None:
                    gate = next((item for item in self.computed(node) if item is not data), data)
                    only = self.before[gate] & ~self.before[data]
                    found |= {each for each in self.nodes[: self.number[gate] + 1] if only >> self.number[each] & 1}
        return found

    def source(self, node: fx.Node) -> fx.Node | None:
        """The one value whose signal a node hands on, or None where it starts, mixes or ends one."""
        if self.is_layer(node) or node.op in ("placeholder", "output"):
            return None
        name = self.name(node)
        if name in ("mul", "multiply", "truediv", "div"):
            return self.data_of_product(node)
        sources = self.sources(node)
        if len(sources) == 1 and (name in _SUMS or _SEES_THROUGH.search(name) or node.target is operator.getitem):
            return sources[0]
        return None

    def is_sum(self, node: fx.Node) -> bool:
        return node.op == "call_function" and self.name(node) in _SUMS and len(self.computed(node)) == 2

    # residual adds

    def fork_of(self, add: fx.Node, side: fx.Node, other: fx.Node) -> fx.Node | None:
        """Where ``other``, the shortcut of a residual add, left the path that leads to ``side``; None if it is none."""
        current: fx.Node | None = other
        layers = 0
        while current is not None and not self.comes_before(current, side):
            if self.is_layer(current):
                layers += 1
                current = self.computed(current)[0] if layers == 1 else None
            elif self._is_part(current):
                # Another part of the channels is another signal.
                current = None
            else:
                current = self.source(current)
        if current is None or self._grows(current, side) or self._grows(current, other):
            return None
        return current if self._works(current, side) else None

    def _is_part(self, node: fx.Node) -> bool:
        """Whether a node is a part of its source's channels."""
        source = self.source(node)
        while source is not None and not self.shape(source):
            source = self.source(source)
        if source is None or not (_PARTS.match(self.name(node)) or self.name(node) == "_item"):
            return False
        before, after = self.shape(source), self.shape(node)
        return len(before) == len(after) == 4 and after[1] < before[1]

    def _between(self, early: fx.Node, late: fx.Node) -> list[fx.Node]:
        nodes = self.nodes[self.number[early] + 1 : self.number[late] + 1]
        return [node for node in nodes if self.comes_before(node, late) and self.comes_before(early, node)]

    def _works(self, early: fx.Node, late: fx.Node) -> bool:
        return any(self.is_layer(node) for node in self._between(early, late))

    def _grows(self, early: fx.Node, late: fx.Node) -> bool:
        for node in self._between(early, late):
            if _GROWS.search(self.name(node)) and node not in self.gates:
                before = self.shape(self.computed(node)[0])
                if self._pixels(self.shape(node)) > self._pixels(before):
                    return True
        return False

    @staticmethod
    def _pixels(shape: tuple[int, ...]) -> int:
        return shape[-1] * shape[-2] if len(shape) > 2 else 0

    def carries(self, node: fx.Node) -> bool:
        """Whether a value holds a full-precision signal: not so if it is a binary layer's branch alone."""
        while True:
            module = self.module(node)
            if isinstance(module, BinaryLayer):
                return module.bypass is not None
            if self.is_sum(node):
                return any(self.carries(item) for item in self.computed(node))
            source = self.source(node)
            if source is None:
                return True
            node = source


def joined_signals(record: Record) -> dict[str, list[int]]:
    """Path of each binary layer -> numbers of full-precision signals found on the ways from it (all must be 1).

    The list is empty for a layer whose output goes nowhere (an encoder's stage that no decoder reads).

    Args:
        record: of the rewritten network.
    """
    graph = _Graph(record)
    found: dict[str, list[int]] = {}
    for node in graph.nodes:
        module = graph.module(node)
        if isinstance(module, BinaryLayer):
            counts = _walk(graph, node, int(module.bypass is not None))
            found[str(node.target)] = sorted({*found.get(str(node.target), []), *counts})
    return found


def _walk(graph: _Graph, layer: fx.Node, joined: int) -> set[int]:
    counts: set[int] = set()
    seen: set[tuple[fx.Node, int]] = set()
    stack = [(layer, joined)]
    while stack:
        node, joined = stack.pop()
        if (node, joined) in seen:
            continue
        seen.add((node, joined))
        for user in node.users:
            if user in graph.gates:
                continue
            if graph.is_sum(user):
                other = next((item for item in graph.computed(user) if item is not node), node)
                step = _join(graph, layer, node, user, other, joined)
                if step is None:
                    counts.add(joined)
                else:
                    stack.append((user, step))
            elif graph.source(user) is node:
                stack.append((user, joined))
            else:
                counts.add(joined)
    return counts


def _join(graph: _Graph, layer: fx.Node, node: fx.Node, add: fx.Node, other: fx.Node, joined: int) -> int | None:
    """The number of signals behind an add, or None where the walk ends at it."""
    fork = graph.fork_of(add, node, other)
    if fork is None:
        # The walked value may itself be the projection of a shortcut.
        fork = graph.fork_of(add, other, node)
    if fork is not None and fork is not layer and graph.comes_before(fork, layer):
        if graph.name(add) == "add":
            return joined + int(graph.carries(other))
        # A difference of two sides that both carry a signal carries none.
        return abs(joined - int(graph.carries(other)))
    return int(graph.carries(other)) if joined == 0 else None
