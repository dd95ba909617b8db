"""Edit the forward of one block: trace it alone, prove the trace, change the graph, generate the code.

The trace (``torch.fx``) covers the block's own code; its children stay calls. A trace can be wrong without failing (a
baked-in ``if skip is not None``), so a block is edited only if its unedited trace has the same code in training and
evaluation mode and reproduces every recorded call, step by step.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bidensify.errors import PlanError
from bidensify.rewrite.generated import exchange_forward
from bidensify.rewrite.record import Call, TensorSpec, frozen_flags, plain_name

__all__ = ["BlockEdit", "Traced", "apply_edits", "editable_event", "operation_of", "trace_block"]

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


@dataclass(frozen=True)
class BlockEdit:
    """One change of a block's code.

    Attributes:
        node: name of the step in the block's trace.
        operation: the step's plain name ("add", "relu"), checked when the plan is replayed.
        action: "forward" (the step hands its argument ``argument`` through) or "module" (the step becomes a call of the
            new child ``module`` on its first argument).
        argument: which tensor argument goes through.
        module: name of the new child.
    """

    node: str
    operation: str
    action: str
    argument: int = 0
    module: str = ""


@dataclass
class Traced:
    """A block's proven trace: its graph, the node of each recorded event, arguments that vary and that are fixed."""

    graph: fx.Graph
    events: list[fx.Node]
    varying: list[str]
    constants: dict[str, Any]


class _NotTraceable(Exception):
    """Why a block keeps its code."""


def _same_name(name: str) -> str:
    return _SAME.get(name, name)


class _BlockTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _bind(block: nn.Module, calls: Sequence[Call]) -> tuple[list[str], dict[str, Any]]:
    """Parameter names that vary (tensors, numbers) and those fixed at one value over all calls."""
    signature = inspect.signature(type(block).forward)
    varying: list[str] = []
    constants: dict[str, Any] = {}
    for number, call in enumerate(calls):
        bound = signature.bind(block, *call.args, **call.kwargs)
        for name, parameter in list(signature.parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if name in bound.arguments:
                    raise _NotTraceable(f"its forward takes *{name}")
                continue
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise _NotTraceable(f"its argument {name} is positional-only")
            value = bound.arguments.get(name, parameter.default)
            varies = isinstance(value, TensorSpec) or (
                name in bound.arguments and isinstance(value, (int, float)) and not isinstance(value, bool)
            )
            if not varies and not (value is None or isinstance(value, (bool, str, int, float))):
                raise _NotTraceable(f"its argument {name} is a {type(value).__name__}")
            if number == 0:
                if varies:
                    varying.append(name)
                else:
                    constants[name] = value
            elif varies != (name in varying) or (not varies and constants[name] != value):
                raise _NotTraceable(f"its argument {name} is sometimes {value!r} and sometimes not")
    return varying, constants


@contextlib.contextmanager
def _narrow_forward(block: nn.Module, varying: list[str], constants: dict[str, Any]) -> Iterator[None]:
    """For the time of a trace the block's forward takes the varying arguments alone."""
    cls = type(block)
    passed = ", ".join(f"{name}={name}" for name in varying)
    namespace: dict[str, Any] = {"_forward": cls.forward, "_constants": constants}
    # The names come from the live signature, so they are identifiers.
    exec(f"def forward(self, {', '.join(varying)}):\n    return _forward(self, {passed}, **_constants)\n", namespace)
    block.__class__ = type(cls.__name__, (cls,), {"forward": namespace["forward"], "__module__": cls.__module__})
    try:
        yield
    finally:
        block.__class__ = cls


def _trace_once(block: nn.Module, training: bool, varying: list[str], constants: dict[str, Any]) -> fx.Graph:
    before = set(block.__dict__)
    flag = block.training
    block.training = training
    try:
        with _narrow_forward(block, varying, constants):
            graph = _BlockTracer(autowrap_functions=()).trace(block)
    finally:
        block.training = flag
        added = set(block.__dict__) - before
        for name in added:
            delattr(block, name)
    if added:
        raise _NotTraceable(f"its forward makes constant tensors ({', '.join(sorted(added))})")
    return graph


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
            if not plucked and (name == "setitem" or _has_tensor(result)):
                self.seen.append(("function", name, n))
        return result


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_tensor(item) for item in value)
    return isinstance(value, Tensor)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and bool(a == b)


def _values(call: Call, block: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random tensors of the recorded shapes on the block's device."""
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def one(value: Any) -> Any:
        if isinstance(value, TensorSpec):
            if value.dtype.is_floating_point:
                return torch.randn(value.shape, generator=generator).to(device=device, dtype=value.dtype)
            return torch.ones(value.shape, dtype=value.dtype, device=device)
        return value

    return tuple(one(v) for v in call.args), {key: one(v) for key, v in call.kwargs.items()}


def _replay(block: nn.Module, graph: fx.Graph, call: Call, names: dict[int, str], varying: list[str]) -> list[fx.Node]:
    signature = inspect.signature(type(block).forward)

    def run(function: Callable[..., Any]) -> Any:
        # In-place code may write into its arguments, so each run gets its own.
        args, kwargs = _values(call, block)
        bound = signature.bind(block, *args, **kwargs).arguments
        return function(*(bound[name] for name in varying))

    replay = _Replay(fx.GraphModule(block, graph), names)
    with torch.no_grad(), frozen_flags(block), torch.random.fork_rng():
        args, kwargs = _values(call, block)
        expected = block(*args, **kwargs)
        got = run(replay.run)
    if not _equal(expected, got):
        raise _NotTraceable("its trace does not reproduce a recorded call")
    recorded = [(event.kind, _same_name(event.name)) for event in call.events]
    traced = [(kind, _same_name(name)) for kind, name, _ in replay.seen]
    if recorded != traced:
        raise _NotTraceable("its trace takes other steps than the recorded call")
    return [node for _, _, node in replay.seen]


def _align(block: nn.Module, graph: fx.Graph, call: Call, names: dict[int, str]) -> list[fx.Node]:
    """The node of each event without values: by name and order (a network on the meta device)."""
    nodes: list[fx.Node] = []
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
        raise _NotTraceable("its trace takes other steps than the recorded call")
    return nodes


def trace_block(block: nn.Module, calls: Sequence[Call], names: dict[int, str]) -> Traced | str:
    """The proven trace of ``block``, or the reason why its code cannot be edited.

    Args:
        block: the module whose own forward is traced; children stay calls.
        calls: all its recorded calls.
        names: id of a module -> its path in the network.
    """
    if "forward" in block.__dict__:
        return "its forward was replaced on the instance"
    try:
        varying, constants = _bind(block, calls)
        graph = _trace_once(block, False, varying, constants)
        if str(graph) != str(_trace_once(block, True, varying, constants)):
            return "its code differs between training and evaluation"
        events: list[fx.Node] = []
        on_meta = any(p.device.type == "meta" for p in block.parameters())
        done: list[Any] = []
        for call in calls:
            key = (call.args, call.kwargs, [(event.kind, event.name) for event in call.events])
            if key in done:
                continue
            done.append(key)
            found = _align(block, graph, call, names) if on_meta else _replay(block, graph, call, names, varying)
            if events and [n.name for n in found] != [n.name for n in events]:
                return "its calls take different steps"
            events = found
    except _NotTraceable as reason:
        return str(reason)
    except Exception as error:  # a trace can fail in any way that the block's code can
        text = str(error).strip().splitlines()
        return f"its code cannot be traced ({type(error).__name__}: {text[0][:120] if text else ''})"
    return Traced(graph, events, varying, constants)


def _tensor_arguments(node: fx.Node) -> list[fx.Node]:
    return [item for item in [*node.args, *node.kwargs.values()] if isinstance(item, fx.Node)]


def operation_of(node: fx.Node) -> str:
    """The plain name of a traced step."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.target).rstrip("_") if node.op == "call_method" else plain_name(node.target)


def editable_event(traced: Traced, event: int) -> bool:
    """Whether something reads the event's result (code that only writes in place cannot be replaced)."""
    return len(traced.events[event].users) > 0


def apply_edits(
    block: nn.Module, path: str, varying: Sequence[str], constants: dict[str, Any], edits: Sequence[BlockEdit]
) -> None:
    """Traces the block's code, changes the graph and gives the block the generated forward.

    The block stays an instance of its class. The new children that the edits name must be on it already.

    Raises:
        PlanError: an edit does not fit the block's code (the plan is of another version of the model).
    """
    try:
        graph = _trace_once(block, False, list(varying), constants)
    except Exception as error:
        raise PlanError(
            f"{path or 'the network'}: the plan edits its code, which cannot be traced here ({error}); plan again"
        ) from error
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
        else:
            raise PlanError(f"{path}: unknown edit {edit.action!r}")
        graph.erase_node(node)
        _erase_unused(graph, arguments)
    graph.lint()
    exchange_forward(block, graph, dict(constants))


def _erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        if node.users or node.op not in ("get_attr", "call_method", "call_function"):
            continue
        arguments = _tensor_arguments(node)
        graph.erase_node(node)
        _erase_unused(graph, arguments)
