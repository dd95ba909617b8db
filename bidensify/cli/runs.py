"""``finetune`` and ``check``: training a student, and what that will need."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bidensify._util.terminal import console, shell
from bidensify.cli import arguments
from bidensify.cli.command import STOPPED, command
from bidensify.cli.options import AsJson, Config, Debug, Set
from bidensify.errors import ConfigError

if TYPE_CHECKING:
    from bidensify.recipe import Recipe
    from bidensify.train import RunCheck, RunResult


RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", exists=True, dir_okay=False, help="A recipe (YAML).", show_default=False)
]
Role = Annotated[Literal["student", "teacher"], typer.Option(help="Which of the recipe's two networks to train.")]
Teacher = Annotated[
    Path | None,
    typer.Option("--teacher", "-t", exists=True, help="The teacher's run folder or weights' file.", show_default=False),
]


@command(
    "bidensify finetune recipes/scenes_segmentation.yaml --run-dir runs/scenes",
    "bidensify finetune recipes/scenes_segmentation.yaml --run-dir runs/scenes --resume",
    "bidensify finetune recipes/scenes_segmentation.yaml --run-dir runs/bnn -s binarize.method=bnn -s stages[0].epochs=2",
    "bidensify finetune recipes/scenes_segmentation.yaml --run-dir runs/mixed -t runs/scenes_teacher --config config.json",
    "bidensify finetune recipes/scenes_segmentation.yaml --dry-run",
    "accelerate launch -m bidensify finetune recipes/scenes_segmentation.yaml --run-dir runs/scenes",
)
def finetune(
    recipe: RecipeArgument,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", "-d", help="The run's folder.", show_default=False)
    ] = None,
    role: Role = "student",
    teacher: Teacher = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    config: Config = None,
    settings: Set = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Build, plan and check everything, show layers, cost and time; train nothing."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")] = False,
    debug: Debug = False,
) -> None:
    """Distil a full-precision teacher into a 1-bit student, as a recipe says.

    Where the recipe has teacher.stages and no teacher's weights are given, the teacher is trained first, in a folder
    beside the run's (RUN_DIR_teacher). With --config (as allocate writes it) that is the recipe's binarize.
    """
    from bidensify.recipe import load_recipe
    from bidensify.train import run_recipe

    given = [] if config is None else [f"binarize={json.dumps(arguments.make_config(config, None, []).to_dict())}"]
    loaded = load_recipe(recipe, [*given, *(settings or [])])
    if dry_run:
        rehearse(str(recipe), loaded, role, teacher, run_dir)
        return
    if run_dir is None:
        raise ConfigError("finetune needs --run-dir, the folder that the run is written to; --dry-run needs none")
    try:
        result = run_recipe(
            loaded, run_dir, role=role, teacher_weights=teacher, train_teacher=True, resume=resume, quiet=quiet
        )
    except KeyboardInterrupt:
        console().print("Stopped. The same command with --resume goes on from the last checkpoint.")
        raise typer.Exit(STOPPED) from None
    # Under a launcher every process comes here; one of them speaks.
    if os.environ.get("RANK", "0") == "0":
        show_metrics(f"{run_dir}, epoch {result.best_epoch + 1}", result.metrics)
        tell_next(result, role)


def rehearse(title: str, recipe: Recipe, role: Role, teacher: Path | None, run_dir: Path | None) -> None:
    """Prints what a run would do: every layer, what the network costs, and what ``check`` finds.

    Raises:
        Exit: with code 1, the run would be refused.
    """
    from bidensify.costs.summary import summary
    from bidensify.rewrite.record.channels import image_channels
    from bidensify.tasks import paper_columns
    from bidensify.train import check_run

    found = check_run(recipe, role=role, teacher_weights=teacher, run_dir=run_dir)
    screen, network = console(), found.network
    plan: Any = getattr(network, "bidensify_plan", None)
    if plan is not None:
        screen.print(plan.table())
    if network is not None and recipe.data.size is not None:
        cost = summary(network, (image_channels(network), *recipe.image_size))
        columns = paper_columns({}, params=cost.total("params"), ops=cost.total("ops"))
        text = ", ".join(f"{name} {value:,}" for name, value in columns.items())
        found.add("cost", f"{text} at {recipe.image_size[0]}x{recipe.image_size[1]}; {cost.weight()}")
    show_check(title, found)


def show_check(title: str, found: RunCheck) -> None:
    """Prints what a check found; ends with exit code 1 where a run would be refused."""
    from rich.table import Table

    table = Table("what", "found", title=title, title_justify="left")
    for row in found.rows:
        table.add_row(*row)
    screen = console()
    screen.print(table)
    for kind, lines in (("warning", found.warnings), ("problem", found.problems)):
        for line in lines:
            screen.print(f"{kind}: {line}", soft_wrap=True)
    if found.problems:
        raise typer.Exit(1)


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
    "bidensify check recipes/scenes_segmentation.yaml",
    "bidensify check recipes/scenes_segmentation.yaml -s data.size=[96,128] --json",
)
def check(
    recipe: RecipeArgument,
    role: Role = "student",
    teacher: Teacher = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", "-d", help="Where the run's folder will be.", show_default=False)
    ] = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Look at everything that a run will need: labels, sizes, weights, options, disk space, time per epoch. Trains nothing.

    Ends with exit code 1 if the run would be refused.
    """
    from bidensify.recipe import load_recipe
    from bidensify.train import check_run

    found = check_run(load_recipe(recipe, settings or []), role=role, teacher_weights=teacher, run_dir=run_dir)
    if not as_json:
        show_check(str(recipe), found)
        return
    print(arguments.to_json({"rows": found.rows, "warnings": found.warnings, "problems": found.problems}))
    if found.problems:
        raise typer.Exit(1)
