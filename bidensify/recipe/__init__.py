"""Recipes (YAML) and the training loop that runs them: a teacher, then the 1-bit student distilled from it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bidensify.recipe.folder import RunResult
    from bidensify.recipe.load import load_recipe
    from bidensify.recipe.schema import Recipe
    from bidensify.train.evaluation import evaluate
    from bidensify.train.loop import finetune
    from bidensify.train.run import build_student, build_teacher, load_run, run_recipe

_PUBLIC = {
    "Recipe": "bidensify.recipe.schema",
    "RunResult": "bidensify.recipe.folder",
    "build_student": "bidensify.train.run",
    "build_teacher": "bidensify.train.run",
    "evaluate": "bidensify.train.evaluation",
    "finetune": "bidensify.train.loop",
    "load_recipe": "bidensify.recipe.load",
    "load_run": "bidensify.train.run",
    "run_recipe": "bidensify.train.run",
}

__all__ = [
    "Recipe",
    "RunResult",
    "build_student",
    "build_teacher",
    "evaluate",
    "finetune",
    "load_recipe",
    "load_run",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'bidensify.recipe' has no attribute {name!r}")
