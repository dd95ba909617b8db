"""What a SOURCE on the command line is: a run folder, or a directory that ``save_pretrained`` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bidensify.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bidensify.recipe import Recipe

__all__ = ["Source", "float_network", "is_run", "is_saved", "load_source"]


@dataclass(frozen=True)
class Source:
    """A loaded model in eval mode, and the recipe that says which data and task it is for (None: not known)."""

    folder: Path
    model: nn.Module
    recipe: Recipe | None

    def need_recipe(self) -> Recipe:
        """Returns the source's recipe.

        Raises:
            ConfigError: there is none: the network was saved without one.
        """
        if self.recipe is None:
            raise ConfigError(
                f"{str(self.folder)!r} does not say which data and task it is for; give the recipe of its run with --recipe"
            )
        return self.recipe

    def example(self, batch: int = 1) -> Tensor | None:
        """Returns a random input of the recipe's size; None where the size is not known."""
        import torch

        from bidensify.rewrite.record.channels import image_channels

        if self.recipe is None or self.recipe.data.size is None:
            return None
        return torch.randn(batch, image_channels(self.model), *self.recipe.image_size)

    def normalisation(self) -> dict[str, list[float]]:
        """image_mean and image_std of the recipe, per channel of an image scaled to [0, 1]; empty where they are not known."""
        found = None if self.recipe is None else self.recipe.normalisation()
        return {} if found is None else dict(zip(("image_mean", "image_std"), map(list, found), strict=True))


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a training run."""
    return (folder / "recipe.yaml").is_file()


def is_saved(folder: Path) -> bool:
    """Whether ``folder`` was written by ``save_pretrained``."""
    return (folder / "bidensify.json").is_file()


def load_source(folder: Path, recipe: Path | None = None, overrides: Sequence[str] = (), trust: bool = False) -> Source:
    """Loads a run folder or a saved directory.

    Args:
        folder: the run folder or saved directory.
        recipe: a recipe's file; it replaces the folder's own.
        overrides: ``path=value`` changes to the recipe.
        trust: run the code that the folder's own recipe names; without, none is run.

    Raises:
        ConfigError: an override is of the network itself, the folder is neither, or a saved directory's base model is not known.
    """
    from bidensify.recipe import load_recipe
    from bidensify.train import load_run

    fixed = [text for text in overrides if text.split(".")[0].split("=")[0] in ("model", "binarize")]
    if fixed and not (is_saved(folder) and recipe is not None):
        raise ConfigError(
            f"--set {fixed[0]} has no effect on {str(folder)!r}: a trained network is what it is; leave it out, or train "
            "another run"
        )
    chosen = None if recipe is None else load_recipe(recipe, overrides)
    if is_run(folder):
        model, own = load_run(folder, trust=trust)
        return Source(folder, model.eval(), chosen if chosen is not None else load_recipe(own, overrides, trust=trust))
    if not is_saved(folder):
        raise ConfigError(
            f"{str(folder)!r} is neither a run folder (it has no recipe.yaml) nor a saved model (it has no "
            f"bidensify.json); give what `bidensify finetune` or `bidensify pack` wrote"
        )
    from bidensify import from_pretrained

    base = chosen.build_model() if chosen is not None and chosen.model is not None else None
    model = from_pretrained(folder, base).eval()
    if chosen is None:
        # The file was checked when its weights were read.
        kept = json.loads((folder / "bidensify.json").read_text(encoding="utf-8"))["extra"].get("recipe")
        chosen = load_recipe(kept, overrides, trust=trust) if isinstance(kept, dict) else None
    return Source(folder, model, chosen)


def float_network(source: Source, trust: bool = False) -> nn.Module:
    """Builds the full-precision network that the source was made from, with fresh weights (as fast as trained ones).

    Raises:
        ConfigError: the source does not say how.
    """
    from bidensify.models import rebuild_model

    made_of = getattr(source.model, "bidensify_source", None)
    if not isinstance(made_of, dict):
        raise ConfigError(
            f"{str(source.folder)!r} does not say how its full-precision network is built (it was not made by name), so "
            "there is nothing to time it against"
        )
    return rebuild_model(made_of["spec"], made_of["options"], str(source.folder), trust=trust).eval()
