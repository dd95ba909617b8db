"""Where two trees of data differ: recipes, inputs."""

from __future__ import annotations

from typing import Any

__all__ = ["at", "differences"]


def at(data: Any, path: str) -> Any:
    """What lies at a path of keys ("train.samples"), None where nothing does."""
    for part in path.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns the paths at which two trees of JSON-able data differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [path]
