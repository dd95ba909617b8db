"""A run's budget: measured and spent before the run begins, kept in its folder."""

from __future__ import annotations

import warnings
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from bidensify._util.seeding import seeded
from bidensify._util.terminal import console
from bidensify.config import BidensifyConfig
from bidensify.data import Seeded
from bidensify.errors import ConfigError
from bidensify.precisions import PRECISIONS, Sensitivity, allocation, sensitivity
from bidensify.recipe import Recipe
from bidensify.rewrite import bidensify
from bidensify.tasks import Views
from bidensify.train.distributed import make_accelerator
from bidensify.train.loaders import placed, training_loader
from bidensify.train.rundir.folder import RunFolder
from bidensify.train.rundir.logs import write_json

Sample = dict[str, Tensor]
__all__ = ["allocate_run", "recipe_sensitivity"]

_BATCHES = 4


def allocate_run(
    recipe: Recipe,
    teacher: nn.Module | None,
    train: Dataset[Sample],
    val: Dataset[Sample],
    folder: RunFolder,
    *,
    quiet: bool = False,
) -> BidensifyConfig:
    """Finds who gets which precision under the recipe's budget, from the forecast around its teacher.

    The folder keeps the forecast (sensitivity.json; a killed one goes on) and the result (allocation.json), so a run that is
    resumed trains the student that it began with.

    Args:
        recipe: with a budget; ``budget.images`` of the validation images are measured, evenly spaced.
        teacher: trained.
        train: calibrates, with the recipe's augmentation.
        val: is measured.
        folder: the run's.
        quiet: print nothing.

    Raises:
        ConfigError: there is no teacher, or the budget cannot be met.
    """
    budget = recipe.budget
    assert budget is not None
    if teacher is None:
        raise ConfigError(
            f"recipe {recipe.name!r} has binarize.budget, which is spent by what each layer costs a trained teacher; add "
            "teacher.weights or teacher.stages"
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.check_places()
    accelerator = make_accelerator(recipe)
    # The others read what the first has kept.
    with accelerator.main_process_first(), placed(teacher, accelerator.device, recipe), seeded(recipe.seed):
        image = train[0]["image"][None].to(next(teacher.parameters()))
        student = bidensify(teacher, recipe.config(), example_inputs=image.expand(2, -1, -1, -1))
        found = recipe_sensitivity(
            recipe,
            student,
            teacher,
            train,
            val,
            images=budget.images,
            precisions=list(PRECISIONS) if budget.precisions is None else budget.precisions,
            milliseconds=budget.table,
            cache=folder.sensitivity,
            quiet=quiet or not accelerator.is_main_process,
        )
        chosen = allocation(found, budget, teacher)
    if accelerator.is_main_process:
        write_json(folder.allocation, chosen.to_dict())
        if not quiet:
            for line in chosen.lines():
                console().print(line, soft_wrap=True)
    return chosen.config


def recipe_sensitivity(
    recipe: Recipe,
    student: nn.Module,
    teacher: nn.Module | None,
    train: Dataset[Sample],
    val: Dataset[Sample],
    *,
    images: int | None = None,
    **options: Any,
) -> Sensitivity:
    """:func:`bidensify.sensitivity` on a recipe's data: ``images`` of its validation images, evenly spaced (by default all), with
    thresholds and norms from its first training batches. Every image is looked at once, whole; where ``evaluate`` has windows,
    mirror images or scales, a warning says so."""
    if recipe.views() != Views():
        warnings.warn(
            f"sensitivity of recipe {recipe.name!r} looks at every image once, whole, not with evaluate's window, flip and "
            "scales: its metric is another one than the run's",
            UserWarning,
            stacklevel=2,
        )
    length = len(val)  # type: ignore[arg-type]
    count = min(images or length, length)
    loader = training_loader(Seeded(train, recipe.seed), recipe, 0)
    return sensitivity(
        student,
        Subset(val, [index * length // count for index in range(count)]),
        teacher,
        task=recipe.build_task(getattr(train, "info", None)),
        calibration=[batch["image"] for batch in islice(loader, _BATCHES)],
        batch_size=recipe.data.eval_batch_size or recipe.data.batch_size,
        channels_last=recipe.channels_last,
        **options,
    )
