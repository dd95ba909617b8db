"""Edit the forward of one block: trace it, change the graph, give the block the code of the graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict
from torch import fx, nn

from bidensify.errors import PlanError
from bidensify.rewrite.blocks.arguments import Arguments
from bidensify.rewrite.blocks.generated import exchange_forward, exchange_graph
from bidensify.rewrite.blocks.proof import operation_of, written
from bidensify.rewrite.blocks.surroundings import Attribute, Surroundings, surroundings_of, values_now
from bidensify.rewrite.blocks.trace import trace_once
from bidensify.rewrite.fields import STRICT, Size, Text, one_of

__all__ = ["BlockEdit", "EditedBlock", "edited"]

_NEW_CHILD = re.compile(r"activation_[0-9]{1,6}")


@dataclass(frozen=True)
class BlockEdit:
    """One change of a block's code.

    Attributes:
        node: name of the step in the block's trace.
        operation: the step's plain name ("add", "relu"), checked when the plan is replayed.
        action: "forward" (the step hands its argument ``argument`` through) or "module" (the step becomes a call of the
            new child ``module`` on its first argument; in a plain ``nn.Sequential`` that is one of its own entries).
        argument: which tensor argument goes through.
        module: name of the new child: "activation_" and a number.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    node: Text
    operation: Text
    action: Annotated[str, one_of("forward", "module")]
    argument: Size = 0
    module: Text = ""


@dataclass(frozen=True)
class EditedBlock:
    """A block's changed graph, which the block does not run yet."""

    block: nn.Module
    graph: fx.Graph
    arguments: Arguments
    surroundings: Surroundings
    children: Mapping[str, nn.Module]

    def install(self) -> None:
        """Gives the block its new children and the code of the graph; it stays an instance of its class."""
        for name, child in self.children.items():
            self.block.add_module(name, child)
        if isinstance(self.block, fx.GraphModule):
            exchange_graph(self.block, self.graph)
        else:
            exchange_forward(self.block, self.graph, self.arguments, self.surroundings)


def _tensor_arguments(node: fx.Node) -> list[fx.Node]:
    return [item for item in [*node.args, *node.kwargs.values()] if isinstance(item, fx.Node)]


def edited(
    block: nn.Module,
    path: str,
    arguments: Arguments,
    attributes: Sequence[Attribute],
    edits: Sequence[BlockEdit],
    children: Mapping[str, nn.Module],
    exchanged: Set[str] = frozenset(),
) -> EditedBlock:
    """Traces the block's code and changes the graph; the block is left as it is.

    Args:
        block: the module.
        path: what errors call it.
        arguments: of its forward.
        attributes: what its code read when the plan was made.
        edits: what changes.
        children: the new children that the edits name.
        exchanged: paths of the network's modules that become others.

    Raises:
        PlanError: an edit does not fit the block's code (the plan is of another version of the model), or an attribute that
            the code reads is another value.
    """
    where = path or "the network"
    known = values_now(block, attributes)
    try:
        graph, read = trace_once(block, False, arguments)
    except Exception as error:
        raise PlanError(
            f"{where}: the plan edits its code, which cannot be traced here ({error}); plan again"
        ) from error
    inside = f"{path}." if path else ""
    surroundings = surroundings_of(block, known | read, lambda owner: inside + owner in exchanged)
    nodes = {node.name: node for node in graph.nodes}
    for edit in edits:
        node = nodes.pop(edit.node, None)
        if node is None or node.op in ("placeholder", "output") or operation_of(node) != edit.operation:
            raise PlanError(
                f"{where}: the plan edits its step {edit.node!r} ({edit.operation}), which its code does not have; the "
                "plan is of another version of this model: plan again"
            )
        tensors = _tensor_arguments(node)
        if edit.argument >= len(tensors):
            raise PlanError(f"{where}: step {edit.node!r} has no tensor argument {edit.argument}; plan again")
        if edit.action == "forward":
            node.replace_all_uses_with(tensors[edit.argument])
        else:
            _call_instead(graph, node, _child_name(block, edit.module, children, where), tensors[0])
        graph.erase_node(node)
        _erase_unused(graph, tensors)
    graph.lint()
    return EditedBlock(block, graph, arguments, surroundings, children)


def _child_name(block: nn.Module, name: str, children: Mapping[str, nn.Module], where: str) -> str:
    """The name of a new child, or of the entry of a plain ``nn.Sequential`` in whose place it comes."""
    if name in children:
        if isinstance(block, nn.Sequential) and name in block._modules:
            return name
        if _NEW_CHILD.fullmatch(name) and not hasattr(block, name):
            return name
    raise PlanError(f"{where}: cannot add an activation named {name!r}; plan again")


def _call_instead(graph: fx.Graph, node: fx.Node, name: str, argument: fx.Node) -> None:
    with graph.inserting_after(node):
        new = graph.call_module(name, (argument,))
    node.replace_all_uses_with(new)
    source = written(node)
    for user in list(source.users) if source is not None else ():
        if new < user:
            user.replace_input_with(argument, new)


def _erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        if node.users or node.op not in ("get_attr", "call_method", "call_function"):
            continue
        arguments = _tensor_arguments(node)
        graph.erase_node(node)
        _erase_unused(graph, arguments)
