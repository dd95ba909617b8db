"""What a block's code reads beside its arguments: attributes of modules and of their configurations, globals.

A trace runs the code once, so that ``if self.deep_supervision`` is decided in it for ever. What was read is therefore noted
while the block is traced, and looked at again when its new code is called: another value is an error, not the old result.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, JsonValue
from torch import nn

from bidensify.errors import PlanError
from bidensify.rewrite.fields import STRICT, ModulePath

__all__ = ["Attribute", "Surroundings", "attributes_read", "recorded_attributes", "surroundings_of", "values_now"]

# Proven not to matter, or no values: whether memory is saved changes no result.
_OWN = frozenset(nn.Module().__dict__) | {"call_super_init", "dump_patches", "T_destination"}
_NO_VALUE = ("checkpoint", "with_cp", "inplace")
_HEAP_TYPE = 1 << 9
_MISSING: Any = object()
_LIBRARIES = ("torch", "bidensify", "builtins", "numpy", "collections", "functools", "typing")


@dataclass(frozen=True)
class Attribute:
    """An attribute that a block's code read.

    Attributes:
        path: names from the block on: ("deep_supervision",), ("config", "use_head"), ("neck", "levels").
        value: what it was: a plain value, or lists (tuples too) and dictionaries of such.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: Annotated[tuple[ModulePath, ...], Field(min_length=1, max_length=20)]
    value: JsonValue


def plain(value: Any, depth: int = 3) -> Any:
    """A value as JSON holds it (tuples as lists), or a marker where it is none; at most 64 items in each container."""
    if value is None or type(value) in (bool, str) or (type(value) in (int, float) and abs(value) <= 2**53):
        return value
    if depth and type(value) in (list, tuple, torch.Size) and len(value) <= 64:
        items = [plain(item, depth - 1) for item in value]
        return _MISSING if any(item is _MISSING for item in items) else items
    if depth and type(value) is dict and len(value) <= 64 and all(type(key) is str for key in value):
        table = {key: plain(item, depth - 1) for key, item in value.items()}
        return _MISSING if any(item is _MISSING for item in table.values()) else table
    return _MISSING


def _held(owner: Any, name: str) -> Any:
    """What an attribute holds, without running code of its owner."""
    own = getattr(owner, "__dict__", {})
    if name in own:
        return own[name]
    if isinstance(owner, nn.Module) and owner._modules.get(name) is not None:
        return owner._modules[name]
    return next((vars(cls)[name] for cls in type(owner).__mro__ if name in vars(cls)), _MISSING)


def _at(block: nn.Module, path: tuple[str, ...]) -> Any:
    value: Any = block
    for name in path:
        value = _held(value, name)
    return value


@contextlib.contextmanager
def attributes_read(block: nn.Module) -> Iterator[dict[tuple[str, ...], Any]]:
    """For as long as it is entered, notes what code reads of the block, of modules in it and of their configurations.

    Yields:
        path -> value of plain values, containers of such, and functions; filled as they are read.
    """
    paths: dict[int, tuple[str, ...]] = {
        id(module): tuple(path.split(".")) if path else () for path, module in block.named_modules()
    }
    found: dict[tuple[str, ...], Any] = {}
    alive: list[Any] = []
    spied: dict[type, Any] = {}

    def spy_on(cls: type) -> None:
        spied[cls] = cls.__dict__.get("__getattribute__", _MISSING)
        original: Any = cls.__getattribute__

        def spy(self: Any, name: str) -> Any:
            value = original(self, name)
            path = paths.get(id(self))
            if path is not None and name not in _OWN and not name.startswith("__"):
                note((*path, name), self, value)
            return value

        cls.__getattribute__ = spy  # type: ignore[method-assign,assignment]

    def note(path: tuple[str, ...], owner: Any, value: Any) -> None:
        if path in found or any(word in path[-1] for word in _NO_VALUE):
            return
        if isinstance(value, (FunctionType, BuiltinFunctionType)) or plain(value) is not _MISSING:
            # What a property gives is made of what else it reads.
            if _held(owner, path[-1]) is value:
                found[path] = copy.deepcopy(value)
        elif id(value) not in paths and _is_configuration(value):
            paths[id(value)] = path
            alive.append(value)
            if not any(cls in spied for cls in type(value).__mro__):
                spy_on(type(value))

    spy_on(nn.Module)
    try:
        yield found
    finally:
        for cls, original in spied.items():
            if original is _MISSING:
                del cls.__getattribute__
            else:
                cls.__getattribute__ = original  # type: ignore[method-assign]


def recorded_attributes(read: Mapping[tuple[str, ...], Any]) -> tuple[Attribute, ...]:
    """What of ``attributes_read`` is data."""
    values = {path: plain(value) for path, value in read.items()}
    return tuple(Attribute(path, value) for path, value in sorted(values.items()) if value is not _MISSING)


def _is_configuration(value: Any) -> bool:
    """Whether a value is an object of somebody's own class that holds attributes (a model's ``config``)."""
    cls = type(value)
    return (
        not isinstance(value, (nn.Module, torch.Tensor, type, ModuleType))
        and not callable(value)
        and hasattr(value, "__dict__")
        and bool(cls.__flags__ & _HEAP_TYPE)
        and cls.__module__.partition(".")[0] not in _LIBRARIES
    )


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Names of globals that code reads, of globals that it sets, and of attributes that it reads."""
    found: dict[str, set[str]] = {"LOAD_GLOBAL": set(), "STORE_GLOBAL": set(), "LOAD_ATTR": set()}
    for step in dis.get_instructions(code):
        name = {"LOAD_METHOD": "LOAD_ATTR", "LOAD_NAME": "LOAD_GLOBAL"}.get(step.opname, step.opname)
        if name in found:
            found[name].add(str(step.argval))
    return frozenset(found["LOAD_GLOBAL"]), frozenset(found["STORE_GLOBAL"]), frozenset(found["LOAD_ATTR"])


def _globals_read(cls: type[nn.Module]) -> dict[tuple[str, str], Any]:
    """(module, name) -> value of the plain globals that the code of a class's forward names, and that of functions it calls.

    A global that this code sets itself (a counter, "warned already") is none of its surroundings.
    """
    found: dict[tuple[str, str], Any] = {}
    written: set[tuple[str, str]] = set()
    seen: set[CodeType] = set()

    def look(function: Any, depth: int) -> None:
        if not isinstance(function, FunctionType) or depth < 0:
            return
        look(getattr(function, "__wrapped__", None), depth)
        module = str(function.__globals__.get("__name__", ""))
        if module.partition(".")[0] in _LIBRARIES:
            return
        codes = [function.__code__]
        for code in codes:
            if code in seen:
                continue
            seen.add(code)
            codes += [item for item in code.co_consts if isinstance(item, CodeType)]
            loaded, stored, attributes = _names(code)
            written.update((module, name) for name in stored)
            for name in loaded:
                value = function.__globals__.get(name, _MISSING)
                if type(value) in (bool, int, float, str, type(None)) and not name.startswith("__"):
                    found[module, name] = value
                look(value, depth - 1)
            for name in attributes:
                for base in cls.__mro__:
                    look(vars(base).get(name), depth - 1)

    look(cls.forward, 3)
    live = {key: getattr(sys.modules.get(key[0]), key[1], _MISSING) for key in found}
    return {key: value for key, value in found.items() if key not in written and live[key] is value}


class Surroundings:
    """What the new code of a block was made under.

    Args:
        attributes: path -> value of what it read; functions are told apart by identity.
        named: (module, name) -> value of globals.
    """

    def __init__(self, attributes: Mapping[tuple[str, ...], Any], named: Mapping[tuple[str, str], Any]) -> None:
        self.attributes = dict(attributes)
        self.named = dict(named)
        self._attributes = [(path[:-1], path[-1], value) for path, value in attributes.items()]
        self._globals = [(importlib.import_module(module), name, value) for (module, name), value in named.items()]

    def __reduce__(self) -> Any:
        return Surroundings, (self.attributes, self.named)

    def __bool__(self) -> bool:
        return bool(self.attributes or self.named)

    def complaint(self, block: nn.Module) -> str:
        """What is another value now, and what it was; empty if nothing is."""
        for owner, name, value in self._attributes:
            holder: Any = block
            for step in owner:
                holder = getattr(holder, step)
            now = getattr(holder, name)
            if now is not value and now != value:
                return f"{'.'.join(('self', *owner, name))} is {_shown(now)}, but was {_shown(value)}"
        for module, name, value in self._globals:
            now = getattr(module, name)
            if now is not value and now != value:
                return f"{module.__name__}.{name} is {_shown(now)}, but was {_shown(value)}"
        return ""


def _shown(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)[:80]


def values_now(block: nn.Module, stored: Sequence[Attribute]) -> dict[tuple[str, ...], Any]:
    """The values of attributes that a plan names, which must be those of when it was made.

    Raises:
        PlanError: another value.
    """
    values = {}
    for item in stored:
        value = _at(block, item.path)
        if value is _MISSING or plain(value) != item.value:
            now = "gone" if value is _MISSING else _shown(value)
            raise PlanError(
                f"the plan is of {type(block).__name__} with {'.'.join(item.path)}={_shown(item.value)}, which is {now} here; "
                "set it as it was, or plan again"
            )
        values[item.path] = copy.deepcopy(value)
    return values


def surroundings_of(
    block: nn.Module, read: Mapping[tuple[str, ...], Any], exchanged: Callable[[str], bool]
) -> Surroundings:
    """The surroundings of a block.

    Args:
        block: the module.
        read: attributes that its code reads, with their values.
        exchanged: whether the module at a path from the block on becomes another one, which has attributes of its own.
    """
    kept = {path: value for path, value in read.items() if not exchanged(".".join(path[:-1]))}
    return Surroundings(kept, _globals_read(type(block)))
