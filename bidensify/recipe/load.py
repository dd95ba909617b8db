"""Reads recipes: YAML by the safe loader, overrides, and every mistake at once with its path."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from bidensify._util.names import near
from bidensify.errors import ConfigError
from bidensify.recipe.check import check_recipe
from bidensify.recipe.schema import Recipe


class _Loader(yaml.SafeLoader):
    """A safe loader that also notes keys that appear twice (YAML forbids them, PyYAML lets the last one win)."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            # Only scalars can be equal keys here, and a merge key (<<) is no key of the mapping.
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                self.duplicates.append(f"line {line}: the key {key!r} was given in line {seen[key]} already; keep one")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


# Numbers such as 1e-3 are floats, as in YAML 1.2 and JSON; PyYAML's rule asks for a dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe from a YAML file or a mapping.

    Args:
        source: path of a YAML file, a mapping of the same structure, or a recipe (to apply overrides to it).
        overrides: strings ``"path=value"``, for example ``"data.batch_size=4"`` or ``"stages[1].lr=1e-3"``; the value
            is read as YAML.

    Raises:
        ConfigError: the file cannot be read, or the recipe has mistakes; the message lists all, each with its path.
    """
    mistakes: list[str] = []
    if isinstance(source, Recipe):
        data, title = source.to_dict(), f"recipe {source.name!r}"
    elif isinstance(source, Mapping):
        data, title = _copy(source), "recipe"
    else:
        data, title = _read(Path(source), mistakes), f"recipe {os.fspath(source)!r}"
    for override in overrides:
        _override(data, override, mistakes)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        mistakes += [_describe(dict(item)) for item in error.errors()]
    if recipe is not None:
        mistakes += check_recipe(recipe)
    if mistakes or recipe is None:
        count = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "a mistake"
        raise ConfigError(f"{title} has {count}:\n" + "\n".join(f"  {mistake}" for mistake in mistakes))
    return recipe


def _read(path: Path, mistakes: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = near(path.name, sorted(p.name for p in path.parent.glob("*.y*ml")))
        raise ConfigError(f"recipe {str(path)!r} does not exist; give the path of a YAML file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read as text: {error}") from error
    loader = _Loader(text)
    try:
        data = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {str(path)!r} is not valid YAML: {error}") from error
    finally:
        loader.dispose()
    mistakes += loader.duplicates
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {str(path)!r} must hold a mapping of sections, got {type(data).__name__}")
    return data


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def _override(data: dict[str, Any], override: str, mistakes: list[str]) -> None:
    path, equals, text = override.partition("=")
    parts: list[str | int] = []
    for piece in path.strip().replace("[", ".[").split("."):
        index = re.fullmatch(r"\[?(\d+)\]?", piece)
        parts.append(int(index.group(1)) if index else piece)
    if not equals or not all(part != "" for part in parts):
        mistakes.append(f"override {override!r}: write path=value, for example data.batch_size=4 or stages[1].lr=1e-3")
        return
    loader = _Loader(text)
    try:
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        mistakes.append(f"override {override!r}: the value is not valid YAML: {error}")
        return
    mistakes += [f"override {override!r}: {duplicate}" for duplicate in loader.duplicates]
    target: Any = data
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if isinstance(target, list):
            if not isinstance(part, int) or part >= len(target):
                mistakes.append(f"override {override!r}: {part!r} is not an index below {len(target)}")
                return
        elif not isinstance(target, dict):
            mistakes.append(f"override {override!r}: there is no section to set {part!r} in, only {target!r}")
            return
        else:
            part = str(part)
        if following is None:
            target[part] = value
        else:
            if isinstance(target, dict) and target.get(part) is None:
                target[part] = {}
            target = target[part]


def format_path(parts: Sequence[str | int]) -> str:
    """Returns ``stages[1].epochs`` for ("stages", 1, "epochs")."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "(the whole recipe)"


def _describe(error: dict[str, Any]) -> str:
    loc = tuple(error["loc"])
    path = format_path(loc)
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key{near(loc[-1], _keys(loc[:-1]))}"
    if error["type"] == "missing":
        return f"{path}: missing; this key is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _keys(loc: tuple[str | int, ...]) -> list[str]:
    """Returns the keys of the section at ``loc``."""
    kind: Any = Recipe
    for part in loc:
        kind = _section(kind.model_fields[part].annotation if isinstance(part, str) and _is_model(kind) else kind)
    return list(kind.model_fields) if _is_model(kind) else []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _section(annotation: Any) -> Any:
    """Returns the section class within ``list[X]``, ``X | None`` and ``Annotated[X, ...]``."""
    if _is_model(annotation):
        return annotation
    for argument in typing.get_args(annotation):
        found = _section(argument)
        if found is not None:
            return found
    return None
