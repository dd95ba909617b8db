"""What a SOURCE on the command line is: a run folder, or a directory that ``save_pretrained`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bidensify.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from bidensify.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """A loaded model in eval mode, and the recipe that says which data and task it is for (None: not known)."""

    model: nn.Module
    recipe: Recipe | None


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a training run."""
    return (folder / "recipe.yaml").is_file()


def is_saved(folder: Path) -> bool:
    """Whether ``folder`` was written by ``save_pretrained``."""
    return (folder / "bidensify.json").is_file()


def load_source(folder: Path, recipe: Path | None = None, overrides: Sequence[str] = ()) -> Source:
    """Loads a run folder or a saved directory.

    Args:
        folder: the run folder or saved directory.
        recipe: a recipe's file; it replaces the run's own, and gives a saved directory its base model.
        overrides: ``path=value`` changes to the recipe.

    Raises:
        ConfigError: an override is of the network itself, the folder is neither, or a saved directory's base model is not known.
    """
    from bidensify.recipe import load_recipe
    from bidensify.train import load_run

    chosen = None if recipe is None else load_recipe(recipe, overrides)
    if is_run(folder):
        fixed = [text for text in overrides if text.split(".")[0].split("=")[0] in ("model", "binarize")]
        if fixed:
            raise ConfigError(
                f"--set {fixed[0]} has no effect on {str(folder)!r}: a trained network is what it is; leave it out, or "
                "train another run"
            )
        model, own = load_run(folder)
        return Source(model.eval(), chosen if chosen is not None else load_recipe(own, overrides))
    if not is_saved(folder):
        raise ConfigError(
            f"{str(folder)!r} is neither a run folder (it has no recipe.yaml) nor a saved model (it has no "
            f"bidensify.json); give what `bidensify finetune` or `bidensify pack` wrote"
        )
    from bidensify import from_pretrained

    model = from_pretrained(folder, None if chosen is None else chosen.build_model())
    return Source(model.eval(), chosen)


def need_recipe(source: Source, folder: Path) -> Recipe:
    """Returns the source's recipe.

    Raises:
        ConfigError: there is none; a saved directory does not know its data.
    """
    if source.recipe is None:
        raise ConfigError(
            f"{str(folder)!r} does not say which data and task it is for; give the recipe of its run with --recipe"
        )
    return source.recipe
