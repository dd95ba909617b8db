"""What a file's values mean: images, masks and depth maps, each a reader with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from bidensify.data.files import Array, holds_16_bit_colours, open_image, read_bands
from bidensify.errors import ConfigError, DataError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class ImageReader:
    """Reads images as (H, W, channels), uint8, or float32 scaled to [0, 1] where a file has more than 8 bits.

    Grey, palette, CMYK and transparent files become what ``channels`` asks for: 1 is grey, 3 colour (alpha is dropped),
    4 colour with alpha. Any other number has to be the number of bands of the file.

    Attributes:
        channels: of the result.
        image_max: the value that counts as 1 in files of more than 8 bits; by default 65535 in integers and 1 in floats.
    """

    channels: int = 3
    image_max: float | None = None

    def __call__(self, path: Path) -> Array:
        """Reads one file.

        Raises:
            DataError: the file cannot be read, has other channels or colours of 16 bits (PNG), or floats
                outside [0, 1] without ``image_max``.
        """
        values = read_bands(path, "image", self.channels)
        return self._scaled(path, self._decoded(path) if values is None else values)

    def tensor(self, path: Path) -> Tensor:
        """Reads one file as (channels, H, W)."""
        return torch.from_numpy(self(path)).permute(2, 0, 1).contiguous()

    def _decoded(self, path: Path) -> Array:
        if holds_16_bit_colours(path):
            raise DataError(
                f"{str(path)!r} is a PNG of several channels of 16 bits each, of which Pillow reads 8; save it as .npy, or as a "
                "PNG of 8 bits"
            )
        image = open_image(path, "image")
        if image.mode.startswith("I") or image.mode == "F":
            values = np.array(image)[..., None]
            if self.channels not in (1, 3):
                raise DataError(f"{str(path)!r} has 1 channel; channels={self.channels} needs as many in the file")
            return np.repeat(values, self.channels, axis=2)
        if self.channels not in _MODES or (self.channels == 4 and image.mode not in ("RGBA", "PA", "LA")):
            raise DataError(
                f"{str(path)!r} has the bands {''.join(image.getbands())!r}; channels={self.channels} needs a file of as "
                "many (multi-band TIFF or .npy). Correct channels or the file"
            )
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        values = np.array(image.convert(_MODES[self.channels]))
        return values[..., None] if values.ndim == 2 else values

    def _scaled(self, path: Path, values: Array) -> Array:
        if values.dtype == np.uint8:
            return values
        floats = values.dtype.kind == "f"
        scaled = values.astype(np.float32) / np.float32(self.image_max or (1 if floats else 65535))
        low, high = (float(scaled.min()), float(scaled.max())) if scaled.size else (0.0, 0.0)
        if self.image_max is None and not (low >= 0 and high <= 1):
            raise DataError(
                f"{str(path)!r} has values from {values.min()} to {values.max()} of type {values.dtype}; images are scaled "
                "to [0, 1], so give image_max, the value that counts as 1 (image_max: 1 leaves them as they are, with "
                "mean and std in their own unit)"
            )
        return scaled


@dataclass(frozen=True)
class MaskReader:
    """Reads masks as class indices (H, W), or as planes of 0 and 1 (classes, H, W).

    Attributes:
        classes: number of classes.
        ignore_index: label of pixels that do not count.
        label_map: {label in the file: class}; labels that it does not name stay.
        colours: {colour: class} of masks drawn in colours; empty for masks of indices.
        multilabel: whether a file has one band per class, 0 or 1 (or 255), instead of one label per pixel.
    """

    classes: int
    ignore_index: int = 255
    label_map: Mapping[int, int] = field(default_factory=dict)
    colours: Mapping[tuple[int, int, int], int] = field(default_factory=dict)
    multilabel: bool = False

    def __call__(self, path: Path) -> Array:
        """Reads one file; see :meth:`raw` and :meth:`check`."""
        labels = self.raw(path)
        if not self.multilabel:
            self.check(path, labels)
        return labels

    def raw(self, path: Path) -> Array:
        """Reads one file and maps its labels, without a look at what they are.

        Raises:
            DataError: the file cannot be read, or has other bands, colours or values than the options say.
        """
        if self.multilabel:
            return self._planes(path)
        values = read_bands(path, "mask", 1)
        labels = self._indices(path) if values is None else values[..., 0]
        if labels.dtype.kind not in "iub":
            raise DataError(
                f"{str(path)!r} holds the type {labels.dtype}; a mask holds one integer per pixel, its class index. "
                "Convert it to integers"
            )
        if not self.label_map:
            return labels
        if labels.dtype.kind == "u" and labels.itemsize <= 2:  # a look-up is faster than a pass for each label
            table = np.arange(256**labels.itemsize, dtype=np.int64)
            table[[old for old in self.label_map if 0 <= old < len(table)]] = [
                new for old, new in self.label_map.items() if 0 <= old < len(table)
            ]
            small = table.min() >= 0 and table.max() <= 255
            return np.asarray(table.astype(np.uint8 if small else np.int64)[labels])
        mapped = labels.astype(np.int64)
        for old, new in self.label_map.items():
            mapped[labels == old] = new
        return mapped

    def _indices(self, path: Path) -> Array:
        image = open_image(path, "mask")
        if self.colours:
            return self._by_colour(path, image)
        if image.mode == "LA":
            image = image.getchannel(0)
        values = np.array(image)
        if values.ndim == 3:
            colours = values[..., :3]
            if (colours == colours[..., :1]).all():
                return np.ascontiguousarray(colours[..., 0])
            shown = [tuple(map(int, colour)) for colour in np.unique(colours.reshape(-1, 3), axis=0)[:4]]
            raise DataError(
                f"{str(path)!r} is in colours (mode {image.mode}, for example {shown}); a mask holds one integer per pixel, "
                "its class index. Say with mask_colours which colour is which class"
            )
        return values.astype(np.uint8) if values.dtype.kind == "b" else values

    def _by_colour(self, path: Path, image: Image.Image) -> Array:
        pixels = np.array(image.convert("RGB")).astype(np.int32)
        codes = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
        table = sorted(((r << 16) | (g << 8) | b, label) for (r, g, b), label in self.colours.items())
        keys, labels = (np.array(column) for column in zip(*table, strict=True))
        place = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
        wrong = np.argwhere(keys[place] != codes)
        if len(wrong):
            row, column = map(int, wrong[0])
            raise DataError(
                f"{str(path)!r} has the colour {tuple(map(int, pixels[row, column]))} at row {row}, column {column}, which "
                f"is not among the {len(keys)} of mask_colours ({len(wrong)} such pixels). Add it, with the class or "
                "ignore_index; a mask saved as JPEG has colours that nobody drew: save it as PNG"
            )
        return np.asarray(labels[place])

    def _planes(self, path: Path) -> Array:
        values = read_bands(path, "mask", self.classes)
        if values is None:
            values = np.array(open_image(path, "mask"))
            values = values[..., None] if values.ndim == 2 else values
        if values.shape[-1] != self.classes:
            raise DataError(
                f"{str(path)!r} has {values.shape[-1]} bands; with multilabel, a mask has one per class ({self.classes})"
            )
        present = set(np.unique(values).tolist())
        if not (present <= {0, 1} or present <= {0, 255}):
            raise DataError(
                f"{str(path)!r} holds the values {sorted(present)[:8]}; with multilabel, each band is 0 and 1, or 0 and 255"
            )
        return np.asarray(np.moveaxis(values != 0, -1, 0), dtype=np.uint8)

    def check(self, path: Path, labels: Array) -> None:
        """Raises DataError where a mask holds a label that is neither a class nor ``ignore_index``."""
        if labels.dtype == np.uint8:
            present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)).tolist()
        else:
            present = np.unique(labels).tolist()
        wrong = [value for value in present if not 0 <= value < self.classes and value != self.ignore_index]
        if wrong:
            row, column = (int(index) for index in np.argwhere(labels == wrong[0])[0])
            lossy = path.suffix.lower() in (".jpg", ".jpeg")
            remedy = "JPEG changes labels: save masks as PNG" if lossy else label_remedy(set(present), self.classes)
            raise DataError(
                f"{str(path)!r} has the label {wrong[0]} at row {row}, column {column} (labels outside the classes in this "
                f"file: {wrong[:8]}); labels are 0 to {self.classes - 1}, or ignore_index={self.ignore_index}. {remedy}"
            )


@dataclass(frozen=True)
class DepthReader:
    """Reads depth maps as float32 (H, W) in metres, 0 = invalid.

    Attributes:
        scale: metres per step of the file.
        invalid: values of the file that are no depth, beside 0, negative ones, NaN and infinity.
    """

    scale: float
    invalid: tuple[float, ...] = ()

    def __call__(self, path: Path) -> Array:
        """Reads one file.

        Raises:
            DataError: the file cannot be read, or has several channels.
        """
        values = read_bands(path, "depth map", 1)
        steps = np.array(open_image(path, "depth map")) if values is None else values[..., 0]
        if steps.ndim != 2 or steps.dtype.kind not in "iuf":
            raise DataError(
                f"{str(path)!r} has shape {steps.shape} and type {steps.dtype}; a depth map holds one number per pixel, its "
                "depth step. Convert it to a single-channel image"
            )
        depth = steps.astype(np.float32) * np.float32(self.scale)
        good = np.isfinite(depth) & (depth > 0)
        for value in self.invalid:
            good &= steps != value
        return np.asarray(np.where(good, depth, np.float32(0)))


def label_remedy(labels: set[int], classes: int) -> str:
    """Says what to do about labels outside the classes."""
    if classes == 2 and labels == {0, 255}:
        return "Masks of 0 and 255 need label_map: {255: 1}"
    if labels == {*range(1, classes + 1)}:
        return f"Labels that start at 1 need label_map: {{1: 0, 2: 1, ... {classes}: {classes - 1}}}"
    return "Correct classes or ignore_index, or map labels with label_map"


def integer_map(option: str, given: Mapping[Any, Any] | None) -> dict[int, int]:
    """Returns {label: class} with whole numbers; a recipe that went through JSON has texts for keys.

    Raises:
        ConfigError: an entry is no whole number.
    """
    try:
        pairs = {int(str(old)): int(str(new)) for old, new in (given or {}).items()}
    except (ValueError, AttributeError):
        raise ConfigError(
            f"{option}={given!r}; give {{label in the file: class}} of whole numbers, such as {{255: 1}}"
        ) from None
    return pairs


def colour_map(given: Mapping[Any, Any] | Sequence[Any] | None) -> dict[tuple[int, int, int], int]:
    """Returns {(r, g, b): class} from a list of colours, one per class, or from {colour: class}.

    A colour is ``[r, g, b]`` or, as a key, a text: ``"128,64,128"``, ``"#804080"`` or a name that CSS knows.

    Raises:
        ConfigError: a colour or class cannot be read, or a colour stands twice.
    """
    items = list(given.items()) if isinstance(given, Mapping) else [(c, n) for n, c in enumerate(given or ())]
    colours: dict[tuple[int, int, int], int] = {}
    for colour, label in items:
        try:
            parts = colour.split(",") if isinstance(colour, str) and "," in colour else colour
            red, green, blue = ImageColor.getrgb(parts)[:3] if isinstance(parts, str) else map(int, parts)
            key, value = (red, green, blue), int(label)
        except (TypeError, ValueError):
            raise ConfigError(
                f"mask_colours: {colour!r}: {label!r} is no colour and class; give a list of [r, g, b], one per class, or "
                'a mapping such as {"128,64,128": 3, "#000000": 255}'
            ) from None
        if not all(0 <= part <= 255 for part in key) or key in colours:
            raise ConfigError(f"mask_colours: {colour!r} stands twice or is not within 0 to 255; give each colour once")
        colours[key] = value
    return colours
