"""``calibrate``: a student without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bidensify._util.terminal import console
from bidensify.cli import arguments
from bidensify.cli.command import command
from bidensify.cli.options import AsJson, Config, Debug, Set


@command(
    "bidensify calibrate recipes/scenes_segmentation.yaml -t runs/scenes_teacher --out runs/calibrated",
    "bidensify calibrate recipes/scenes_segmentation.yaml -t runs/scenes_teacher --no-least-squares",
)
def calibrate(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", exists=True, dir_okay=False, help="A recipe (YAML).", show_default=False)
    ],
    teacher: Annotated[
        Path,
        typer.Option("--teacher", "-t", exists=True, help="The teacher's run folder or weights.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Save the latent network here.", show_default=False)] = None,
    least_squares: Annotated[
        bool, typer.Option("--least-squares/--no-least-squares", help="Fit scales to the teacher's activations.")
    ] = True,
    batches: Annotated[int | None, typer.Option(min=1, help="Training batches.", show_default="the recipe's")] = None,
    config: Config = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Set thresholds, norms, ranges and scales of a student from a few batches, and measure it. Trains nothing.

    What one bit loses, training wins back (finetune); this shows what there is without. Fits layers in int8, too.
    """
    import bidensify
    from bidensify.data import Seeded
    from bidensify.recipe import load_recipe
    from bidensify.recipe.portable import portable
    from bidensify.train import build_student, build_teacher, evaluate
    from bidensify.train.stages import calibration_batches

    given = [] if config is None else [f"binarize={json.dumps(arguments.make_config(config, None, []).to_dict())}"]
    loaded = load_recipe(recipe, [*given, *([f"calibrate.batches={batches}"] if batches else []), *(settings or [])])
    if out is not None:
        arguments.refuse_existing(out)
    full = build_teacher(loaded, teacher)
    student = build_student(loaded, full)
    place = next(student.parameters()).device
    train, val = loaded.build_datasets()
    images = calibration_batches(student, Seeded(train, loaded.seed), loaded, place, 0)
    if least_squares:
        bidensify.fit_scales(student, full, images)
    else:
        bidensify.calibrate(student, images)
    task, size = loaded.build_task(val.info), loaded.data.eval_batch_size or loaded.data.batch_size
    options: dict[str, Any] = {"batch_size": size, "channels_last": loaded.channels_last, "views": loaded.views()}
    metrics = {
        name: evaluate(model.eval(), task, val, **options)[task.primary]
        for name, model in (("teacher", full), ("student", student))
    }
    if out is not None:
        bidensify.save_pretrained(student, out, extra={"recipe": portable(loaded)})
    if as_json:
        print(arguments.to_json({"metric": task.primary, "images": sum(len(x) for x in images), **metrics}))
        return
    console().print(
        f"{task.primary}, untrained, from {sum(len(x) for x in images)} images: {metrics['student']:.4f}; full precision "
        f"{metrics['teacher']:.4f}",
        soft_wrap=True,
    )
