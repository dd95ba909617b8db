"""Finding and opening image files: upright, whole, and with errors that name file, value, rule and remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from bidensify.errors import DataError, MissingExtraError

Array = npt.NDArray[Any]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pfm", ".npy"})


def find_images(folder: Path, suffix: str = "") -> dict[str, Path]:
    """Returns {stem: path} of the image files below ``folder``, sorted; the stem is the relative path without extension
    and without ``suffix``.

    Raises:
        DataError: no such folder, no image in it, a stem without ``suffix``, or two files with one stem.
    """
    if not folder.is_dir():
        raise DataError(
            f"{str(folder)!r} is not a folder; check root and the folder names (images, masks, depth, split)"
        )
    found: dict[str, Path] = {}
    for path in sorted(_files(folder)):
        if path.suffix.lower() not in SUFFIXES:
            continue
        relative = path.relative_to(folder)
        stem = relative.with_suffix("").as_posix()
        if suffix:
            if not stem.endswith(suffix):
                # A folder may hold several kinds of files told apart by their suffix (Cityscapes).
                continue
            stem = stem[: -len(suffix)]
        if stem in found:
            raise DataError(f"{str(path)!r} and {str(found[stem])!r} have one stem; keep one of the two files")
        found[stem] = path
    if not found:
        ending = f" whose stem ends in {suffix!r}" if suffix else ""
        raise DataError(
            f"{str(folder)!r} has no image file{ending} (looked for {', '.join(sorted(SUFFIXES))}, sub-folders too); "
            "check the folder's name and contents"
        )
    return found


def _files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The files below ``folder`` that are not hidden, through links too; a link to a folder that holds it is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path, above | {real})
        elif path.is_file():
            yield path


@contextmanager
def named(path: Path, kind: str) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a DataError that names it."""
    try:
        if path.stat().st_size == 0:
            raise DataError(
                f"{str(path)!r} is an empty file (0 bytes); the {kind} must be a readable image. Fetch it again"
            )
        yield
    except (DataError, MissingExtraError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{str(path)!r} is not an image that can be read ({path.stat().st_size} bytes); replace or convert the {kind}"
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{str(path)!r} is too large ({error}); cut the {kind} into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:
        # Pillow and NumPy tell damage by a dozen classes; only the operating system's own errors carry a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(
                f"{str(path)!r} cannot be opened ({error.strerror}); check that the {kind} is there and may be read"
            ) from error
        raise DataError(
            f"{str(path)!r} is truncated or damaged ({error}); the {kind} must be whole. Fetch it again"
        ) from error


def open_image(path: Path, kind: str) -> Image.Image:
    """Reads an image file whole and turns it upright, as its EXIF orientation says.

    Raises:
        DataError: the file cannot be opened, is empty, truncated or not an image.
    """
    # From an open file, not from its name: what Pillow maps into memory by name comes out garbled where a TIFF is turned.
    with named(path, kind), path.open("rb") as file:
        image = Image.open(file)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    return image


def holds_16_bit_colours(path: Path) -> bool:
    """Whether a file is a PNG of several channels of 16 bits each, by its header."""
    with named(path, "image"), path.open("rb") as file:
        head = file.read(26)
    return head.startswith(b"\x89PNG\r\n\x1a\n") and head[24:25] == b"\x10" and head[25:26] in (b"\2", b"\4", b"\6")


def check_whole(path: Path, kind: str) -> None:
    """Finds files that were cut off, as downloads are; JPEG and PNG say at their end that they are whole.

    Raises:
        DataError: as :func:`open_image`.
    """
    marks = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}
    suffix = path.suffix.lower()
    if suffix == ".npy" or suffix not in SUFFIXES:
        return  # a NumPy file's header says how long it is, and image_size has looked
    with named(path, kind), path.open("rb") as file:
        file.seek(-min(64, path.stat().st_size), 2)
        ending = file.read()
    # Some cameras write on behind the end: what looks cut off is read to be sure, and so are the other formats.
    if suffix not in marks or marks[suffix] not in ending:
        open_image(path, kind)


def image_size(path: Path, kind: str, bands: int = 3) -> tuple[int, int]:
    """Returns (height, width) of an upright image from its header alone, where the format has one.

    Raises:
        DataError: as :func:`open_image`.
    """
    if not _holds_bands(path, bands):
        with named(path, kind), Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            # Versions of Pillow differ in whether the size of a TIFF that is not read yet is the upright one.
            stored = (image.tag_v2[256], image.tag_v2[257]) if hasattr(image, "tag_v2") else image.size
            width, height = map(int, reversed(stored) if turned else stored)
        return height, width
    with named(path, kind):
        if path.suffix.lower() == ".npy":
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        else:
            with _tifffile(path).TiffFile(path) as file:
                shape = file.series[0].shape
    rows = shape[1:] if len(shape) == 3 and shape[-1] != bands and shape[0] == bands else shape
    return int(rows[0]), int(rows[1])


def _holds_bands(path: Path, bands: int) -> bool:
    """Whether a file is not for Pillow, which reads images of 1, 3 and 4 channels."""
    return path.suffix.lower() == ".npy" or (path.suffix.lower() in (".tif", ".tiff") and bands not in (1, 3, 4))


def read_bands(path: Path, kind: str, bands: int) -> Array | None:
    """Reads a NumPy file, or a TIFF of a number of bands that Pillow cannot read, as (H, W, bands).

    Returns:
        The values in the file's own type; None where :func:`open_image` is to read the file.

    Raises:
        DataError: as :func:`open_image`, or the shape is neither (H, W, bands) nor (bands, H, W).
        MissingExtraError: a TIFF needs the package tifffile.
    """
    if not _holds_bands(path, bands):
        return None
    with named(path, kind):
        values = np.load(path, allow_pickle=False) if path.suffix.lower() == ".npy" else _read_tiff(path)
    shape = values.shape
    if values.ndim == 2 and bands == 1:
        return np.asarray(values[..., None])
    if values.ndim == 3 and values.shape[-1] != bands and values.shape[0] == bands:
        values = np.moveaxis(values, 0, -1)
    if values.ndim != 3 or values.shape[-1] != bands or values.dtype.kind not in "uifb":
        raise DataError(
            f"{str(path)!r} has the shape {shape} and type {values.dtype}; {kind}s of {bands} bands are (H, W, {bands}) or "
            f"({bands}, H, W) of numbers. Correct the number of channels or classes, or convert the file"
        )
    return np.ascontiguousarray(values)


def _tifffile(path: Path) -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise MissingExtraError(
            f"{str(path)!r} is a TIFF of several bands, which the package tifffile reads; pip install 'bidensify[data]'"
        ) from error
    return tifffile


def _read_tiff(path: Path) -> Array:
    with _tifffile(path).TiffFile(path) as file:
        orientation = file.pages.first.tags.get("Orientation")
        if orientation is not None and int(orientation.value) != 1:
            raise DataError(f"{str(path)!r} is stored turned (orientation {orientation.value}); save it upright")
        return np.asarray(file.asarray())
