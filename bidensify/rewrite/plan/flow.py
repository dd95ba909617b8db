"""Questions about a recorded graph: what a node is, what follows it, what it came from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from math import prod
from typing import cast

from torch import fx, nn

from bidensify.rewrite import kinds
from bidensify.rewrite.record.recorded import Record, Scope, TensorSpec, plain_name, scope_of

__all__ = ["Flow"]

_SHAPE_FUNCTIONS = {
    "permute", "transpose", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "movedim", "T", "mT",
}  # fmt: skip


class Flow:
    """A record with questions answered about it."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.calls = record.module_nodes()
        self.order = {node: number for number, node in enumerate(record.graph.nodes)}
        self._behind_layer: dict[fx.Node, bool] = {}
        self._reads_input: dict[fx.Node, bool] = {}

    # what a node is

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a call_module node calls."""
        return self.record.modules[str(node.target)] if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        """The class name of a called module, or the plain name of a function."""
        module = self.module(node)
        if module is not None:
            return type(module).__name__
        return plain_name(node.target) if node.op == "call_function" else node.op

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a node's tensor, or None where it gave several."""
        spec = node.meta.get("spec")
        return spec.shape if isinstance(spec, TensorSpec) else None

    def _what(self, node: fx.Node) -> nn.Module | str:
        """What ``kinds`` is asked about: the module, or the function's name."""
        module = self.module(node)
        return module if module is not None else self.name(node) if node.op == "call_function" else ""

    def is_layer(self, node: fx.Node) -> bool:
        """Whether a node is a convolution or a linear layer."""
        return kinds.is_layer(self._what(node))

    def is_norm(self, node: fx.Node) -> bool:
        """Whether a node normalises."""
        return kinds.is_norm(self._what(node))

    def more_than_norm(self, node: fx.Node) -> bool:
        """Whether a node that normalises does more that a signal may be lost in (a ReLU of its own, dropped values)."""
        module = self.module(node)
        return module is not None and bool(kinds.more_than_norm(module))

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a node is an activation of the ReLU family."""
        return kinds.is_activation(self._what(node))

    def is_gate(self, node: fx.Node) -> bool:
        """Whether a node is a sigmoid, softmax or the like."""
        return kinds.is_gate(self._what(node))

    def is_hand_written_gate(self, node: fx.Node) -> bool:
        """Whether a node bounds its tensor on both sides behind the add of a number: relu6(x + 3) of a sigmoid by hand."""
        source = self.data_input(node)
        return (
            self.name(node).lower() in ("relu6", "hardtanh", "clamp", "clip")
            and source is not None
            and self.name(source) == "add"
            and self.is_scaling(source)
        )

    def is_pass(self, node: fx.Node) -> bool:
        """Whether a node hands its (single) tensor through in evaluation mode."""
        return kinds.is_pass(self._what(node))

    def drops(self, node: fx.Node) -> bool:
        """Whether a node drops values in training: in front of it a signal must not be the only one."""
        return kinds.drops(self.module(node))

    def is_scaling(self, node: fx.Node) -> bool:
        """Whether a node multiplies its one tensor by a number or a parameter of one value, or adds one (``sum`` begins at 0)."""
        if node.op != "call_function" or self.name(node) not in ("mul", "div", "add", "sub"):
            return False
        data = [item for item in self.tensors(node) if item.op != "get_attr"]
        others = [item for item in self.tensors(node) if item.op == "get_attr"]
        return len(data) == 1 and all(self.shape(item) in ((), (1,)) for item in others)

    def is_part(self, node: fx.Node) -> bool:
        """Whether a node is a slice of its tensor's channels."""
        source = self.data_input(node)
        before, after = self.shape(source) if source is not None else None, self.shape(node)
        if node.op != "call_function" or self.name(node) not in ("getitem", "narrow") or not before or not after:
            return False
        return len(before) == len(after) == 4 and after[1] < before[1]

    def is_reorder(self, node: fx.Node) -> bool:
        """Whether a node only changes the shape or the order of dimensions."""
        return node.op == "call_function" and self.name(node) in _SHAPE_FUNCTIONS

    def is_move(self, node: fx.Node) -> bool:
        """Whether a node shifts, crops or pads the positions of its tensor, as windowed attention does."""
        return node.op == "call_function" and self.name(node) in ("roll", "pad", "getitem", "narrow")

    def is_resize(self, node: fx.Node) -> bool:
        """Whether a node resamples its one map."""
        return "upsampl" in self.name(node).lower() or self.name(node) in ("interpolate", "resize")

    def is_add(self, node: fx.Node, names: tuple[str, ...] = ("add",)) -> bool:
        """Whether a node adds two tensors of one shape, weighted or not; with other ``names``, takes one from the other."""
        if node.op != "call_function" or self.name(node) not in names or len(self.tensors(node)) != 2:
            return False
        first, second = self.tensors(node)
        return self.shape(first) is not None and self.shape(first) == self.shape(second) == self.shape(node)

    def layer_scale(self, node: fx.Node) -> str | None:
        """The path of the per-channel parameter that a node multiplies by (LayerScale), or None."""
        module = self.module(node)
        if module is not None:
            if not kinds.is_layer_scale(module):
                return None
            names = [name for name, value in module._parameters.items() if value is not None]
            return f"{node.target}.{names[0]}" if len(names) == 1 else None
        if node.op != "call_function" or self.name(node) != "mul" or len(self.tensors(node)) != 2:
            return None
        for item, other in (self.tensors(node), self.tensors(node)[::-1]):
            source = item
            while source.op == "call_function" and self.is_reorder(source):
                source = self.tensors(source)[0]
            if source.op == "get_attr" and source.target != "constant":
                count = 1
                for size in self.shape(source) or ():
                    count *= size
                shape = self.shape(other) or ()
                if count > 1 and self.shape(node) == shape and count in (shape[-1:] + shape[1:2]):
                    return str(source.target)
        return None

    def gated(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """(data, gate) of a product whose one factor is a gate (squeeze-excite, spatial attention), or None."""
        if node.op != "call_function" or self.name(node) != "mul" or len(self.tensors(node)) != 2:
            return None
        first, second = self.tensors(node)
        for data, gate in ((first, second), (second, first)):
            if self.shape(data) == self.shape(node) and self.ends_in_gate(gate):
                return data, gate
        return None

    def ends_in_gate(self, node: fx.Node) -> bool:
        """Whether a tensor is what a gate gave, reshaped or not (one by hand is divided by its bound, too)."""
        current: fx.Node | None = node
        scaled = False
        while current is not None:
            if self.is_hand_written_gate(current) or (self.is_gate(current) and not scaled):
                return True
            scaled = scaled or self.is_scaling(current)
            through = (
                self.is_pass(current)
                or self.is_reorder(current)
                or self.is_scaling(current)
                or self.name(current) in ("expand", "expand_as")
            )
            current = self.data_input(current) if through else None
        return False

    # what is around it

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The tensor arguments of a node, in order."""
        found: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), lambda item: found.append(item) or item)  # type: ignore[func-returns-value]
        return found

    def data_input(self, node: fx.Node) -> fx.Node | None:
        """The node that a layer, norm, activation or pass-through reads its data from."""
        scale = self.layer_scale(node)
        for item in self.tensors(node):
            if item.op == "get_attr":
                continue
            if scale is not None and self.module(node) is None and self._is_parameter(item):
                continue
            return item
        return None

    def _is_parameter(self, node: fx.Node) -> bool:
        while node.op == "call_function" and self.is_reorder(node):
            node = self.tensors(node)[0]
        return node.op == "get_attr"

    def only_user(self, node: fx.Node) -> fx.Node | None:
        """The node's single user, or None."""
        users = list(node.users)
        return users[0] if len(users) == 1 else None

    def siblings(self, node: fx.Node) -> list[fx.Node]:
        """The nodes of the same step in every recorded call of the same block."""
        path, event = scope_of(node)[-1][0], int(node.meta["event"])
        found = [call.events[event].node for call in self.record.calls[path] if event < len(call.events)]
        return [each for each in found if each is not None]

    def within(self, node: fx.Node, scope: Scope) -> bool:
        """Whether a node ran inside this call of a block (or of its children)."""
        return scope_of(node)[: len(scope)] == scope

    def ancestors(self, node: fx.Node, scope: Scope = ()) -> set[fx.Node]:
        """The node and all it was computed from, up to and including the first nodes outside ``scope``."""
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            item = stack.pop()
            if item in seen:
                continue
            seen.add(item)
            if self.within(item, scope):
                stack.extend(self.tensors(item))
        return seen

    def has_upstream_layer(self, node: fx.Node) -> bool:
        """Whether any convolution or linear layer ran before this node on its path."""
        if not self._behind_layer:
            for item in self.record.graph.nodes:
                sources = self.tensors(item)
                self._behind_layer[item] = any(self.is_layer(each) or self._behind_layer[each] for each in sources)
        return self._behind_layer[node]

    def reads_input(self, node: fx.Node) -> bool:
        """Whether a node is computed from the network's input, rather than from parameters and constants alone."""
        if not self._reads_input:
            for item in self.record.graph.nodes:
                given = item.op == "placeholder" and item.target != "constant"
                self._reads_input[item] = given or any(self._reads_input[each] for each in self.tensors(item))
        return self._reads_input[node]

    def forward_until(
        self, node: fx.Node, stop: Callable[[fx.Node], bool], follow: Callable[[fx.Node], bool]
    ) -> Iterable[fx.Node]:
        """Nodes reached from ``node`` at which ``stop`` holds, going on through those at which ``follow`` does."""
        seen: set[fx.Node] = set()
        stack = list(node.users)
        while stack:
            item = stack.pop()
            if item in seen:
                continue
            seen.add(item)
            if stop(item):
                yield item
            elif follow(item):
                stack.extend(item.users)

    def spatial(self, node: fx.Node, dim: int) -> tuple[int, ...]:
        """The sizes of a node's tensor besides batch and channels."""
        shape = self.shape(node) or ()
        return tuple(shape[2:]) if dim == 1 else tuple(shape[1:-1])

    def positions(self, node: fx.Node) -> int:
        """How many values a channel of a node's tensor has for each sample."""
        return prod(self.spatial(node, -1 if self.channels_last(node) else 1))

    def channels_last(self, node: fx.Node) -> bool:
        """Whether the channels of a node's tensor are its last dimension (tokens, NHWC)."""
        shape = self.shape(node) or ()
        if len(shape) != 4:
            return True
        current: fx.Node | None = node
        while current is not None:
            module = self.module(current)
            if isinstance(module, nn.Linear):
                return True
            if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)):
                return False
            if isinstance(module, nn.LayerNorm):
                return "2d" not in type(module).__name__
            if self.name(current) == "permute":
                return tuple(_dims(current)) == (0, 2, 3, 1)
            if current.op == "call_function" and current.target is operator.getitem:
                return False
            current = self.data_input(current)
        return False


def _dims(node: fx.Node) -> list[int]:
    dims = node.args[1:] if len(node.args) > 2 else node.args[1] if len(node.args) > 1 else node.kwargs.get("dims", ())
    return [int(cast(int, d)) for d in cast(Iterable[object], dims)]
