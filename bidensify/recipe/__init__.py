"""Recipes (YAML): what a run is made of, read and checked. Running them is ``bidensify.train``."""

from __future__ import annotations

from bidensify.recipe.load import load_recipe
from bidensify.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe"]
