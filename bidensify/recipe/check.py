"""What pydantic cannot see: sections that must agree with one another, and options of code outside this package."""

from __future__ import annotations

from bidensify.errors import BidensifyError
from bidensify.recipe.schema import Recipe


def check_recipe(recipe: Recipe) -> list[str]:
    """Returns the mistakes of a recipe whose sections are each well-formed."""
    mistakes: list[str] = []
    if recipe.binarize:
        try:
            recipe.config()
        except (BidensifyError, TypeError) as error:
            mistakes.append(f"binarize: {error}")
    for index, stage in enumerate(recipe.stages):
        depth = recipe.task.name == "depth"
        if stage.losses.kl is not None and depth:
            mistakes.append(f"stages[{index}].losses.kl: depth has no class distribution; use kd_l1")
        if stage.losses.kd_l1 is not None and not depth:
            mistakes.append(f"stages[{index}].losses.kd_l1: is for the task 'depth', not {recipe.task.name!r}; use kl")
    return mistakes
