"""The arguments of a block's recorded calls: which vary, which are fixed, also inside lists, tuples and dictionaries.

An argument, or an item of one, is named by a path: the name of a parameter of the block's ``forward``, then indexes and keys:
``("x",)``, ``("x", 0)``, ``("options", "scale")``. What is fixed is a table of paths and what was there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, ConfigDict, Field, PlainValidator
from torch import fx

from bidensify.rewrite.fields import STRICT, Number, one_of

__all__ = ["ArgumentPath", "Arguments", "Fixed", "NotTraceable", "parameters_of", "shown_path", "shown_value"]


class NotTraceable(Exception):
    """Why a block keeps its code."""


def _begins_with_a_name(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    if not isinstance(path[0], str) or not path[0].isidentifier() or path[0].startswith("__"):
        raise ValueError("must begin with the name of an argument")
    if any(isinstance(step, int) and step < 0 for step in path):
        raise ValueError("must hold no negative index")
    return path


def _plain_value(value: object) -> PlainValue:
    if isinstance(value, (list, tuple)) and len(value) <= 2**10 and all(isinstance(item, str) for item in value):
        return tuple(value)
    if (
        value is None
        or isinstance(value, bool)
        or (isinstance(value, int) and abs(value) <= 2**53)
        or (isinstance(value, float) and math.isfinite(value))
        or (isinstance(value, str) and len(value) <= 4000)
    ):
        return value
    raise ValueError("must be null, true, false, a finite number, a text or a list of keys")


PlainValue = bool | int | float | str | tuple[str, ...] | None
ArgumentPath = Annotated[
    tuple[Annotated[str, Field(max_length=200)] | Number, ...],
    Field(min_length=1, max_length=8),
    AfterValidator(_begins_with_a_name),
]
_CONTAINERS: Mapping[str, tuple[type, ...]] = {
    "list": (list,),
    "tuple": (tuple,),
    "Size": (torch.Size,),
    "dict": (Mapping,),
}


@dataclass(frozen=True)
class Fixed:
    """What an argument, or an item of one, was in every recorded call.

    Attributes:
        path: which argument.
        kind: "value", or the container that it was: "list", "tuple", "Size" (torch.Size) or "dict".
        value: the value; a container's length; a dict's keys.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: ArgumentPath
    kind: Annotated[str, one_of("value", *_CONTAINERS)]
    value: Annotated[PlainValue, PlainValidator(_plain_value)]

    def __post_init__(self) -> None:
        keys, length = isinstance(self.value, tuple), type(self.value) is int and 0 <= self.value <= 2**16
        if (self.kind == "dict") != keys or (self.kind in ("list", "tuple", "Size") and not length):
            raise ValueError(f"value={self.value!r} does not go with kind={self.kind!r}")

    def steps(self) -> Sequence[str | int]:
        """The indexes or keys of a container's items; none of a value."""
        if isinstance(self.value, tuple):
            return self.value
        return range(self.value) if self.kind != "value" and isinstance(self.value, int) else ()

    def fits(self, value: Any) -> bool:
        """Whether a value is what was recorded."""
        if isinstance(value, fx.Proxy):
            # A tracer gives proxies for all arguments, and the graph that it makes is of what was recorded.
            return True
        if self.kind == "value":
            # False and 0, 1 and 1.0 are equal, and code tells them apart.
            return value is self.value or (type(value) is type(self.value) and value == self.value)
        if not isinstance(value, _CONTAINERS[self.kind]) or not isinstance(value, Collection):
            return False
        return tuple(value) == self.value if self.kind == "dict" else len(value) == self.value

    def refusal(self, value: Any) -> str:
        """What a value that does not fit was given as, and what was recorded."""
        name = shown_path(self.path)
        if self.kind == "value":
            return f"{name} was given as {shown_value(value)}, but the rewrite is of {name}={self.value!r}"
        keys = ", ".join(map(str, self.steps())) or "nothing"
        wanted = f"a {self.kind} of {keys if self.kind == 'dict' else len(self.steps())}"
        given = shown_value(value)
        if isinstance(value, Mapping):
            given += f" of {', '.join(map(str, value)) or 'nothing'}"
        elif isinstance(value, (list, tuple)):
            given += f" of {len(value)}"
        return f"{name} was given as {given}, but the rewrite is of {wanted}"


def shown_path(path: Sequence[str | int]) -> str:
    """A path as it is written in code: options['scale'][0]."""
    return str(path[0]) + "".join(f"[{step!r}]" for step in path[1:])


def shown_value(value: Any) -> str:
    """A plain value, or what something else is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)[:80]
    return f"a {type(value).__name__}"


@dataclass(frozen=True)
class Arguments:
    """The arguments of a block's forward.

    Attributes:
        varying: paths of tensors and numbers; the block's graph has a placeholder for each.
        fixed: everything else; a container stands before its items.
    """

    varying: tuple[ArgumentPath, ...] = ()
    fixed: tuple[Fixed, ...] = ()

    def placeholders(self) -> list[str]:
        """A name for each path that varies; made of parameters' names and numbers alone."""
        names = []
        for number, path in enumerate(self.varying):
            steps = (step if isinstance(step, int) else f"k{number}" for step in path[1:])
            names.append("_".join(map(str, (path[0], *steps))))
        return names

    def values(self, given: Mapping[str, Any]) -> list[Any]:
        """What is at the paths that vary."""
        return [_at(path, given) for path in self.varying]

    def call(self, forward: Callable[..., Any], values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """(args, kwargs) for the block's own forward, of values for what varies and of what is fixed."""
        known: dict[ArgumentPath, Any] = dict(zip(self.varying, values))
        for item in reversed(self.fixed):
            # Items come before what holds them.
            made = [known[(*item.path, step)] for step in item.steps()]
            if item.kind == "value":
                known[item.path] = item.value
            elif item.kind == "dict":
                known[item.path] = dict(zip(item.steps(), made))
            else:
                known[item.path] = made if item.kind == "list" else tuple(made)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in parameters_of(forward):
            value = known[(parameter.name,)]
            if parameter.kind is parameter.VAR_POSITIONAL:
                args.extend(value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update(value)
            elif parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[parameter.name] = value
            else:
                args.append(value)
        return args, kwargs


def _at(path: ArgumentPath, given: Mapping[str, Any]) -> Any:
    value: Any = given
    for step in path:
        value = value[step]
    return value


def parameters_of(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a class's forward, without ``self``."""
    return list(inspect.signature(forward).parameters.values())[1:]
