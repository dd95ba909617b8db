"""What a record holds: the graph of one run, the calls of every block, shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from bidensify.rewrite.record.training import more_in_training

__all__ = ["Call", "Event", "Record", "Scope", "TensorSpec", "plain_name", "scope_of", "specs", "tensors_in"]

Scope = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that was seen."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Event:
    """One step that a module's own ``forward`` made: a child's call, or a function that gave a tensor.

    Attributes:
        kind: "module" or "function".
        name: the child's path, or the function's plain name ("add" for add, add_, __iadd__).
        node: the graph's node (None for a child that is itself a block).
    """

    kind: str
    name: str
    node: fx.Node | None


@dataclass
class Call:
    """One call of a block: its arguments with tensors replaced by ``TensorSpec``, and what its forward did."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    events: list[Event] = field(default_factory=list)


@dataclass
class Record:
    """What one run did.

    Attributes:
        graph: nodes call_module (target: path), call_function, get_attr (a parameter or buffer used directly),
            placeholder (inputs and constants), output. ``meta``: "spec" (TensorSpec or None), "scope" (the stack of
            enclosing blocks with call numbers), "event" (position in the innermost block's events).
        calls: block path -> its calls.
        modules: path -> module, each module once under its first path.
        weights: layer path -> for every convolution that its calls made, whether the weight was its own parameter.
        attributes_set: (module path, name) of the attributes that the run set.
        aliases: first path -> every other path of the same module.
        in_training: records the network once more, in training mode.
        inputs: the example inputs as text.
        output: the output's structure with TensorSpecs in it.
        fake: whether it ran on fake tensors.
        given: whether the inputs are the caller's, not derived from the model.
    """

    graph: fx.Graph
    calls: dict[str, list[Call]]
    modules: dict[str, nn.Module]
    weights: dict[str, list[bool]]
    attributes_set: frozenset[tuple[str, str]]
    aliases: dict[str, list[str]]
    in_training: Callable[[], fx.Graph]
    inputs: Any
    inputs_text: str
    output: Any
    fake: bool
    given: bool

    def module_nodes(self) -> dict[str, list[fx.Node]]:
        """Path -> the nodes of its calls, in order."""
        result: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                result.setdefault(node.target, []).append(node)
        return result

    @cached_property
    def more_in_training(self) -> dict[str, int]:
        """See :func:`bidensify.rewrite.record.training.more_in_training`; only who plans a rewrite asks."""
        return more_in_training(self.modules[""], self.graph, self.in_training)

    def used_apart(self, path: str, layer: str = "") -> bool:
        """Whether code that runs in training alone calls a module more often than ``layer``: somewhere else."""
        return self.more_in_training.get(path, 0) > self.more_in_training.get(layer, 0)


def scope_of(node: fx.Node) -> Scope:
    """The stack of enclosing (block path, call number), innermost last."""
    return cast(Scope, node.meta["scope"])


def plain_name(function: Any) -> str:
    """A function's name without what marks it as in-place or as an operator: __iadd__, add_ and add are "add"."""
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name[:1] in "ir" and name[1:] in ("add", "sub", "mul", "truediv", "matmul", "pow", "and", "or"):
            name = name[1:]
    return name.rstrip("_") or name


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and mappings, in order."""
    found: list[Tensor] = []

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, Mapping):
            for each in item.values():
                visit(each)
        elif isinstance(item, (tuple, list)):
            for each in item:
                visit(each)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            visit(_fields(item))

    visit(value)
    return found


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass's fields as a dict."""
    return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}


def specs(value: Any) -> Any:
    """``value`` with every tensor replaced by its ``TensorSpec``; mappings and dataclasses become dicts."""
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), value.dtype)
    if isinstance(value, Mapping):
        return {key: specs(item) for key, item in value.items()}
    if isinstance(value, torch.Size):
        # Generated code tells one from a tuple, as its callers hand it on.
        return value
    if isinstance(value, tuple):
        return tuple(specs(item) for item in value)
    if isinstance(value, list):
        return [specs(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, TensorSpec)):
        return {"": type(value).__name__, **specs(_fields(value))}
    return value
