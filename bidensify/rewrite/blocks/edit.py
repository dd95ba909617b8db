"""Edit the forward of one block: trace it, change the graph, give the block the generated code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from bidensify.errors import PlanError
from bidensify.rewrite.blocks.generated import exchange_forward
from bidensify.rewrite.blocks.proof import operation_of, written
from bidensify.rewrite.blocks.trace import trace_once

__all__ = ["BlockEdit", "apply_edits"]


@dataclass(frozen=True)
class BlockEdit:
    """One change of a block's code.

    Attributes:
        node: name of the step in the block's trace.
        operation: the step's plain name ("add", "relu"), checked when the plan is replayed.
        action: "forward" (the step hands its argument ``argument`` through) or "module" (the step becomes a call of the
            new child ``module`` on its first argument; in a plain ``nn.Sequential`` that is one of its own entries).
        argument: which tensor argument goes through.
        module: name of the new child.
    """

    node: str
    operation: str
    action: str
    argument: int = 0
    module: str = ""


def _tensor_arguments(node: fx.Node) -> list[fx.Node]:
    return [item for item in [*node.args, *node.kwargs.values()] if isinstance(item, fx.Node)]


def apply_edits(
    block: nn.Module,
    path: str,
    varying: Sequence[str],
    constants: dict[str, Any],
    edits: Sequence[BlockEdit],
    children: Mapping[str, nn.Module],
) -> None:
    """Traces the block's code, changes the graph and gives the block the generated forward.

    The block stays an instance of its class. The new ``children`` that the edits name are added to it behind the trace: code
    that goes through a block's children must not meet them.

    Raises:
        PlanError: an edit does not fit the block's code (the plan is of another version of the model).
    """
    try:
        graph = trace_once(block, False, list(varying), constants)
    except Exception as error:
        raise PlanError(
            f"{path or 'the network'}: the plan edits its code, which cannot be traced here ({error}); plan again"
        ) from error
    for name, child in children.items():
        setattr(block, name, child)
    nodes = {node.name: node for node in graph.nodes}
    for edit in edits:
        node = nodes.get(edit.node)
        if node is None or operation_of(node) != edit.operation:
            raise PlanError(
                f"{path or 'the network'}: the plan edits its step {edit.node!r} ({edit.operation}), which its code "
                "does not have; the plan is of another version of this model: plan again"
            )
        arguments = _tensor_arguments(node)
        if edit.argument >= len(arguments):
            raise PlanError(f"{path}: step {edit.node!r} has no tensor argument {edit.argument}; plan again")
        if edit.action == "forward":
            node.replace_all_uses_with(arguments[edit.argument])
        elif edit.action == "module":
            with graph.inserting_after(node):
                new = graph.call_module(edit.module, (arguments[0],))
            node.replace_all_uses_with(new)
            source = written(node)
            for user in list(source.users) if source is not None else ():
                if new < user:
                    user.replace_input_with(arguments[0], new)
        else:
            raise PlanError(f"{path}: unknown edit {edit.action!r}")
        graph.erase_node(node)
        _erase_unused(graph, arguments)
    graph.lint()
    exchange_forward(block, graph, list(varying), dict(constants))


def _erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        if node.users or node.op not in ("get_attr", "call_method", "call_function"):
            continue
        arguments = _tensor_arguments(node)
        graph.erase_node(node)
        _erase_unused(graph, arguments)
