"""The arguments of a block's recorded calls: which vary, which are fixed, also inside lists, tuples and dictionaries.

An argument, or an item of one, is named by the expression that gets it: ``x``, ``x[0]``, ``options['scale']``. What is
fixed is a table of expressions and values (``skip`` is None, ``len(x)`` is 4), which generated code tests.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bidensify.rewrite.record.recorded import Call, TensorSpec

__all__ = ["NotTraceable", "bind", "call_expression", "placeholder", "values_of"]


class NotTraceable(Exception):
    """Why a block keeps its code."""


def placeholder(expression: str) -> str:
    """A name for what an expression gets: x_0 for x[0]."""
    return re.sub(r"\W+", "_", expression).strip("_")


def _kind(expression: str) -> str:
    return f"type({expression}).__name__"


def _size(expression: str) -> str:
    return f"len({expression})"


def _keys(expression: str) -> str:
    return f"list({expression})"


def _leaves(expression: str, value: Any, given: bool) -> Iterator[tuple[str, bool, Any]]:
    """(expression, whether it varies, its fixed value) of an argument and of all that is in it."""
    if type(value) in (list, tuple, torch.Size):
        yield _kind(expression), False, type(value).__name__
        yield _size(expression), False, len(value)
        for number, item in enumerate(value):
            yield from _leaves(f"{expression}[{number}]", item, given)
    elif type(value) is dict:
        if not all(isinstance(key, str) for key in value):
            raise NotTraceable(f"its argument {expression} has keys that are no strings")
        yield _kind(expression), False, "dict"
        yield _keys(expression), False, list(value)
        for key, item in value.items():
            yield from _leaves(f"{expression}[{key!r}]", item, given)
    elif isinstance(value, TensorSpec) or (given and isinstance(value, (int, float)) and not isinstance(value, bool)):
        yield expression, True, None
    elif value is None or isinstance(value, (bool, str, int, float)):
        yield expression, False, value
    else:
        raise NotTraceable(f"its argument {expression} is a {type(value).__name__}")


def bind(block: nn.Module, calls: Sequence[Call]) -> tuple[list[str], dict[str, Any]]:
    """Expressions that vary (tensors, numbers) and those fixed at one value over all calls.

    Raises:
        NotTraceable: the calls differ in more than that, or have arguments of other kinds.
    """
    signature = inspect.signature(type(block).forward)
    varying: list[str] = []
    constants: dict[str, Any] = {}
    for number, call in enumerate(calls):
        bound = signature.bind(block, *call.args, **call.kwargs)
        found_varying: list[str] = []
        found_constants: dict[str, Any] = {}
        for name, parameter in list(signature.parameters.items())[1:]:
            given = name in bound.arguments
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and not given:
                continue
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise NotTraceable(f"its argument {name} is positional-only")
            value = bound.arguments.get(name, parameter.default)
            for expression, varies, fixed in _leaves(name, value, given):
                if varies:
                    found_varying.append(expression)
                else:
                    found_constants[expression] = fixed
        if number == 0:
            varying, constants = found_varying, found_constants
        for expression in {*varying, *constants, *found_varying, *found_constants}:
            before = (
                constants.get(expression, "a value that varies")
                if expression in constants or (expression in varying)
                else "absent"
            )
            now = (
                found_constants.get(expression, "a value that varies")
                if expression in found_constants or (expression in found_varying)
                else "absent"
            )
            if type(before) is not type(now) or before != now:
                raise NotTraceable(f"its argument {expression} is sometimes {before!r} and sometimes {now!r}")
    if len({placeholder(expression) for expression in varying}) != len(varying):
        raise NotTraceable("its arguments have names too much alike")
    return varying, constants


def _literal(expression: str, varying: Sequence[str], constants: Mapping[str, Any]) -> str:
    """Source text that makes an argument again of placeholders and fixed values."""
    kind = constants.get(_kind(expression))
    if expression in varying:
        return placeholder(expression)
    if kind in ("list", "tuple", "Size"):
        items = "".join(
            _literal(f"{expression}[{number}]", varying, constants) + ", "
            for number in range(constants[_size(expression)])
        )
        return f"[{items}]" if kind == "list" else f"({items})"
    if kind == "dict":
        items = ", ".join(
            f"{key!r}: " + _literal(f"{expression}[{key!r}]", varying, constants)
            for key in constants[_keys(expression)]
        )
        return f"{{{items}}}"
    return f"_constants[{expression!r}]"


def call_expression(block: nn.Module, varying: Sequence[str], constants: Mapping[str, Any]) -> str:
    """The arguments with which the block's own forward is called, as source text."""
    passed = []
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    known = {re.split(r"\W", expression)[0] for expression in varying} | set(constants)
    star = any(p.kind is p.VAR_POSITIONAL and _kind(p.name) in constants for p in parameters)
    for parameter in parameters:
        name = parameter.name
        if name not in known and _kind(name) not in constants:
            continue
        text = _literal(name, varying, constants)
        if parameter.kind is parameter.VAR_POSITIONAL:
            passed.append(f"*{text}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            passed.append(f"**{text}")
        elif star and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            passed.append(text)
        else:
            passed.append(f"{name}={text}")
    return ", ".join(passed)


def values_of(varying: Sequence[str], arguments: Mapping[str, Any]) -> list[Any]:
    """What each expression gets from bound arguments."""
    # The expressions are made above, of identifiers, numbers and quoted keys.
    return [eval(expression, {"__builtins__": {}}, dict(arguments)) for expression in varying]
