"""``sensitivity``: which layer hears how much of its signs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bidensify._util.terminal import console, shell
from bidensify.cli.command import command
from bidensify.cli.options import AsJson, Debug, Set, Trust

if TYPE_CHECKING:
    from torch import nn

    from bidensify.recipe import Recipe

Cost = Annotated[Literal["macs", "ops", "bytes", "ms"], typer.Option(help="What gains are divided by.")]


@command(
    "bidensify sensitivity runs/scenes",
    "bidensify sensitivity recipes/scenes_segmentation.yaml --teacher runs/scenes_teacher --plot sensitivity.svg",
    "bidensify sensitivity runs/scenes --groups --precision 'act_bits 2' --cost bytes",
)
def sensitivity(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|RECIPE", exists=True, help="A run's folder, or a recipe.", show_default=False),
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(
            "--teacher", "-t", exists=True, help="The teacher's run folder or weights.", show_default="that of the run"
        ),
    ] = None,
    around: Annotated[
        Literal["teacher", "student"],
        typer.Option(help="The unit alone binary in the teacher, or alone in float in the student."),
    ] = "teacher",
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Beside binary and float, which takes as long again: 'act_bits 2'.", show_default=False),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="The layers below a module path as a whole; repeat for more.", show_default=False),
    ] = None,
    groups: Annotated[bool, typer.Option("--groups", help="Every block and stage as a whole too.")] = False,
    images: Annotated[int | None, typer.Option(min=1, help="Validation images.", show_default="all")] = None,
    table: Annotated[
        Path | None, typer.Option("--table", exists=True, dir_okay=False, help="Measured milliseconds of each layer.")
    ] = None,
    cost: Cost = "ops",
    out: Annotated[
        Path | None, typer.Option("--out", help="The JSON file.", show_default="sensitivity_AROUND.json in the run")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw gains over depth (.png, .svg, .pdf).", show_default=False)
    ] = None,
    form: Annotated[Literal["table", "markdown", "json"], typer.Option("--format", help="How to print it.")] = "table",
    settings: Set = None,
    as_json: AsJson = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure what each layer, block and stage gains in float or with more bits. A killed analysis goes on.

    Trains nothing. The JSON file is what allocate takes.
    """
    from bidensify.train import recipe_sensitivity

    recipe, student, weights = _student(source, teacher, settings or [], trust)
    full = None
    if weights is not None or around == "teacher":
        from bidensify.train import build_teacher

        full = build_teacher(recipe, weights)
    if student is None:
        from bidensify.train import build_student

        student = build_student(recipe, full, config=recipe.config())
    target = out or (
        source / f"sensitivity_{around}.json" if source.is_dir() else Path(f"{source.stem}_sensitivity.json")
    )
    train, val = recipe.build_datasets()
    found = recipe_sensitivity(
        recipe,
        student,
        full,
        train,
        val,
        images=images,
        around=around,
        trained=source.is_dir(),
        precisions=precision,
        groups=None if groups else group or [],
        milliseconds=table,
        cache=target,
    )
    if plot is not None:
        found.plot(plot)
    if as_json or form == "json":
        print(found.model_dump_json(indent=1))
        return
    shown = [False, True] if found.groups else [False]
    if form == "markdown":
        print("\n".join(found.to_markdown(cost, groups=each) for each in shown))
        return
    screen = console()
    for each in shown:
        screen.print(found.table(cost, groups=each))
    screen.print(f"{target}: {found.seconds:.0f} s", soft_wrap=True)
    if around == "teacher":
        screen.print(f"Next: {shell('bidensify', 'allocate', target)} --ops 0.2 --out config.json", soft_wrap=True)


def _student(
    source: Path, teacher: Path | None, settings: list[str], trust: bool
) -> tuple[Recipe, nn.Module | None, Path | str | None]:
    """(recipe, student of a finished run, the teacher's weights where they are known)."""
    from bidensify.recipe import load_recipe
    from bidensify.train.rundir.folder import RunFolder

    if not source.is_dir():
        return load_recipe(source, settings), None, teacher
    from bidensify.cli.sources import load_source

    loaded = load_source(source, None, settings, trust)
    return loaded.need_recipe(), loaded.model, teacher or RunFolder(source).teacher_weights()
