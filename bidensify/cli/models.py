"""``plan`` and ``convert``: what a rewrite would do to a model, and doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bidensify.cli import arguments
from bidensify.cli.app import AsJson, Debug, command, output

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
    typer.Option(
        "--input", metavar="CxHxW", help="Input shape for the recording, e.g. 3x128x160.", show_default="auto"
    ),
]


@command(
    "plan",
    "bidensify plan demo:unet",
    "bidensify plan smp:Unet/resnet34 -o encoder_weights=null --keep 'decoder.*' --json",
)
def plan(
    model: Spec,
    option: Options = None,
    method: Method = None,
    keep: Keep = None,
    config: Config = None,
    input_shape: Input = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what would happen to every layer of a model, and why. Nothing is changed or written."""
    import torch

    import bidensify

    settings = arguments.make_config(config, method, keep or [])
    network = arguments.make_model(model, option or [], None)
    example = None if input_shape is None else torch.zeros(arguments.parse_shape(input_shape))
    result = bidensify.plan(network, settings, example_inputs=example)
    if as_json:
        print(arguments.to_json(result.to_dict()))
    else:
        output().print(result.table())


@command(
    "convert",
    "bidensify convert demo:unet out/latent",
    "bidensify convert smp:Unet/resnet34 out/latent -o classes=11 --weights teacher/model.safetensors --method bnn",
)
def convert(
    model: Spec,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder for the converted model; must not exist yet.", show_default=False),
    ],
    option: Options = None,
    method: Method = None,
    keep: Keep = None,
    config: Config = None,
    weights: Weights = None,
    input_shape: Input = None,
    debug: Debug = False,
) -> None:
    """Rewrite a model and save it with its latent weights and plan. Distil it with finetune before packing."""
    import torch

    import bidensify

    arguments.refuse_existing(out)
    settings = arguments.make_config(config, method, keep or [])
    network = arguments.make_model(model, option or [], weights)
    example = None if input_shape is None else torch.zeros(arguments.parse_shape(input_shape))
    student = bidensify.bidensify(network, settings, example_inputs=example, inplace=True)
    bidensify.save_pretrained(student, out)
    layers = student.bidensify_plan.layers  # type: ignore[union-attr]
    binary = sum(layer.action != "keep" for layer in layers)  # type: ignore[union-attr]
    output().print(f"{out}: {binary} of {len(layers)} layers binarized ({settings.method}), latent weights saved")  # type: ignore[arg-type]
