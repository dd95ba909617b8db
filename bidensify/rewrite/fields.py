"""Types of what a stored plan may hold: pydantic checks each value as it is read; to everything else they are plain types.

A plan may come from anybody. What is not of these types is refused when the plan is read; what fits no network is refused
when it is applied. No text of a plan is ever executed, imported or pasted into code.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

__all__ = [
    "MANY",
    "STRICT",
    "Channels",
    "Count",
    "Identifier",
    "MethodName",
    "ModulePath",
    "Number",
    "Size",
    "Slope",
    "Text",
    "one_of",
]

STRICT = ConfigDict(strict=True, extra="forbid")
MANY = Field(max_length=100_000)

_LONGEST = 4000
_LONGEST_PATH = 500
# Quotes, brackets and the like are in no name that a network's author would give a module.
_NO_NAME = frozenset("'\"`()[]{}\\;")


def _identifier(name: str) -> str:
    if not name.isidentifier() or name.startswith("__") or len(name) > _LONGEST_PATH:
        raise ValueError("must be a plain identifier")
    return name


def _module_path(path: str) -> str:
    parts = path.split(".")
    if path and any(not part or part.startswith("__") or not _NO_NAME.isdisjoint(part) for part in parts):
        raise ValueError("must be the path of a module, such as 'encoder.layer1.0.conv1'")
    if len(path) > _LONGEST_PATH or not path.isprintable():
        raise ValueError(f"must be printable and at most {_LONGEST_PATH} characters long")
    return path


def _text(text: str) -> str:
    # A terminal obeys control characters.
    if any(unicodedata.category(character) == "Cc" and character not in "\n\t" for character in text):
        raise ValueError("must hold no control characters")
    return text


def _method(name: str) -> str:
    if name and not name.replace("-", "_").isidentifier():
        raise ValueError("must be a method's name: letters, digits, '-' and '_'")
    return name


def one_of(*choices: str | int) -> AfterValidator:
    """Refuses every other value."""

    def check(value: str | int) -> str | int:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}")
        return value

    return AfterValidator(check)


Identifier = Annotated[str, AfterValidator(_identifier)]
ModulePath = Annotated[str, AfterValidator(_module_path)]
Text = Annotated[str, Field(max_length=_LONGEST), AfterValidator(_text)]
MethodName = Annotated[str, Field(max_length=100), AfterValidator(_method)]
Number = Annotated[int, Field(ge=-(2**53), le=2**53)]
Slope = Annotated[float, Field(ge=-1e6, le=1e6)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Size = Annotated[int, Field(ge=0, le=2**24)]
# Memory is taken for so many values.
Channels = Annotated[int, Field(ge=0, le=2**16)]
