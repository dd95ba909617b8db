"""What is asked of an export's arguments before anything long begins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bidensify.errors import ConfigError

__all__ = ["numbers"]


def numbers(constants: Mapping[str, Sequence[float]] | None) -> dict[str, list[float]]:
    """Numbers that are to stand beside a network.

    Raises:
        ConfigError: a name that a program cannot have or has already, or values that are no numbers.
    """
    found = {}
    for name, values in (constants or {}).items():
        own = name == "forward" or re.fullmatch(r"input\d+_least", str(name))
        if not isinstance(name, str) or not (name.isidentifier() and name.isascii()) or own:
            raise ConfigError(
                f"constants: the name {name!r} must be of letters, digits and _, and neither 'forward' nor 'input0_least', which "
                "a .pte has itself; give another name"
            )
        try:
            if isinstance(values, str | bytes | Mapping):
                raise TypeError
            found[name] = [float(value) for value in values]
        except (TypeError, ValueError):
            raise ConfigError(
                f"constants: {name}={str(values)[:80]!r} must be a sequence of numbers, as [0.485, 0.456, 0.406]"
            ) from None
    return found
