"""``finetune`` and ``evaluate``: training a student and measuring it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bidensify._util.terminal import console, shell
from bidensify.cli import arguments
from bidensify.cli.command import STOPPED, command
from bidensify.cli.options import AsJson, Debug, Device, RecipeFile, Set, SourceFolder
from bidensify.cli.sources import load_source

if TYPE_CHECKING:
    from bidensify.recipe import Recipe
    from bidensify.train import RunResult


@command(
    "bidensify finetune recipes/scenes_segmentation.yaml --run-dir runs/scenes",
    "bidensify finetune recipes/scenes_segmentation.yaml --run-dir runs/scenes --resume",
    "bidensify finetune recipes/scenes_segmentation.yaml --run-dir runs/bnn -s binarize.method=bnn -s stages[0].epochs=2",
    "accelerate launch -m bidensify finetune recipes/scenes_segmentation.yaml --run-dir runs/scenes",
)
def finetune(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", exists=True, dir_okay=False, help="A recipe (YAML).", show_default=False)
    ],
    run_dir: Annotated[Path, typer.Option("--run-dir", "-d", help="The run's folder.", show_default=False)],
    role: Annotated[
        Literal["student", "teacher"], typer.Option(help="Which of the recipe's two networks to train.")
    ] = "student",
    teacher: Annotated[
        Path | None,
        typer.Option(
            "--teacher", "-t", exists=True, help="The teacher's run folder or .safetensors file.", show_default=False
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    settings: Set = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")] = False,
    debug: Debug = False,
) -> None:
    """Distil a full-precision teacher into a 1-bit student, as a recipe says.

    Where the recipe has teacher.stages and no teacher's weights are given, the teacher is trained first, in a folder
    beside the run's (RUN_DIR_teacher).
    """
    from bidensify.recipe import load_recipe

    loaded = load_recipe(recipe, settings or [])
    try:
        result = train(loaded, run_dir, role, teacher, resume, quiet)
    except KeyboardInterrupt:
        console().print("Stopped. The same command with --resume goes on from the last checkpoint.")
        raise typer.Exit(STOPPED) from None
    # Under a launcher every process comes here; one of them speaks.
    if os.environ.get("RANK", "0") == "0":
        show_metrics(f"{run_dir}, epoch {result.best_epoch + 1}", result.metrics)
        tell_next(result, role)


def train(
    loaded: Recipe, run_dir: Path, role: Literal["student", "teacher"], teacher: Path | None, resume: bool, quiet: bool
) -> RunResult:
    """Trains one network of a recipe, and before a student its teacher if there is none; see ``finetune``."""
    from bidensify.train import run_recipe
    from bidensify.train.rundir.folder import RunFolder

    # A folder that cannot be the student's is told before the teacher is trained.
    RunFolder(run_dir).inspect(loaded if role == "student" else loaded.for_teacher(), resume)
    weights = teacher
    section = loaded.teacher
    if role == "student" and weights is None and section is not None and section.weights is None and section.stages:
        weights = run_dir.with_name(f"{run_dir.name}_teacher")
        if not quiet:
            text = f"No teacher's weights given: the recipe's teacher comes first, in {weights}"
            console().print(text, soft_wrap=True)
        run_recipe(loaded, weights, role="teacher", resume=weights.exists(), quiet=quiet)
    return run_recipe(loaded, run_dir, role=role, teacher_weights=weights, resume=resume, quiet=quiet)


def tell_next(result: RunResult, role: str) -> None:
    """Prints the command that usually follows."""
    folder = result.run_dir
    if role == "student":
        after = shell("bidensify", "pack", folder, folder / "packed")
    else:
        after = f"bidensify finetune RECIPE --run-dir STUDENT -t {shell(folder)}"
    console().print(f"Next: {after}", soft_wrap=True)


def show_metrics(title: str, metrics: dict[str, float]) -> None:
    """Prints metrics as a table, the classes' own after the others."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in sorted(metrics, key=lambda name: "/" in name):
        table.add_row(name, f"{metrics[name]:.4f}")
    console().print(table)


@command(
    "bidensify evaluate runs/scenes",
    "bidensify evaluate runs/scenes/packed --json",
)
def evaluate(
    source: SourceFolder,
    recipe: RecipeFile = None,
    settings: Set = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a student, a teacher or a packed model on its recipe's validation data."""
    from bidensify.train import evaluate as measure

    place = arguments.parse_device(device)
    loaded = load_source(source, recipe, settings or [])
    chosen = loaded.need_recipe()
    val = chosen.build_dataset("val")
    metrics = measure(
        loaded.model.to(place),
        chosen.build_task(val.info),
        val,
        batch_size=chosen.data.eval_batch_size or chosen.data.batch_size,
        workers=chosen.data.workers,
        device=place,
        precision=chosen.precision,
        channels_last=chosen.channels_last,
    )
    if as_json:
        print(arguments.to_json(metrics))
    else:
        split = chosen.data.val
        show_metrics(f"{source} on {split.name}/{split.split}" if split is not None else str(source), metrics)
