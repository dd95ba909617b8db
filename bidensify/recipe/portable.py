"""What of a recipe goes along with a packed network: its task, its input and its validation data, but no place on a disk."""

from __future__ import annotations

from typing import Any

from bidensify.errors import BidensifyError
from bidensify.recipe.schema import Recipe

__all__ = ["portable"]

# The network comes with the file, its teacher and its training data stay where they are, and code is not named by data.
_LEFT = ("model", "teacher", "imports")
_LEFT_OF_DATA = ("train", "root", "train_size", "augment", "workers")


def portable(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as JSON-able data that :func:`load_recipe` takes, for use where the network runs.

    Classes, their names and colours, mean and std are written out where the validation data can be asked, so that
    predictions need no data later.
    """
    data = recipe.to_dict()
    for key in _LEFT:
        data.pop(key, None)
    for key in _LEFT_OF_DATA:
        data["data"].pop(key, None)
    if data["data"].get("val"):
        data["data"]["val"].pop("root", None)
    data["stages"] = data["stages"][-1:]
    try:
        info = recipe.build_dataset("val").info
        task = recipe.build_task(info)
    except (BidensifyError, OSError):
        return data
    data["data"].update(mean=list(recipe.data.mean or info.mean), std=list(recipe.data.std or info.std))
    asked = getattr(task, "options_from", None)
    for key, value in (asked(info) if asked is not None else {}).items():
        data["task"].setdefault(key, _plain(value))
    return data


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
