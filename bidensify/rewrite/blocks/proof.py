"""Prove a block's trace: it takes the recorded steps and gives what the block gives.

A trace can be wrong without failing (a baked-in ``if skip is not None``), so a block is edited only if its unedited
trace has the same code in training and evaluation mode and reproduces every recorded call, step by step.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bidensify._util.modes import evaluation_flags
from bidensify.rewrite.blocks.arguments import Arguments, NotTraceable
from bidensify.rewrite.blocks.generated import graphs_differ, unimportable
from bidensify.rewrite.blocks.signature import bind
from bidensify.rewrite.blocks.surroundings import Attribute, recorded_attributes
from bidensify.rewrite.blocks.trace import trace_once
from bidensify.rewrite.record.recorded import Call, TensorSpec, plain_name
from bidensify.rewrite.record.restore import restored, same_random_state

__all__ = ["Traced", "editable_event", "operation_of", "trace_block", "written"]

_SAME = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "rsub": "sub",
    "radd": "add",
    "rmul": "mul",
    "rtruediv": "div",
    "rdiv": "div",
    "concat": "cat",
    "concatenate": "cat",
    "negative": "neg",
}


@dataclass
class Traced:
    """A block's proven trace: its graph, the node of each recorded event, its arguments, the attributes that it read."""

    graph: fx.Graph
    events: list[fx.Node | None]
    arguments: Arguments
    attributes: tuple[Attribute, ...]


def _same_name(name: str) -> str:
    return _SAME.get(name, name)


class _Replay(fx.Interpreter):
    """Runs a trace and notes its events as the recorder would."""

    def __init__(self, module: fx.GraphModule, names: dict[int, str]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.names = names
        self.seen: list[tuple[str, str, fx.Node]] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module":
            child = self.module.get_submodule(str(n.target))
            self.seen.append(("module", self.names.get(id(child), str(n.target)), n))
        elif n.op in ("call_function", "call_method"):
            args, _ = self.fetch_args_kwargs_from_env(n)
            if n.target is getattr:
                name = str(args[1])
            elif n.op == "call_method":
                name = str(n.target).rstrip("_")
            else:
                name = plain_name(n.target)
            plucked = n.target is operator.getitem and not isinstance(args[0], Tensor)
            gathered = isinstance(n.target, type)
            if not plucked and not gathered and (name == "setitem" or _has_tensor(result)):
                self.seen.append(("function", name, n))
        return result


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_tensor(item) for item in value)
    return isinstance(value, Tensor)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            return False
        a, b = torch.nan_to_num(a), torch.nan_to_num(b)
        # Elsewhere the same convolution may be computed in another way when it is called again.
        return torch.equal(a, b) or (a.device.type != "cpu" and _close(a, b))
    # A trace gives lists and dictionaries of torch.fx's own; the code that is generated gives plain ones.
    if (isinstance(a, list) and isinstance(b, list)) or (isinstance(a, tuple) and type(a) is type(b)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    if type(a) is dict and isinstance(b, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(_equal(getattr(a, item.name), getattr(b, item.name)) for item in dataclasses.fields(a))
    return bool(a == b)


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() or a.dtype != b.dtype:
        return False
    level = float(a.float().square().mean().sqrt())
    return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3 * level)


def _containers(value: Any) -> Any:
    """What nested lists and dictionaries hold, by identity."""
    if isinstance(value, dict):
        return {key: _containers(item) for key, item in value.items()}
    return [_containers(item) for item in value] if isinstance(value, (tuple, list)) else id(value)


def _values(call: Call, block: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random tensors of the recorded shapes on the block's device."""
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def one(value: Any) -> Any:
        if type(value) is dict:
            return {key: one(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(one(item) for item in value)
        if isinstance(value, TensorSpec):
            if value.dtype.is_floating_point:
                return torch.randn(value.shape, generator=generator).to(device=device, dtype=value.dtype)
            return torch.ones(value.shape, dtype=value.dtype, device=device)
        return value

    return tuple(one(v) for v in call.args), {key: one(v) for key, v in call.kwargs.items()}


def _replay(
    block: nn.Module, graph: fx.Graph, call: Call, names: dict[int, str], arguments: Arguments
) -> list[fx.Node | None]:
    signature = inspect.signature(type(block).forward)

    def run(function: Callable[..., Any]) -> Any:
        # In-place code may write into its arguments, so each run gets its own.
        args, kwargs = _values(call, block)
        bound = signature.bind(block, *args, **kwargs).arguments
        return function(*arguments.values(bound))

    replay = _Replay(fx.GraphModule(block, graph), names)
    with torch.no_grad(), restored(block), evaluation_flags(block), same_random_state(block):
        args, kwargs = _values(call, block)
        containers = _containers([args, kwargs])
        # Hooks of the block itself run around either forward.
        expected = type(block).forward(block, *args, **kwargs)
        if _containers([args, kwargs]) != containers:
            raise NotTraceable("it writes into a list or dictionary that it is given")
        got = run(replay.run)
    if not _equal(expected, got):
        raise NotTraceable("its trace does not reproduce a recorded call")
    recorded = [(event.kind, _same_name(event.name)) for event in call.events]
    traced = [(kind, _same_name(name)) for kind, name, _ in replay.seen]
    # What hooks of the block do stands before or behind the steps of its forward.
    spare = len(recorded) - len(traced) if block._forward_hooks or block._forward_pre_hooks else 0
    starts = [start for start in range(spare + 1) if recorded[start : start + len(traced)] == traced]
    if len(starts) != 1 or len(recorded) - len(traced) != spare:
        raise NotTraceable("its trace takes other steps than the recorded call")
    nodes: list[fx.Node | None] = [node for _, _, node in replay.seen]
    return [None] * starts[0] + nodes + [None] * (spare - starts[0])


def _align(block: nn.Module, graph: fx.Graph, call: Call, names: dict[int, str]) -> list[fx.Node | None]:
    """The node of each event without values: by name and order (a network on the meta device)."""
    nodes: list[fx.Node | None] = []
    wanted = [(event.kind, _same_name(event.name)) for event in call.events]
    for node in graph.nodes:
        if len(nodes) == len(wanted):
            break
        kind, name = wanted[len(nodes)]
        if node.op == "call_module" and kind == "module":
            found = names.get(id(block.get_submodule(str(node.target))), str(node.target))
        elif node.op in ("call_function", "call_method") and kind == "function":
            plain = str(node.target).rstrip("_") if node.op == "call_method" else plain_name(node.target)
            found = _same_name(str(node.args[1]) if node.target is getattr else plain)
        else:
            continue
        if found == name:
            nodes.append(node)
    if len(nodes) != len(wanted):
        raise NotTraceable("its trace takes other steps than the recorded call")
    return nodes


def trace_block(
    block: nn.Module, calls: Sequence[Call], names: dict[int, str], set_in_run: Set[tuple[str, str]] = frozenset()
) -> Traced | str:
    """The proven trace of ``block``, or the reason why its code cannot be edited.

    Args:
        block: the module whose own forward is traced; children stay calls.
        calls: all its recorded calls.
        names: id of a module -> its path in the network.
        set_in_run: (path from the block, name) of attributes that were set while the network ran.
    """
    if "forward" in block.__dict__:
        return "its forward was replaced on the instance"
    if graphs_differ(block):
        return "its graphs for training and for evaluation differ"
    try:
        arguments = bind(block, calls)
        if isinstance(block, fx.GraphModule) and arguments.fixed:
            return "it is a graph with arguments that are fixed"
        graph, read = trace_once(block, False, arguments)
        in_training, also_read = trace_once(block, True, arguments)
        if str(graph) != str(in_training):
            return "its code differs between training and evaluation"
        attributes = {**also_read, **read}
        names_set = sorted(name for *owner, name in attributes if (".".join(owner), name) in set_in_run)
        if names_set:
            return f"it reads self.{names_set[0]}, which the network sets as it runs"
        nameless = unimportable(graph)
        if nameless is not None:
            return f"its code uses {nameless}, which cannot be imported by name"
        events: list[fx.Node | None] = []
        on_meta = any(p.device.type == "meta" for p in block.parameters())
        done: list[Any] = []
        for call in calls:
            key = (call.args, call.kwargs, [(event.kind, event.name) for event in call.events])
            if key in done:
                continue
            done.append(key)
            found = _align(block, graph, call, names) if on_meta else _replay(block, graph, call, names, arguments)
            if events and found != events:
                return "its calls take different steps"
            events = found
    except NotTraceable as reason:
        return str(reason)
    except Exception as error:  # a trace can fail in any way that the block's code can
        text = str(error).strip().splitlines()
        return f"its code cannot be traced ({type(error).__name__}: {text[0][:120] if text else ''})"
    return Traced(graph, events, arguments, recorded_attributes(attributes))


def operation_of(node: fx.Node) -> str:
    """The plain name of a traced step."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.target).rstrip("_") if node.op == "call_method" else plain_name(node.target)


def written(node: fx.Node) -> fx.Node | None:
    """What a traced step overwrites with its result and can be read again there: a module's or a plain function's value."""
    in_place = node.kwargs.get("inplace") is True or (
        node.op in ("call_function", "call_method") and operation_name(node).endswith("_")
    )
    source = node.args[0] if node.args else None
    if not in_place or not isinstance(source, fx.Node):
        return None
    own = source.op == "call_module" or operation_of(source) in ("add", "cat", "mul", "sub", "conv2d", "interpolate")
    return source if own else None


def operation_name(node: fx.Node) -> str:
    """The name of a function or method as it is written."""
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def editable_event(traced: Traced, event: int) -> bool:
    """Whether something reads the event's result, or what it overwrites with it."""
    node = traced.events[event]
    if node is None:
        return False
    source = written(node)
    return len(node.users) > 0 or (source is not None and any(node < user for user in source.users))
