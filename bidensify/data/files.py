"""Finding and reading image files, with errors that name file, value, rule and remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from bidensify.errors import DataError

Array = npt.NDArray[Any]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


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
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
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


def read_stems(path: Path) -> list[str]:
    """Returns the non-empty lines of a text file.

    Raises:
        DataError: the file is missing or has none.
    """
    if not path.is_file():
        raise DataError(f"the list of stems {str(path)!r} does not exist; give a text file with one stem a line")
    stems = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not stems:
        raise DataError(f"the list of stems {str(path)!r} is empty; it needs one stem a line")
    return stems


def select(found: Mapping[str, Path], wanted: Sequence[str] | None, kind: str, folder: Path) -> list[str]:
    """Returns the stems to use: all that were found, or the wanted ones.

    Raises:
        DataError: a wanted stem was not found.
    """
    if wanted is None:
        return list(found)
    missing = [stem for stem in wanted if stem not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(wanted)} listed stems have no {kind} in {str(folder)!r}, for example "
            f"{missing[:3]}; correct the list or add the files"
        )
    return list(wanted)


def _open(path: Path, kind: str) -> Image.Image:
    if path.stat().st_size == 0:
        raise DataError(
            f"{str(path)!r} is an empty file (0 bytes); the {kind} must be a readable image. Fetch it again"
        )
    try:
        image = Image.open(path)
        image.load()
    except UnidentifiedImageError as error:
        raise DataError(
            f"{str(path)!r} is not an image that can be read ({path.stat().st_size} bytes); replace or convert the {kind}"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(
            f"{str(path)!r} is truncated or damaged ({error}); the {kind} must be whole. Fetch it again"
        ) from error
    return image


def read_rgb(path: Path) -> Array:
    """Reads an image as uint8 (H, W, 3); grey, palette and transparent images are converted.

    Raises:
        DataError: the file is empty, truncated, not an image, or has more than 8 bits per channel.
    """
    image = _open(path, "image")
    if image.mode.startswith("I") or image.mode == "F":
        raise DataError(
            f"{str(path)!r} has the pixel type {image.mode} (more than 8 bits); images are 8-bit grey or colour. "
            "Convert it to 8 bits"
        )
    return np.array(image.convert("RGB"))


def read_channel(path: Path, kind: str) -> Array:
    """Reads a single-channel image of integers, (H, W); a palette image gives its indices.

    Raises:
        DataError: the file is empty, truncated, not an image, or has several channels.
    """
    image = _open(path, kind)
    if image.mode == "1":
        return np.array(image).astype(np.uint8)
    values = np.array(image)
    if values.ndim != 2 or values.dtype.kind not in "iu":
        what = "class index" if kind == "mask" else "depth step"
        raise DataError(
            f"{str(path)!r} has shape {values.shape} and type {values.dtype} (mode {image.mode}); a {kind} holds one "
            f"integer per pixel, its {what}. Convert it to a single-channel image"
        )
    return values


def map_labels(labels: Array, mapping: Mapping[int, int]) -> Array:
    """Replaces labels by ``mapping``; labels that it does not name stay."""
    if not mapping:
        return labels
    mapped = labels.astype(np.int64)
    for old, new in mapping.items():
        mapped[labels == old] = new
    return mapped


def check_size(path: Path, shape: tuple[int, ...], image: Path, size: tuple[int, int]) -> None:
    """Raises DataError where a mask or depth map is not of its image's size."""
    if tuple(shape) != tuple(size):
        raise DataError(
            f"{str(path)!r} is {shape[1]}x{shape[0]} pixels but its image {str(image)!r} is {size[1]}x{size[0]}; both "
            "must agree. Resize the former with nearest-neighbour interpolation, or correct the pairing"
        )


def check_labels(path: Path, labels: Array, allowed: set[int], classes: int, ignore_index: int) -> None:
    """Raises DataError where a mask holds a label that is neither a class nor ``ignore_index``."""
    if labels.dtype == np.uint8:
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)).tolist()
    else:
        present = np.unique(labels).tolist()
    wrong = [value for value in present if value not in allowed]
    if wrong:
        row, column = (int(index) for index in np.argwhere(labels == wrong[0])[0])
        raise DataError(
            f"{str(path)!r} has the label {wrong[0]} at row {row}, column {column} (labels outside the classes in this "
            f"file: {wrong[:8]}); labels are 0 to {classes - 1}, or ignore_index={ignore_index}. Correct classes or "
            "ignore_index, or map labels with label_map"
        )
