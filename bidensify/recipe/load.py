"""Reads recipes: YAML by the safe loader, overrides, and every mistake at once with its path."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bidensify._util.modules import import_own, is_imported
from bidensify._util.names import near
from bidensify._util.yamltext import LONGEST, parse_yaml
from bidensify.errors import ConfigError
from bidensify.losses import LOSSES
from bidensify.models import code_of
from bidensify.recipe.check import check_recipe
from bidensify.recipe.schema import Recipe


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    trust: bool = True,
) -> Recipe:
    """Loads a recipe from a YAML file or a mapping, and imports the modules that it names in ``imports``.

    Args:
        source: path of a YAML file, a mapping of the same structure, or a recipe (to apply overrides to it).
        overrides: strings ``"path=value"``, for example ``"data.batch_size=4"`` or ``"stages[1].lr=1e-3"``; the value
            is read as YAML.
        trust: whether the recipe is yours, or one that you have read. Without, no code that only the recipe names is run:
            its ``imports`` must have been imported before, and its network must be of a registered source.

    Raises:
        ConfigError: the file cannot be read, names code and is not trusted, or the recipe has mistakes; the message lists
            all of them, each with its path.
    """
    mistakes: list[str] = []
    if isinstance(source, Recipe):
        data, title = source.to_dict(), f"recipe {source.name!r}"
        trust = trust and source._trusted
    elif isinstance(source, Mapping):
        data, title = _copy(source), "recipe"
    else:
        data, title = _read(Path(source), mistakes), f"recipe {os.fspath(source)!r}"
    for override in overrides:
        _override(data, override, mistakes)
    _import(data, title, trust)
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
    recipe._trusted = trust
    return recipe


def _import(data: Mapping[str, Any], title: str, trust: bool) -> None:
    """Imports a user's own modules, and that of the network's factory, before the names that they register are looked up."""
    names, model = data.get("imports"), data.get("model")
    source = model.get("source") if isinstance(model, Mapping) else None
    code = code_of(source) if isinstance(source, str) and trust else None
    if code is not None:
        with suppress(ConfigError):  # what builds the network says what is wrong with it
            import_own(code)
    for name in names if isinstance(names, list) else ():
        if not isinstance(name, str):
            continue  # the schema says what is wrong with it
        if not trust and not is_imported(name):
            raise ConfigError(
                f"{title} imports {name!r}, which only this file names, and a file must not run code. If you know where it is "
                f"from, allow it: trust=True in Python, --trust on the command line; or import {name!r} yourself first"
            )
        if trust:
            import_own(name)


def _read(path: Path, mistakes: list[str]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except FileNotFoundError:
        hint = near(path.name, sorted(p.name for p in path.parent.glob("*.y*ml")))
        raise ConfigError(f"recipe {str(path)!r} does not exist; give the path of a YAML file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read as text: {error}") from error
    try:
        data, duplicates = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"recipe {str(path)!r} is not valid YAML: {error}") from error
    mistakes += duplicates
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
    try:
        value, duplicates = parse_yaml(text)
    except ValueError as error:
        mistakes.append(f"override {override!r}: the value is not valid YAML: {error}")
        return
    mistakes += [f"override {override!r}: {duplicate}" for duplicate in duplicates]
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
    if "losses" in loc:
        below = loc[loc.index("losses") + 1 :]
        return list(LOSSES[str(below[0])].model_fields) if below else LOSSES.names()
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
