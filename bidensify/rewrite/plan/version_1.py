"""Plans of version 1, which named arguments by expressions: ``x[0]``, ``type(x).__name__``, ``list(options)``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bidensify.errors import PlanError

__all__ = ["from_version_1"]

_STEP = r"\[(?:\d{1,6}|'[^'\\]*'|\"[^\"\\]*\")\]"
_PATH = re.compile(rf"([^\W\d]\w*)((?:{_STEP})*)")
_TESTS = {
    "kind": re.compile(r"type\((.*)\)\.__name__"),
    "length": re.compile(r"len\((.*)\)"),
    "keys": re.compile(r"list\((.*)\)"),
}


def _path(expression: Any) -> list[str | int]:
    """The path that an expression of names, indexes and quoted keys was written for; anything else is refused."""
    found = _PATH.fullmatch(expression) if isinstance(expression, str) else None
    if found is None:
        raise PlanError(
            f"the plan names {str(expression)[:80]!r} as an argument, which is not a name with indexes and keys; plan again"
        )
    steps = [step[1:-1] for step in re.findall(_STEP, found[2])]
    return [found[1], *(int(step) if step.isdecimal() else step[1:-1] for step in steps)]


def _constants(table: Any) -> list[dict[str, Any]]:
    kinds: dict[tuple[str | int, ...], Any] = {}
    values: dict[tuple[str | int, ...], Any] = {}
    for expression, value in dict(table).items():
        what, inner = "value", expression
        for name, pattern in _TESTS.items():
            found = pattern.fullmatch(expression) if isinstance(expression, str) else None
            if found is not None:
                what, inner = name, found[1]
        (kinds if what == "kind" else values)[tuple(_path(inner))] = value
    return [{"path": list(path), "kind": kinds.get(path, "value"), "value": value} for path, value in values.items()]


def from_version_1(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The same plan as this release writes it.

    Raises:
        PlanError: an expression that is not of the few forms which version 1 wrote, or a block that is not whole.
    """
    try:
        blocks = [
            {
                **block,
                "varying": [_path(expression) for expression in block["varying"]],
                "constants": _constants(block["constants"]),
                "modules": {
                    name: {"channels": channels, "dim": dim, "method": method}
                    for name, (channels, dim, method) in dict(block["modules"]).items()
                },
            }
            for block in plan.get("blocks", ())
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"a block of the plan is not whole ({type(error).__name__}: {error}); plan again") from error
    return {**plan, "blocks": blocks}
