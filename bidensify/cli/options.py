"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Spec = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="What to build: smp:Unet/resnet34, timm:resnet50, torchvision:fcn_resnet50, demo:unet or "
        "package.module:factory.",
        show_default=False,
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="An argument of the model's builder; repeat for more."),
]
Method = Annotated[str | None, typer.Option("--method", "-m", help="The binarization method.", show_default="bidense")]
ActBits = Annotated[
    int | None, typer.Option("--act-bits", min=1, max=2, help="Bits of an activation: 1 or 2.", show_default="1")
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="GLOB", help="Keep the layers that match in full precision; repeat for more."),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", exists=True, dir_okay=False, help="A BidensifyConfig as YAML or JSON."),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights", "-w", exists=True, dir_okay=False, help="Full-precision weights: .safetensors, .pth, .ckpt."
    ),
]
Input = Annotated[
    str | None,
    typer.Option("--input", metavar="CxHxW", help="Input shape, e.g. 3x128x160.", show_default="auto"),
]
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
        "--recipe", "-r", exists=True, dir_okay=False, help="The recipe; needed where SOURCE does not hold one."
    ),
]
Window = Annotated[
    tuple[int, int] | None,
    typer.Option(
        min=1, help="Height and width of a window that slides over the image.", show_default="the recipe's, or none"
    ),
]
Stride = Annotated[tuple[int, int] | None, typer.Option(min=1, help="Of the window.", show_default="two thirds of it")]
Flip = Annotated[
    bool, typer.Option("--flip", help="Look at the mirror image too, and take the mean.", show_default=False)
]
Scales = Annotated[
    list[float] | None,
    typer.Option(
        "--scale", help="Look at the image at this size, 1 being its own; repeat for more.", show_default=False
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="The folder is yours: run the code that its recipe names (imports, a network of your own)."
    ),
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")]


def view_settings(
    window: tuple[int, int] | None, stride: tuple[int, int] | None, flip: bool, scales: list[float] | None
) -> list[str]:
    """Returns the options of how an image is looked at as changes to a recipe's section ``evaluate``."""
    found = [f"evaluate.{key}={list(value)}" for key, value in (("window", window), ("stride", stride)) if value]
    return found + ["evaluate.flip=true"] * flip + ([f"evaluate.scales={scales}"] if scales else [])
