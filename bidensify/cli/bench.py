"""``bench``: float and packed, side by side on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bidensify._util.terminal import console
from bidensify.cli import arguments
from bidensify.cli.command import command
from bidensify.cli.options import AsJson, Debug, Options, Trust
from bidensify.cli.sources import float_network, load_source
from bidensify.errors import ConfigError


@command(
    "bidensify bench",
    "bidensify bench smp:Unet/resnet34 --size 512 512 --threads 1 --threads 2",
    "bidensify bench runs/scenes/packed --profile",
    "bidensify bench smp:FPN/resnet50 --layers",
    "bidensify bench smp:UPerNet/tu-convnext_tiny --int8 --memory --out bench.json",
)
def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A network by name, a run folder, or what pack or convert wrote; without it, single layers.",
            show_default=False,
        ),
    ] = None,
    option: Options = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Height and width of the network's input.", show_default="that of the run, or 512 512"),
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Number of threads; repeat for more.")] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Packed kernel: portable, avx2, avx512, neon; repeat for more.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time per case and number of threads.")] = 2.0,
    compiled: Annotated[bool, typer.Option("--compiled", help="torch.compile of the float side too.")] = False,
    latent: Annotated[bool, typer.Option("--latent", help="The latent network too.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="OpenVINO and ONNX Runtime int8, where installed.")] = False,
    int8_folder: Annotated[
        Path | None,
        typer.Option("--int8-folder", help="Keep the int8 networks here for the next run.", show_default=False),
    ] = None,
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="The packed side with its float part in bfloat16 too.")
    ] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory of each variant (networks).")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where the time goes, by kind of layer (networks).")
    ] = False,
    act_bits: Annotated[
        list[int] | None,
        typer.Option(
            "--act-bits", min=1, max=2, help="Bits of an activation; layers: repeat for both.", show_default="1"
        ),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Each layer of a network by itself; kept as this machine's table for plans."),
    ] = False,
    idle: Annotated[
        bool, typer.Option("--idle", help="Count only rounds in which other programs left the machine alone.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write JSON here.", show_default=False)] = None,
    as_json: AsJson = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Time float against packed in interleaved runs: single layers, or a whole network."""
    import torch

    from bidensify._util.files import atomic_write
    from bidensify._util.seeding import seeded
    from bidensify.bench.result import render
    from bidensify.bench.run import run_bench
    from bidensify.config import BidensifyConfig
    from bidensify.rewrite.api import bidensify
    from bidensify.rewrite.record.channels import image_channels

    options = arguments.parse_assignments(option or [], "--option")
    spec, network, student = model, None, None
    if model is not None and Path(model).is_dir():
        if options or act_bits:
            raise ConfigError(f"{model!r} is trained already: it takes no --option and no --act-bits")
        source = load_source(Path(model), trust=trust)
        with seeded(0):
            network, student = float_network(source, trust), source.model
        made_of: Any = student.bidensify_source
        spec, options = made_of["spec"], dict(made_of["options"])
        if size is None and source.recipe is not None and source.recipe.data.size is not None:
            size = source.recipe.image_size
    elif model is not None:
        # Weights that are drawn are the same every time: what ``--int8-folder`` keeps is of this network then.
        with seeded(0):
            network = arguments.make_model(model, option or [], None).eval()
    size = size or (512, 512)
    if min(size) < 1:
        raise ConfigError(f"--size {size[0]} {size[1]}: height and width are at least 1")
    if network is not None:
        shape = (1, image_channels(network), *size)
        try:
            with torch.inference_mode():
                network(torch.zeros(shape))
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"{model!r} does not run on an image {'×'.join(map(str, shape))}, which is what bench gives it "
                f"({str(error).splitlines()[0][:200]}); give another --size"
            ) from error
    if layers:
        if network is None:
            raise ConfigError("--layers times the layers of a network: name one")
        config = BidensifyConfig(act_bits=act_bits[0] if act_bits else 1)
        student = bidensify(network, config).eval() if student is None else student
        _layers(network, student, size, threads or [1], int8, out, as_json)
        return
    result = run_bench(
        network,
        student=student,
        name=model or "layers",
        spec=spec,
        options=options,
        size=size,
        threads=threads or [1],
        kernels=kernel,
        seconds=seconds,
        compiled=compiled,
        latent=latent,
        int8=int8,
        int8_folder=int8_folder,
        bfloat16=bfloat16,
        memory=memory,
        profile=profile,
        idle=idle,
        act_bits=act_bits or [1],
    )
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text(arguments.to_json(result), encoding="utf-8")
    if as_json:
        print(arguments.to_json(result))
    else:
        console().print(render(result))


def _layers(
    network: Any, student: Any, size: tuple[int, int], threads: list[int], int8: bool, out: Path | None, as_json: bool
) -> None:
    """``bench --layers``."""
    import torch

    from bidensify._util.files import atomic_write
    from bidensify.bench.layers import layer_times, times_table
    from bidensify.deploy import pack, packed_layers
    from bidensify.rewrite.plan.times import write_times
    from bidensify.rewrite.record.channels import image_channels

    packed = student if packed_layers(student) else pack(student)
    x = torch.randn(1, image_channels(network), *size).contiguous(memory_format=torch.channels_last)
    floats = network.eval().to(memory_format=torch.channels_last)
    rows = layer_times(floats, packed, student.bidensify_plan, x, threads=threads, int8=int8)
    data = arguments.to_json([{"layer": layer.path, "shape": layer.shape, **vars(times)} for layer, times in rows])
    kept = write_times([times for _, times in rows])
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text(data, encoding="utf-8")
    if as_json:
        print(data)
    else:
        console().print(times_table(rows))
        console().print(f"Kept for plans: {kept}", highlight=False)
