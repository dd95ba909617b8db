"""``pack``, ``export`` and ``runtime``: from a trained student to a small file, and what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bidensify._util.terminal import console
from bidensify.cli import arguments
from bidensify.cli.command import command
from bidensify.cli.options import Debug, Input, RecipeFile, SourceFolder, Trust
from bidensify.cli.sources import load_source
from bidensify.errors import ConfigError


@command(
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
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Freeze a trained student to packed bits and save it: one bit per binary weight.

    The folder also says which task, input size, mean, std and classes the network is for, so that evaluate, predict, bench
    and export take it as it is.
    """
    import torch

    import bidensify
    from bidensify.deploy.format import TENSORS
    from bidensify.recipe.portable import portable

    arguments.refuse_existing(out)
    loaded = load_source(source, recipe, trust=trust)
    latent = sum(4 * parameter.numel() for parameter in loaded.model.parameters())
    packed = bidensify.pack(loaded.model, float_dtype=None if float_dtype == "float32" else getattr(torch, float_dtype))
    extra = {} if loaded.recipe is None else {"recipe": portable(loaded.recipe)}
    bidensify.save_pretrained(packed, out, extra=extra)
    size = (out / TENSORS).stat().st_size
    console().print(
        f"{out / TENSORS}: {size:,} bytes, 1/{latent / size:.1f} of the latent weights' {latent:,}", soft_wrap=True
    )


@command(
    "bidensify export runs/scenes scenes.pte",
    "bidensify export runs/scenes scenes.pte --sizes 128:512:32 --int8-rest",
    "bidensify export runs/scenes scenes.xml --int8-rest",
    "bidensify export runs/scenes scenes.onnx",
    "bidensify export out/packed network.pt2 --input 2x3x256x256",
)
def export(
    source: SourceFolder,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file: *.pte, *.xml, *.onnx or *.pt2.", show_default=False)
    ],
    recipe: RecipeFile = None,
    input_shape: Input = None,
    latent: Annotated[
        bool, typer.Option(help="Export latent float weights; by default they are packed first.")
    ] = False,
    static: Annotated[
        bool | None,
        typer.Option(
            "--static/--dynamic",
            help="Fix batch and image size to those of the example input; a .pte's are unless --sizes.",
            show_default="--static for *.xml, --dynamic for *.onnx and *.pt2",
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="LEAST:MOST:STEP", help="Heights and widths that a .pte takes; its memory follows the largest."
        ),
    ] = None,
    int8_rest: Annotated[
        bool,
        typer.Option(
            "--int8-rest", help="In a .pte or .xml, what is not binary runs in int8, calibrated on training images."
        ),
    ] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Write a network for other runtimes; the file is run once and compared.

    *.pte runs from bits under ExecuTorch and *.xml under OpenVINO, without torch (see `bidensify runtime`). *.onnx is for
    compatibility: bits in the file, float arithmetic in the runtime, so that it gains neither speed nor memory. *.pt2 is a
    torch.export program, which calls bidensify's operators: `import bidensify.deploy` before torch.export.load.
    """
    import bidensify
    from bidensify.deploy.export import export as write
    from bidensify.deploy.layers import packed_layers

    for file in (out, out.with_suffix(".bin")) if out.suffix == ".xml" else (out,):
        if file.exists():
            raise ConfigError(f"{str(file)!r} exists; give another name, or remove it first")
    pte, bits = out.suffix == ".pte", out.suffix in (".pte", ".xml")
    if sizes and not pte:
        raise ConfigError(f"--sizes is for *.pte, not {out.name!r}; other files take any size with --dynamic")
    if int8_rest and not bits:
        raise ConfigError(f"--int8-rest is for *.pte and *.xml, not {out.name!r}")
    if pte and static is False:
        raise ConfigError(
            "a .pte's memory is planned for the largest image: give --sizes LEAST:MOST:STEP, not --dynamic"
        )
    dynamic = not (bits if static is None else static)
    loaded = load_source(source, recipe, trust=trust)
    model = loaded.model
    if not latent and not packed_layers(model) and hasattr(model, "bidensify_plan"):
        model = bidensify.pack(model)
    example = loaded.example(2 if dynamic else 1) if input_shape is None else arguments.example_of(input_shape)
    bounds = arguments.sizes_of(sizes) if sizes else False
    calibration = None
    if int8_rest:
        size = loaded.need_recipe().image_size if example is None else (example.shape[-2], example.shape[-1])
        calibration = loaded.need_recipe().calibration_images(size)
    done = write(
        model,
        out,
        example_inputs=example,
        dynamic=bounds if pte else dynamic,
        int8_rest=calibration,
        constants=loaded.normalisation() if bits else None,
    )
    compared = (
        f"not run again: {done.reason}"
        if done.difference is None
        else f"run again by {done.runtime}: mean difference {done.difference:.1e} of the outputs' mean size"
    )
    if done.largest is not None:
        compared += f" in the median of some inputs, {done.largest:.1e} at most"
    console().print(f"{done.path}: {done.bytes:,} bytes, {compared}", soft_wrap=True)
    if done.note:
        console().print(done.note, soft_wrap=True)


@command(
    "bidensify runtime build --out runtime",
    "bidensify runtime build --runtime openvino --out runtime",
    "bidensify runtime build --out arm --cmake -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake --cmake -DCMAKE_PREFIX_PATH=executorch-arm",
)
def runtime(
    action: Annotated[
        Literal["build", "sources"], typer.Argument(help="build: compile it. sources: print where its C++ lies.")
    ],
    runtime: Annotated[
        Literal["executorch", "openvino"], typer.Option(help="For *.pte, or the extension for *.xml.")
    ] = "executorch",
    out: Annotated[
        Path | None, typer.Option(help="The folder to build into.", show_default="a cache that export uses")
    ] = None,
    cmake: Annotated[
        list[str] | None, typer.Option(metavar="ARGUMENT", help="An argument for cmake; repeat for more.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Build the C++ runtime of exported networks against the ExecuTorch or OpenVINO that is installed.

    Beside ExecuTorch's comes bidensify_program.py, which runs a .pte from Python with NumPy alone; OpenVINO's is loaded with
    core.add_extension.
    """
    from bidensify.deploy.runtimes.build import RUNTIMES

    wanted = RUNTIMES[runtime]
    if action == "sources":
        print(wanted.sources)
        return
    library = wanted.find() if out is None and not cmake else wanted.build(out or Path("runtime"), tuple(cmake or ()))
    console().print(f"{library}: {library.stat().st_size:,} bytes", soft_wrap=True)
