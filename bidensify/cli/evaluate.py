"""``evaluate``: the metrics of a network on its recipe's validation data, its cost, and its predictions as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bidensify._util.terminal import console
from bidensify.cli import arguments
from bidensify.cli.command import command
from bidensify.cli.options import (
    AsJson,
    Debug,
    Device,
    Flip,
    RecipeFile,
    Scales,
    Set,
    SourceFolder,
    Stride,
    Trust,
    Window,
    view_settings,
)  # fmt: skip
from bidensify.cli.predict import write_picture, write_values
from bidensify.cli.runs import show_metrics
from bidensify.cli.sources import load_source

if TYPE_CHECKING:
    from torch import Tensor

    from bidensify.data import DenseDataset


@command(
    "bidensify evaluate runs/scenes",
    "bidensify evaluate runs/scenes/packed --json",
    "bidensify evaluate runs/scenes --window 96 128 --flip --scale 1 --scale 1.25",
    "bidensify evaluate runs/scenes --save predictions",
)
def evaluate(
    source: SourceFolder,
    recipe: RecipeFile = None,
    settings: Set = None,
    window: Window = None,
    stride: Stride = None,
    flip: Flip = False,
    scale: Scales = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save", file_okay=False, help="Write each prediction here, as predict does.", show_default=False
        ),
    ] = None,
    device: Device = "cpu",
    trust: Trust = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a student, a teacher or a packed model on its recipe's validation data.

    Prints the task's metrics, and a row with the columns of papers: parameters (binary ones / 32), operations of one image of
    data.size, and accuracy.
    """
    from bidensify.costs.summary import summary
    from bidensify.rewrite.record.channels import image_channels
    from bidensify.tasks import paper_columns
    from bidensify.train import evaluate as measure

    place = arguments.parse_device(device)
    changes = [*view_settings(window, stride, flip, scale), *(settings or [])]
    loaded = load_source(source, recipe, changes, trust)
    chosen = loaded.need_recipe()
    if save is not None:
        arguments.refuse_existing(save)
    val = chosen.build_dataset("val")
    task = chosen.build_task(val.info)
    model = loaded.model
    cost = summary(model, (image_channels(model), *chosen.image_size))
    metrics = measure(
        model.to(place),
        task,
        val if save is None else Numbered(val),  # type: ignore[arg-type]
        batch_size=chosen.data.eval_batch_size or chosen.data.batch_size,
        workers=chosen.data.workers,
        device=place,
        precision=chosen.precision,
        channels_last=chosen.channels_last,
        views=chosen.views(),
        on_output=None if save is None else Saver(val, task, save),
    )
    columns = paper_columns(metrics, params=cost.total("params"), ops=cost.total("ops"))
    if as_json:
        print(arguments.to_json({**metrics, "columns": columns}))
        return
    split = chosen.data.val
    show_metrics(f"{source} on {split.name}/{split.split}" if split is not None else str(source), metrics)
    show_columns(columns)
    if save is not None:
        console().print(f"{len(val)} predictions in {save}", soft_wrap=True)


def show_columns(columns: dict[str, float]) -> None:
    """Prints a row as papers have it."""
    from rich.table import Table

    table = Table(*columns)
    table.add_row(*(f"{value:,}" for value in columns.values()))
    console().print(table)


class Numbered:
    """A data set whose samples know their number."""

    def __init__(self, dataset: DenseDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        import torch

        return {**self.dataset[index], "number": torch.tensor(index)}


class Saver:
    """Writes the predictions of each batch at the size of the sample's own image."""

    def __init__(self, dataset: DenseDataset, task: Any, folder: Path) -> None:
        self.dataset, self.task, self.folder = dataset, task, folder

    def __call__(self, output: Any, batch: dict[str, Tensor]) -> None:
        """Takes a model's output for a batch of a :class:`Numbered` data set."""
        from bidensify.tasks import predict_restored

        raw = self.task.logits(output)
        for position, number in enumerate(batch["number"].tolist()):
            image = self.dataset.load(number)["image"]
            size = (int(image.shape[-2]), int(image.shape[-1]))
            extent = batch["extent"][position] if "extent" in batch else None
            values = predict_restored(self.task, raw[position : position + 1], extent, size)[0].cpu()
            name = self.dataset.name_of(number)
            write_values(self.folder, name, values, self.task)
            write_picture(self.folder, name, self.task.picture(image, values))
