"""Classes that are made at run time: pickled by what they were made from, never by name."""

from __future__ import annotations

import builtins
import copy
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.fx.node import _get_qualified_name

__all__ = ["become", "exchange_forward", "unimportable", "without_hooks"]


def _make(base: type[nn.Module], body: str, wrapper: str, names: dict[str, str], constants: dict[str, Any]) -> type:
    namespace: dict[str, Any] = {name: _resolve(qualified) for name, qualified in names.items()}
    namespace["_constants"] = constants
    exec(compile(body, f"<bidensify {base.__name__}>", "exec"), namespace)
    exec(compile(wrapper, f"<bidensify {base.__name__}>", "exec"), namespace)
    members = {
        "forward": namespace["forward"],
        "_generated": (base, body, wrapper, names, constants),
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__doc__": f"{base.__name__} with a forward that bidensify generated:\n\n{body}\n{wrapper}",
    }
    if "_body" in namespace:
        members["_body"] = namespace["_body"]
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


def _rebuild(base: type[nn.Module], body: str, wrapper: str, names: dict[str, str], constants: dict[str, Any]) -> Any:
    made = _make(base, body, wrapper, names, constants)
    return object.__new__(made)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    return _rebuild, vars(type(self))["_generated"], self.__dict__


def exchange_forward(block: nn.Module, graph: fx.Graph, varying: Sequence[str], constants: dict[str, Any]) -> None:
    """Gives ``block`` the graph's code as its forward, under a subclass of its own class with its own signature.

    Args:
        block: the module; its class is changed in place.
        graph: the edited graph; its placeholders are the arguments that vary.
        varying: the expressions that get them from the arguments of its own forward.
        constants: arguments that the graph was specialised to; another value is refused when the block is called.
    """
    base = type(block)
    code = graph.python_code("self")
    names: dict[str, str] = {}
    for name, value in code.globals.items():
        if re.search(rf"\b{re.escape(name)}\b", code.src):
            names[name] = _qualified(value)
    if not constants and all(expression.isidentifier() for expression in varying):
        body, wrapper = code.src.strip() + "\n", ""
    else:
        body = code.src.strip().replace("def forward(", "def _body(", 1) + "\n"
        wrapper = _wrapper(base, varying, constants)
    made = _make(base, body, wrapper, names, constants)
    block.__class__ = made


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


def _wrapper(base: type[nn.Module], varying: Sequence[str], constants: dict[str, Any]) -> str:
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    listed, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if f"type({parameter.name}).__name__" in constants:
                star = parameter.kind is parameter.VAR_POSITIONAL
                listed.append(("*" if star else "**") + parameter.name)
                keyword_only = keyword_only or star
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            listed.append("*")
            keyword_only = True
        # A fixed argument keeps a default of its own only if it had one; its value is checked against the recorded.
        if parameter.default is parameter.empty:
            listed.append(parameter.name)
        else:
            listed.append(f"{parameter.name}={parameter.default!r}")
    lines = [f"def forward(self, {', '.join(listed)}):"]
    for name, value in constants.items():
        test = f"{name} is not None" if value is None else f"{name} != _constants[{name!r}]"
        lines.append(f"    if {test}:")
        what = f"{base.__name__}: {name} was given as a "
        rule = f", but the rewrite is of {name}={value!r}; rewrite with example inputs that run this case"
        lines.append(f"        raise ValueError({what!r} + type({name}).__name__ + {rule!r})")
    lines.append(f"    return self._body({', '.join(varying)})")
    return "\n".join(lines) + "\n"


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
