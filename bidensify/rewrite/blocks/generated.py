"""A block with another forward: the code that ``torch.fx`` writes of its graph, behind checks of what the code was recorded with.

The only text that is compiled is ``fx.Graph.python_code`` of a graph that was traced from the user's own network. Its class is
made at run time and pickled by what it was made from, never by name.
"""

from __future__ import annotations

import builtins
import copy
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.node import _get_qualified_name

from bidensify.rewrite.blocks.arguments import Arguments, Fixed, parameters_of
from bidensify.rewrite.blocks.surroundings import Surroundings

__all__ = ["become", "exchange_forward", "exchange_graph", "graphs_differ", "unimportable", "without_hooks"]

# torchvision's feature extractors have a graph for each mode.
_GRAPHS = ("train_graph", "eval_graph")


def _make(
    base: type[nn.Module], source: str, names: dict[str, str], arguments: Arguments, surroundings: Surroundings
) -> type:
    """A subclass of ``base`` with the forward of ``source``, which is of a live graph or of a pickle of one."""
    namespace: dict[str, Any] = {name: _resolve(qualified) for name, qualified in names.items()}
    exec(compile(source, f"<bidensify {base.__name__}>", "exec"), namespace)
    members = {
        "forward": _checked(base, namespace["forward"], arguments, surroundings),
        "_generated": (base, source, names, arguments, surroundings),
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__doc__": f"{base.__name__} with a forward that bidensify generated:\n\n{source}",
    }
    return type(base.__name__, (base,), members)


def _resolve(qualified: str) -> Any:
    module, _, name = qualified.rpartition(".")
    if not module:
        return vars(builtins)[name] if name in vars(builtins) else importlib.import_module(name)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        if name:
            owner = _resolve(module)
            return getattr(owner, name)
        raise


def _rebuild(*made_of: Any) -> Any:
    return object.__new__(_make(*made_of))


def _reduce(self: nn.Module, protocol: Any) -> Any:
    return _rebuild, vars(type(self))["_generated"], self.__dict__


def exchange_forward(block: nn.Module, graph: fx.Graph, arguments: Arguments, surroundings: Surroundings) -> None:
    """Gives ``block`` the graph's code as its forward, under a subclass of its own class with its own signature.

    Args:
        block: the module; its class is changed in place.
        graph: the edited graph; its placeholders are the arguments that vary.
        arguments: which these are, and what the graph was specialised to: another value is refused when the block is called.
        surroundings: what else it was specialised to.
    """
    code = graph.python_code("self")
    used = {name: value for name, value in code.globals.items() if re.search(rf"\b{re.escape(name)}\b", code.src)}
    names = {name: _qualified(value) for name, value in used.items()}
    block.__class__ = _make(type(block), code.src.strip() + "\n", names, arguments, surroundings)


def exchange_graph(block: fx.GraphModule, graph: fx.Graph) -> None:
    """Gives a module that is a graph already the edited one; it copies and pickles itself by its graph."""
    graph._tracer_cls = block.graph._tracer_cls
    for name in _GRAPHS:
        if name in block.__dict__:
            setattr(block, name, graph)
    block.graph = graph


def graphs_differ(block: nn.Module) -> bool:
    """Whether a module switches between graphs that are not one."""
    return len({str(block.__dict__[name]) for name in _GRAPHS if name in block.__dict__}) > 1


def unimportable(graph: fx.Graph) -> str | None:
    """A function or class that the graph's code uses and that a pickled copy could not find again, or None."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        try:
            found = _resolve(_qualified(node.target))
        except (ImportError, AttributeError, ValueError, RuntimeError):
            found = None
        if found is not node.target:
            return getattr(node.target, "__qualname__", str(node.target))
    return None


def _qualified(value: Any) -> str:
    if isinstance(value, float):
        return "math.inf" if value > 0 else "math.nan"
    if inspect.ismodule(value):
        return value.__name__
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return str(_get_qualified_name(value))


def _checked(
    base: type[nn.Module], body: Callable[..., Any], arguments: Arguments, surroundings: Surroundings
) -> Callable[..., Any]:
    """``body`` behind the signature of ``base.forward``: arguments that it takes, a check of all else that it was made for."""
    parameters = parameters_of(base.forward)
    if (
        not surroundings
        and not arguments.fixed
        and arguments.varying == tuple((parameter.name,) for parameter in parameters)
    ):
        return body
    places = {parameter.name: number for number, parameter in enumerate(parameters)}
    # The value itself where it is one to compare with; a container is never the item that describes it.
    tests = [(places[str(item.path[0])], item.path[1:], item, _expected(item)) for item in arguments.fixed]
    reads = [(places[str(path[0])], path[1:]) for path in arguments.varying]
    gather = _gatherer(base.forward)

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if surroundings and (complaint := surroundings.complaint(self)):
            raise ValueError(
                f"{base.__name__}: {complaint} when it was rewritten, and its new code is for that alone; set it back, or set "
                "it before the rewrite"
            )
        values = gather(self, args, kwargs)
        for place, steps, item, expected in tests:
            value = values[place]
            for step in steps:
                value = value[step]
            if value is not expected and not item.fits(value):
                raise ValueError(
                    f"{base.__name__}: {item.refusal(value)}; rewrite with example inputs that run this case"
                )
        taken = []
        for place, steps in reads:
            value = values[place]
            for step in steps:
                value = value[step]
            taken.append(value)
        return body(self, *taken)

    return forward


def _expected(item: Fixed) -> Any:
    return item.value if item.kind == "value" else item


def _gatherer(original: Callable[..., Any]) -> Callable[..., Sequence[Any]]:
    """A function that gives the values of all parameters, as ``signature.bind`` with defaults does, in a tenth of the time."""
    signature = inspect.signature(original)
    parameters = parameters_of(original)
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = {p.name: n for n, p in enumerate(parameters) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    rest_by_place = next((n for n, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL), None)
    rest_by_name = next((n for n, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), None)
    empty = inspect.Parameter.empty
    defaults = [() if n == rest_by_place else {} if n == rest_by_name else p.default for n, p in enumerate(parameters)]
    needed = [n for n, value in enumerate(defaults) if value is empty]
    most, fewest = len(by_place), max(needed, default=-1) + 1

    def gather(self: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        count = len(args)
        if not kwargs and fewest <= count <= most:
            return [*args, *defaults[count:]]
        values = [*args[:most], *defaults[min(count, most) :]]
        rest = {}
        wrong = count > most and rest_by_place is None
        for name, value in kwargs.items():
            place = by_name.get(name, -1)
            if place < 0:
                rest[name] = value
            wrong = wrong or 0 <= place < count
            if place >= 0:
                values[place] = value
        for place in needed:
            wrong = wrong or values[place] is empty
        if wrong or (rest and rest_by_name is None):
            signature.bind(self, *args, **kwargs)  # raises what Python itself would
        if rest_by_place is not None:
            values[rest_by_place] = args[most:]
        if rest_by_name is not None:
            values[rest_by_name] = rest
        return values

    return gather


def without_hooks(module: nn.Module) -> nn.Module:
    """The same parameters and children under a second module that has no hooks."""
    twin = copy.copy(module)
    for name, value in twin.__dict__.items():
        if "_hooks" in name and isinstance(value, dict):
            twin.__dict__[name] = type(value)()
    return twin


def become(module: nn.Module, fresh: nn.Module) -> None:
    """Makes ``module`` work as ``fresh`` does, in place, so that every reference to it (plain lists too) follows.

    It keeps its hooks; its class, parameters, buffers and children become those of ``fresh``. What it no longer does it
    no longer claims to be: code that treats every BatchNorm or ReLU in its own way passes it by.
    """
    module.__class__ = type(fresh)
    for name, value in fresh.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules"):
            module.__dict__[name] = dict(value)
        elif not name.startswith("_") and name != "training":
            module.__dict__[name] = value
