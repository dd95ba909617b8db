"""``pack`` and ``export``: from a trained student to a small file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bidensify.cli import arguments, sources
from bidensify.cli.app import Debug, command, output
from bidensify.cli.models import Input
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
    from bidensify.deploy.format import TENSORS

    arguments.refuse_existing(out)
    loaded = sources.load_source(source, recipe)
    latent = sum(4 * parameter.numel() for parameter in loaded.model.parameters())
    packed = bidensify.pack(loaded.model, float_dtype=None if float_dtype == "float32" else getattr(torch, float_dtype))
    bidensify.save_pretrained(packed, out)
    size = (out / TENSORS).stat().st_size
    output().print(
        f"{out / TENSORS}: {size:,} bytes, 1/{latent / size:.1f} of the latent weights' {latent:,}", highlight=False
    )


@command(
    "export",
    "bidensify export runs/scenes scenes.onnx",
    "bidensify export out/packed network.pt2 --input 2x3x256x256",
)
def export(
    source: SourceFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file: *.onnx or *.pt2.", show_default=False)],
    recipe: RecipeFile = None,
    input_shape: Input = None,
    latent: Annotated[
        bool, typer.Option(help="Export latent float weights; by default they are packed first.")
    ] = False,
    static: Annotated[bool, typer.Option(help="Fix batch and image size to those of the example input.")] = False,
    debug: Debug = False,
) -> None:
    """Write a network for other runtimes: ONNX, or a torch.export program. The file is run once and compared."""
    import torch

    import bidensify
    from bidensify.deploy.export import export as write
    from bidensify.deploy.layers import packed_layers
    from bidensify.errors import ConfigError

    if out.exists():
        raise ConfigError(f"{str(out)!r} exists; give another name, or remove it first")
    loaded = sources.load_source(source, recipe)
    model = loaded.model
    if not latent and not packed_layers(model) and hasattr(model, "bidensify_plan"):
        model = bidensify.pack(model)
    example = None if input_shape is None else torch.randn(arguments.parse_shape(input_shape))
    if example is None and loaded.recipe is not None:
        example = torch.randn(2, 3, *loaded.recipe.image_size)
    done = write(model, out, example_inputs=example, dynamic=not static)
    compared = (
        "not run again: onnxruntime is not installed"
        if done.difference is None
        else f"run again by {done.runtime}: mean difference {done.difference:.1e} of the outputs' mean size"
    )
    output().print(f"{done.path}: {done.bytes:,} bytes, {compared}", highlight=False)
