"""``predict``: a model on image files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bidensify._util.terminal import console
from bidensify.cli import arguments
from bidensify.cli.command import command
from bidensify.cli.options import (
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
from bidensify.cli.sources import load_source
from bidensify.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

_ENDINGS = (".png", ".values.npy", ".labels.png", ".depth.png", ".depth.tiff")
# Steps per metre of a depth's 16-bit PNG, the finest that reaches far enough: NYUv2's and KITTI's.
_STEPS = (1000, 256)


@command(
    "bidensify predict runs/scenes photo.jpg --out predictions",
    "bidensify predict runs/scenes/packed photos --out predictions --skip-bad",
    "bidensify predict runs/scenes/packed *.png --out predictions --blend 0.5",
    "bidensify predict runs/scenes photos --out predictions --window 96 128 --flip",
)
def predict(
    source: SourceFolder,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", exists=True, help="Image files, or folders of them.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", file_okay=False, help="Folder for the predictions.", show_default=False)
    ],
    recipe: RecipeFile = None,
    settings: Set = None,
    window: Window = None,
    stride: Stride = None,
    flip: Flip = False,
    scale: Scales = None,
    blend: Annotated[float, typer.Option(min=0, max=1, help="Share of the image in the picture.")] = 0.0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on after an image that cannot be read; their names come at the end.")
    ] = False,
    device: Device = "cpu",
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Run a model on image files. Writes NAME.png (a picture) and the values beside it, at the image's own size.

    The image is brought to the network as evaluate.resize of the recipe says, and the prediction back.

    Labels go to NAME.labels.png: class indices, in 16 bits where there are more than 256 classes. Depths go to
    NAME.depth.png (16 bits): in millimetres, or, where the task's depths go beyond 65 m, in 1/256 m as KITTI's (its text
    "depth_scale" says metres per step); beyond 255 m to NAME.depth.tiff, in metres (float32). What has several values a
    pixel (labels that do not exclude one another, flow, restored images) goes to NAME.values.npy.
    """
    from bidensify.tasks import predict_image

    place = arguments.parse_device(device)
    named = named_images(images)
    refuse_overwriting(named, out)
    changes = [*view_settings(window, stride, flip, scale), *(settings or [])]
    loaded = load_source(source, recipe, changes, trust)
    chosen = loaded.need_recipe()
    task: Any = chosen.build_task()
    reader, transforms = chosen.image_input()
    model, views = loaded.model.to(place), chosen.views()
    views.check(task)
    skipped: list[Path] = []
    for name, path in named.items():
        try:
            image = reader.tensor(path)
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{error}. Or leave such files out with --skip-bad") from error
            skipped.append(path)
            continue
        values = predict_image(model, task, image, transforms, views)
        write_values(out, name, values, task)
        write_picture(out, name, task.picture(image, values, **({"blend": blend} if blend else {})))
    done = len(named) - len(skipped)
    screen = console()
    screen.print(f"{done} prediction{'s' * (done != 1)} in {out}", soft_wrap=True)
    if skipped:
        listed = ", ".join(map(str, skipped[:10])) + (", ..." if len(skipped) > 10 else "")
        screen.print(f"{len(skipped)} of {len(named)} images skipped, they cannot be read: {listed}", soft_wrap=True)


def named_images(given: list[Path]) -> dict[str, Path]:
    """Returns the images by the names that their predictions get: the stem, in a folder with its sub-folders before it.

    Raises:
        ConfigError: two images would have one name.
    """
    from bidensify.data.files import find_images

    named: dict[str, Path] = {}
    for path in given:
        for name, file in (find_images(path) if path.is_dir() else {path.stem: path}).items():
            if name in named:
                raise ConfigError(
                    f"{str(named[name])!r} and {str(file)!r} are both called {name!r}: one prediction would overwrite the "
                    "other; give them in two calls with different --out"
                )
            named[name] = file
    return named


def refuse_overwriting(named: dict[str, Path], out: Path) -> None:
    """Raises :class:`ConfigError` where a prediction would be written onto an image that was given, or onto another."""
    given = {path.resolve() for path in named.values()}
    written: dict[Path, str] = {}
    for name in named:
        for ending in _ENDINGS:
            target = (out / f"{name}{ending}").resolve()
            if target in given:
                raise ConfigError(f"{str(target)!r} is an image that was given; write to another folder with --out")
            if target in written:
                raise ConfigError(
                    f"{target.name!r} would be written for {str(named[written[target]])!r} and for {str(named[name])!r}; "
                    "give them in two calls with different --out"
                )
            written[target] = name


def write_values(out: Path, name: str, values: Tensor, task: Any) -> None:
    """Writes a prediction: classes (H, W) as a PNG of 8 or 16 bits; depths as a PNG of 16 bits, or a TIFF of metres; all else
    as a NumPy array.

    Raises:
        DataError: more classes than 16 bits can tell.
    """
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from bidensify._util.files import atomic_write

    array, notes = values.numpy(), PngInfo()
    steps = next((n for n in _STEPS if n * getattr(task, "max_depth", 0) <= 65535), 0)
    if values.ndim == 2 and not values.is_floating_point():
        classes = getattr(task, "num_classes", 0) or int(values.max()) + 1
        if classes > 1 << 16:
            raise DataError(f"{classes} classes do not fit a PNG's 16 bits; predict with the model in Python")
        kind, array = "labels.png", array.astype(np.uint8 if classes <= 256 else np.uint16)
    elif values.ndim == 2 and task.name == "depth" and steps:
        kind, array = "depth.png", np.rint(array * steps).astype(np.uint16)
        notes.add_text("depth_scale", repr(1 / steps))
    elif values.ndim == 2 and task.name == "depth":
        kind, array = "depth.tiff", array.astype(np.float32)
    else:
        kind = "values.npy"
    with atomic_write(out / f"{name}.{kind}") as temporary:
        if kind == "values.npy":
            with temporary.open("wb") as file:
                np.save(file, array, allow_pickle=False)
        else:
            image = Image.fromarray(array)
            if array.dtype == np.uint8 and (colours := list(getattr(task, "palette", ()))):
                # One colour alone is the foreground's; its pixels stay indices, with colours for whoever looks at them.
                image.putpalette([part for colour in ([(0, 0, 0)] * (len(colours) == 1) + colours) for part in colour])
            if kind.endswith("tiff"):
                image.save(temporary, format="TIFF")
            else:
                image.save(temporary, format="PNG", pnginfo=notes)


def write_picture(out: Path, name: str, picture: Tensor) -> None:
    """Writes a picture, uint8 (3, H, W), as PNG."""
    from bidensify._util.files import atomic_write
    from bidensify.compare.images import png

    with atomic_write(out / f"{name}.png") as temporary:
        temporary.write_bytes(png(picture))
