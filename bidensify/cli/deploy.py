"""``pack``: from a trained student to a small file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bidensify.cli import arguments, sources
from bidensify.cli.app import Debug, command, output
from bidensify.cli.runs import RecipeFile, SourceFolder


@command(
    "pack",
    "bidensify pack runs/scenes runs/scenes/packed",
    "bidensify pack out/latent out/packed --float-dtype float16",
)
def pack(
    source: SourceFolder,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the packed model; must not exist yet.", show_default=False)
    ],
    recipe: RecipeFile = None,
    float_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Type of everything that is not binary."),
    ] = "float32",
    debug: Debug = False,
) -> None:
    """Freeze a trained student to packed bits and save it: one bit per binary weight."""
    import torch

    import bidensify
    from bidensify.runtime.format import TENSORS

    arguments.refuse_existing(out)
    loaded = sources.load_source(source, recipe)
    latent = sum(4 * parameter.numel() for parameter in loaded.model.parameters())
    packed = bidensify.pack(loaded.model, float_dtype=None if float_dtype == "float32" else getattr(torch, float_dtype))
    bidensify.save_pretrained(packed, out)
    size = (out / TENSORS).stat().st_size
    output().print(
        f"{out / TENSORS}: {size:,} bytes, 1/{latent / size:.1f} of the latent weights' {latent:,}", highlight=False
    )
