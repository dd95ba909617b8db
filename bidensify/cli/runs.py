"""``finetune``, ``evaluate`` and ``predict``: training a student and using it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bidensify.cli import arguments, sources
from bidensify.cli.app import AsJson, Debug, command, output
from bidensify.errors import ConfigError

if TYPE_CHECKING:
    from bidensify.recipe import Recipe
    from bidensify.train import RunResult

Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="PATH=VALUE", help="Change a value of the recipe; repeat for more."),
]
SourceFolder = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        exists=True,
        file_okay=False,
        help="A run folder, or a directory written by pack or convert.",
        show_default=False,
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe", "-r", exists=True, dir_okay=False, help="The recipe; needed where SOURCE is no run folder."
    ),
]


@command(
    "finetune",
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
        output().print("Stopped. The same command with --resume goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    # Under a launcher every process comes here; one of them speaks.
    if os.environ.get("RANK", "0") == "0":
        show_metrics(f"{run_dir}, epoch {result.best_epoch}", result.metrics)
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
            output().print(f"No teacher's weights given: the recipe's teacher comes first, in {weights}")
        run_recipe(loaded, weights, role="teacher", resume=weights.exists(), quiet=quiet)
    return run_recipe(loaded, run_dir, role=role, teacher_weights=weights, resume=resume, quiet=quiet)


def tell_next(result: RunResult, role: str) -> None:
    """Prints the command that usually follows."""
    folder = result.run_dir
    after = f"bidensify pack {folder} {folder}/packed" if role == "student" else f"bidensify finetune ... -t {folder}"
    output().print(f"Next: [cyan]{after}[/cyan]", highlight=False)


def show_metrics(title: str, metrics: dict[str, float]) -> None:
    """Prints metrics as a table, the classes' own after the others."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in sorted(metrics, key=lambda name: "/" in name):
        table.add_row(name, f"{metrics[name]:.4f}")
    output().print(table)


@command(
    "evaluate",
    "bidensify evaluate runs/scenes",
    "bidensify evaluate runs/scenes/packed --recipe recipes/scenes_segmentation.yaml --json",
)
def evaluate(
    source: SourceFolder,
    recipe: RecipeFile = None,
    settings: Set = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a student, a teacher or a packed model on its recipe's validation data."""
    from bidensify.train import evaluate as measure

    place = arguments.parse_device(device)
    loaded = sources.load_source(source, recipe, settings or [])
    chosen = sources.need_recipe(loaded, source)
    val = chosen.build_datasets()[1]
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


@command(
    "predict",
    "bidensify predict runs/scenes photo.jpg --out predictions",
    "bidensify predict runs/scenes/packed *.png --recipe recipes/scenes_segmentation.yaml --out predictions --blend 0.5",
)
def predict(
    source: SourceFolder,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", exists=True, dir_okay=False, help="Image files.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the predictions.", show_default=False)],
    recipe: RecipeFile = None,
    settings: Set = None,
    blend: Annotated[float, typer.Option(min=0, max=1, help="Share of the image in the picture.")] = 0.0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
    debug: Debug = False,
) -> None:
    """Run a model on image files. Writes NAME.png (a picture) and NAME.labels.png or NAME.depth.png (the values).

    Labels are 8-bit class indices; depths are 16-bit millimetres.
    """
    from bidensify.data import ImageReader
    from bidensify.tasks import predict_image

    place = arguments.parse_device(device)
    loaded = sources.load_source(source, recipe, settings or [])
    chosen = sources.need_recipe(loaded, source)
    val = chosen.build_datasets()[1]
    info, transforms = val.info, val.transforms
    assert transforms is not None
    task: Any = chosen.build_task(info)
    names = [path.stem for path in images]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"several images are called {', '.join(twice)}; their predictions would overwrite each other")
    given = {path.resolve() for path in images}
    lost = [name for name in names if (out / f"{name}.png").resolve() in given]
    if lost:
        raise ConfigError(f"{out / lost[0]!s}.png is an image that was given; write to another folder with --out")
    model = loaded.model.to(place)
    for path in images:
        image = ImageReader(info.channels, info.image_max).tensor(path)
        values = predict_image(model, task, image, transforms)
        write_prediction(out, path.stem, values, task.picture(image, values, **({"blend": blend} if blend else {})))
    output().print(f"{len(images)} prediction{'s' * (len(images) != 1)} in {out}")


def write_prediction(out: Path, name: str, values: Any, picture: Any) -> None:
    """Writes the picture, and the values (H, W) as 8-bit labels (int64) or 16-bit millimetres (float, metres)."""
    import numpy as np
    from PIL import Image

    from bidensify._util.files import atomic_write
    from bidensify.compare.images import png

    array = values.numpy()
    if values.is_floating_point():
        kind, array = "depth", np.clip(np.rint(array * 1000), 0, 65535).astype(np.uint16)
    else:
        kind, array = "labels", array.astype(np.uint8 if array.max(initial=0) < 256 else np.uint16)
    with atomic_write(out / f"{name}.png") as temporary:
        temporary.write_bytes(png(picture))
    with atomic_write(out / f"{name}.{kind}.png") as temporary:
        Image.fromarray(array).save(temporary, format="PNG")
