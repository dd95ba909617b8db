"""``plan``, ``summary`` and ``convert``: what a rewrite would do to a model, what a model costs, and doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bidensify._util.terminal import console
from bidensify.cli import arguments
from bidensify.cli.command import command
from bidensify.cli.options import ActBits, AsJson, Config, Debug, Input, Keep, Method, Options, Spec, Trust, Weights


@command(
    "bidensify plan demo:unet",
    "bidensify plan smp:Unet/resnet34 -o encoder_weights=null --keep 'decoder.*' --json",
)
def plan(
    model: Spec,
    option: Options = None,
    method: Method = None,
    keep: Keep = None,
    act_bits: ActBits = None,
    config: Config = None,
    input_shape: Input = None,
    times: Annotated[
        bool, typer.Option("--times", help="Milliseconds saved by each layer, of bench --layers on this machine.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what would happen to every layer of a model, and why. Nothing is changed or written."""
    import bidensify

    network = arguments.make_model(model, option or [], None)
    settings = arguments.make_config(config, method, keep or [], act_bits)
    result = bidensify.plan(network, settings, example_inputs=arguments.example_of(input_shape))
    if as_json:
        print(arguments.to_json(result.to_dict()))
    else:
        from bidensify.rewrite.plan.times import read_times

        console().print(result.table(read_times() if times else None))


@command(
    "bidensify summary smp:Unet/resnet34 --input 3x512x512",
    "bidensify summary smp:Unet/resnet34 --method bidense --input 3x512x512 --format markdown",
    "bidensify summary runs/scenes/packed --json",
)
def summary(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A network by name, a run folder, or what pack or convert wrote.", show_default=False
        ),
    ],
    option: Options = None,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help="Count the network as this method rewrites it.", show_default=False),
    ] = None,
    keep: Keep = None,
    act_bits: ActBits = None,
    config: Config = None,
    input_shape: Input = None,
    form: Annotated[Literal["table", "markdown", "json"], typer.Option("--format", help="How to print it.")] = "table",
    as_json: AsJson = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Count parameters, bytes, multiply-accumulates and operations of every layer, and what the file will weigh."""
    import bidensify
    from bidensify.cli.sources import load_source
    from bidensify.errors import ConfigError
    from bidensify.rewrite.record.channels import image_channels

    shape = None if input_shape is None else arguments.parse_shape(input_shape)[1:]
    rewritten = bool(method or config or keep or act_bits)
    if Path(model).is_dir():
        if option or rewritten:
            raise ConfigError(
                f"{model!r} is trained already: it takes no --option, --method, --keep, --act-bits or --config"
            )
        source = load_source(Path(model), trust=trust)
        network = source.model
        if shape is None and source.recipe is not None and source.recipe.data.size is not None:
            shape = (image_channels(network), *source.recipe.image_size)
    else:
        network = arguments.make_model(model, option or [], None)
        if rewritten:
            settings = arguments.make_config(config, method, keep or [], act_bits)
            network = bidensify.bidensify(
                network, settings, example_inputs=arguments.example_of(input_shape), inplace=True
            )
    result = bidensify.summary(network, shape or (image_channels(network), 256, 256))
    if as_json or form == "json":
        print(arguments.to_json(result.to_dict()))
    elif form == "markdown":
        print(result.to_markdown())
    else:
        console().print(result.table())


@command(
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
    act_bits: ActBits = None,
    config: Config = None,
    weights: Weights = None,
    input_shape: Input = None,
    debug: Debug = False,
) -> None:
    """Rewrite a model and save it with its latent weights and plan. Distil it with finetune before packing."""
    import bidensify
    from bidensify.rewrite import Plan

    arguments.refuse_existing(out)
    settings = arguments.make_config(config, method, keep or [], act_bits)
    network = arguments.make_model(model, option or [], weights)
    student = bidensify.bidensify(network, settings, example_inputs=arguments.example_of(input_shape), inplace=True)
    bidensify.save_pretrained(student, out)
    done = student.bidensify_plan
    assert isinstance(done, Plan)
    console().print(
        f"{out}: {len(done.binary)} of {len(done.layers)} layers binarized ({settings.method}), latent weights saved",
        soft_wrap=True,
    )
