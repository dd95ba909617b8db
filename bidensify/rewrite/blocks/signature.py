"""From recorded or stored calls of a block to its arguments, by the signature of its own class."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bidensify.errors import PlanError
from bidensify.rewrite.blocks.arguments import (
    ArgumentPath,
    Arguments,
    Fixed,
    NotTraceable,
    parameters_of,
    shown_path,
    shown_value,
)
from bidensify.rewrite.record.recorded import Call, TensorSpec

__all__ = ["bind", "fit"]


def _leaves(path: ArgumentPath, value: Any, given: bool) -> Iterator[tuple[ArgumentPath, Fixed | None]]:
    """What an argument and all that is in it is fixed at; None for what varies."""
    if type(value) in (list, tuple, torch.Size):
        yield path, Fixed(path, type(value).__name__, len(value))
        for number, item in enumerate(value):
            yield from _leaves((*path, number), item, given)
    elif type(value) is dict:
        # A record writes a dataclass as a dictionary with a key "".
        if not all(isinstance(key, str) and key for key in value):
            raise NotTraceable(f"its argument {shown_path(path)} is a dataclass or has keys that are no strings")
        yield path, Fixed(path, "dict", tuple(value))
        for key, item in value.items():
            yield from _leaves((*path, key), item, given)
    elif isinstance(value, TensorSpec) or (given and isinstance(value, (int, float)) and not isinstance(value, bool)):
        yield path, None
    elif value is None or isinstance(value, (bool, str, int)) or (isinstance(value, float) and math.isfinite(value)):
        yield path, Fixed(path, "value", value)
    else:
        raise NotTraceable(f"its argument {shown_path(path)} is {shown_value(value)}")


def _differ(a: Fixed | None, b: Fixed | None) -> bool:
    return a != b or (a is not None and b is not None and type(a.value) is not type(b.value))


def bind(block: nn.Module, calls: Sequence[Call]) -> Arguments:
    """What varies (tensors, numbers) and what is fixed at one value over all calls.

    Raises:
        NotTraceable: the calls differ in more than that, or have arguments of other kinds.
    """
    signature = inspect.signature(type(block).forward)
    first: dict[ArgumentPath, Fixed | None] = {}
    for number, call in enumerate(calls):
        bound = signature.bind(block, *call.args, **call.kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        found: dict[ArgumentPath, Fixed | None] = {}
        for parameter in parameters_of(type(block).forward):
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise NotTraceable(f"its argument {parameter.name} is positional-only")
            found.update(_leaves((parameter.name,), bound.arguments[parameter.name], parameter.name in given))
        first = found if number == 0 else first
        for path in {**first, **found}:
            if path not in first or path not in found or _differ(first[path], found[path]):
                before, now = (_told(path, each) for each in (first, found))
                raise NotTraceable(f"its argument {shown_path(path)} is sometimes {before} and sometimes {now}")
    result = Arguments(
        tuple(path for path, item in first.items() if item is None),
        tuple(item for item in first.values() if item is not None),
    )
    names = result.placeholders()
    if len(set(names)) != len(names):
        raise NotTraceable("its arguments have names too much alike")
    return result


def _told(path: ArgumentPath, found: Mapping[ArgumentPath, Fixed | None]) -> str:
    if path not in found:
        return "absent"
    item = found[path]
    if item is None:
        return "a value that varies"
    return repr(item.value) if item.kind == "value" else f"a {item.kind} of {len(item.steps())}"


def _default(path: ArgumentPath, parameter: inspect.Parameter) -> dict[ArgumentPath, Fixed | None]:
    default = parameter.default
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        default = () if parameter.kind is parameter.VAR_POSITIONAL else {}
    try:
        return dict(_leaves(path, default, False))
    except NotTraceable:
        return {}


def fit(block: nn.Module, varying: Sequence[ArgumentPath], fixed: Sequence[Fixed]) -> Arguments:
    """Stored arguments, checked against the signature of the block's own class and in its order.

    An optional parameter that the stored arguments do not know (they are of an earlier release of the block's code) stays at
    its default.

    Raises:
        PlanError: an argument that the block does not have, or one that is not described.
    """
    name = type(block).__name__
    table: dict[ArgumentPath, Fixed | None] = {**dict.fromkeys(varying), **{item.path: item for item in fixed}}
    if len(table) != len(varying) + len(fixed):
        raise PlanError(f"the plan describes an argument of {name} twice; plan again")
    found: dict[ArgumentPath, Fixed | None] = {}

    def visit(path: ArgumentPath) -> None:
        if path not in table:
            raise PlanError(
                f"the plan does not say what {name}'s argument {shown_path(path)} is; it is of another version of this "
                "model: plan again"
            )
        item = found[path] = table[path]
        for step in item.steps() if item is not None else ():
            visit((*path, step))

    for parameter in parameters_of(type(block).forward):
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise PlanError(f"{name}'s argument {parameter.name} is positional-only; plan again")
        path: ArgumentPath = (parameter.name,)
        if path not in table:
            table.update(_default(path, parameter))
        visit(path)
    for path in table:
        if path not in found:
            raise PlanError(
                f"the plan names {shown_path(path)!r}, which is no argument of {name}.forward(); it is of another version "
                "of this model: plan again"
            )
    result = Arguments(
        tuple(path for path in found if found[path] is None), tuple(item for item in found.values() if item is not None)
    )
    names = result.placeholders()
    if len(set(names)) != len(names):
        raise PlanError(f"the plan's arguments of {name} have names too much alike; plan again")
    return result
