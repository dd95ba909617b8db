"""``image_mask_folder``: any tree of images with masks, depth maps, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bidensify.data.base import DataInfo, Transforms, default_palette
from bidensify.data.filedata import FileDataset, Files
from bidensify.data.files import find_images
from bidensify.data.listing import Names, read_list
from bidensify.data.readers import DepthReader, MaskReader, colour_map, integer_map
from bidensify.data.registry import register_data_set
from bidensify.errors import ConfigError, DataError


@register_data_set("image_mask_folder")
class ImageMaskFolder(FileDataset):
    """Images and their masks, depth maps or clean images, matched by relative path without suffix.

    Files are PNG, JPEG, TIFF, BMP, WebP, PPM or NumPy's .npy, of 8 or 16 bits or floats; photographs are turned as their
    EXIF orientation says. Files that are not images, and hidden files, are not looked at.

    Args:
        split: replaces ``{split}`` in the folder names, or is a key of ``splits``.
        root: folder that the others are relative to.
        images, masks, depth: folders, searched with their sub-folders. ``masks`` defaults to ``{split}/labels`` unless
            ``depth`` or ``targets`` is given; ``depth: true`` means ``{split}/depth``.
        targets: folder of the clean images that restoration is to give back, each of its image's size.
        splits: instead of these folders, {split: {"images": ..., "masks": ..., "depth": ..., "targets": ..., "stems": ...}}.
        stems: text file, relative to ``root``, that names the samples to use (the folders may hold more): one stem, file
            name or path a line, or an image and its mask (or depth map) separated by a space, tab or comma.
        image_suffix, mask_suffix, depth_suffix: end of the stem that is not part of the match, such as ``_leftImg8bit``.
        channels: of the images: 1 grey, 3 colour, 4 with alpha, or the number of bands of .npy and TIFF files.
        image_max: the value that counts as 1 in images of more than 8 bits: 65535 in integers and 1 in floats unless given
            (4095 for cameras of 12 bits; 1 leaves floats of another unit as they are).
        classes: number of classes; defaults to the number of ``class_names``. Required with masks.
        class_names, palette: one entry per class.
        ignore_index: label of pixels that do not count.
        label_map: {label in the file: class}, for masks whose labels are not 0 ... classes − 1. Labels that it does not
            name stay what they are.
        mask_colours: the colours of masks drawn in colours: a list of [r, g, b], one per class, or {colour: class} with
            colours as text (``"128,64,128"``, ``"#804080"``), where ``ignore_index`` is a class too. Without it masks hold
            indices; of a palette image the indices count, with it the colours.
        multilabel: masks have one band per class, 0 and 1 or 0 and 255, because several labels may hold at once.
        depth_scale: metres per step of the depth file (0.001 for millimetres, 1/256 for KITTI); 0 stays invalid.
        depth_invalid: further values of the depth file that are no depth, such as 65535.
        mean, std: per channel, on images scaled to [0, 1]; ImageNet's for 3 channels, its average for 1, else 0.5 and 0.25.
        cache: decode every file once, when the data set is built, and keep it in memory.

    Raises:
        ConfigError: an option is missing or out of range, the root is no folder, or the split is unknown.
        DataError: a folder is missing or empty, an image has no mask (or the reverse), or, when a sample is loaded,
            a file is empty, truncated, of the wrong kind or size, or holds a label outside the classes.

    Example:
        Binary masks of 0 and 255::

            train: {name: image_mask_folder, split: train, root: leaves, classes: 2, label_map: {255: 1}}

        Colour-coded masks beside the images, and lists of names for the splits::

            name: image_mask_folder
            split: train
            root: streets
            splits:
              train: {images: photos, masks: coded, stems: train.txt}
              val: {images: photos, masks: coded, stems: val.txt}
            mask_suffix: _L
            class_names: [road, car]
            mask_colours: {"128,64,128": 0, "#400080": 1, "0,0,0": 255}
            ignore_index: 255
            palette: [[128, 64, 128], [64, 0, 128]]
            cache: true

        Five bands of 12 bits, several labels a pixel::

            name: image_mask_folder
            split: val
            root: fields
            images: "{split}/bands"
            masks: "{split}/planes"
            channels: 5
            image_max: 4095
            classes: 3
            multilabel: true
            mean: [0.2, 0.2, 0.3, 0.4, 0.1]
            std: [0.1, 0.1, 0.1, 0.2, 0.1]

        Millimetres in 16 bits, 65535 where the sensor saw nothing; one list for all splits::

            name: image_mask_folder
            split: train
            root: rooms
            images: rgb
            image_suffix: _rgb
            depth: range
            depth_suffix: _depth
            depth_scale: 0.001
            depth_invalid: [65535]
            stems: "{split}.txt"

        Noisy and clean images for restoration::

            train: {name: image_mask_folder, split: train, root: photos, images: noisy, targets: clean}
    """

    def __init__(
        self,
        split: str,
        *,
        root: str,
        images: str = "{split}/images",
        masks: str | None = None,
        depth: str | bool | None = None,
        targets: str | None = None,
        splits: Mapping[str, Mapping[str, str]] | None = None,
        stems: str | None = None,
        image_suffix: str = "",
        mask_suffix: str = "",
        depth_suffix: str = "",
        channels: int = 3,
        image_max: float | None = None,
        classes: int | None = None,
        class_names: Sequence[str] = (),
        palette: Sequence[Sequence[int]] | None = None,
        ignore_index: int = 255,
        label_map: Mapping[int, int] | None = None,
        mask_colours: Sequence[Sequence[int]] | Mapping[str, int] | None = None,
        multilabel: bool = False,
        depth_scale: float = 0.001,
        depth_invalid: Sequence[float] = (),
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        cache: bool = False,
        transforms: Transforms | None = None,
    ) -> None:
        base = Path(root).expanduser()
        if not base.is_dir():
            raise ConfigError(f"root={str(root)!r} is not a folder; give the folder that holds the data set")
        given = {"images": images, "masks": masks, "depth": depth, "targets": targets, "stems": stems}
        folders = _folders(split, given, splits)
        names = tuple(class_names)
        count, reader, colours = 0, None, colour_map(mask_colours)
        if "masks" in folders:
            count = len(names) if classes is None else classes
            _check_classes(count, names, palette, multilabel)
            reader = MaskReader(count, ignore_index, integer_map("label_map", label_map), colours, multilabel)
            known = {*range(count), ignore_index, *reader.label_map}
            if wrong := [label for label in colours.values() if label not in known]:
                raise ConfigError(
                    f"mask_colours names the class {wrong[0]}, but classes={count}, ignore_index={ignore_index}"
                )
        for option, value in (("depth_scale", depth_scale), ("image_max", 1 if image_max is None else image_max)):
            if not value > 0:
                raise ConfigError(f"{option}={value}; it is above 0 (metres per step, the value that counts as 1)")
        if channels < 1:
            raise ConfigError(f"channels={channels}; images have at least 1")
        if palette is None and set(range(count)) <= set(colours.values()):
            palette = [next(colour for colour, label in colours.items() if label == c) for c in range(count)]
        info = DataInfo(
            num_classes=count,
            class_names=names or tuple(f"class_{index}" for index in range(count)),
            palette=default_palette(count) if not palette else tuple((c[0], c[1], c[2]) for c in palette),
            ignore_index=ignore_index,
            mean=tuple(mean),
            std=tuple(std),
            depth="depth" in folders,
            channels=channels,
            image_max=image_max,
            multilabel=multilabel and count > 0,
        )
        suffixes = {"images": image_suffix, "masks": mask_suffix, "depth": depth_suffix, "targets": ""}
        super().__init__(
            _items(base, folders, suffixes),
            info,
            masks=reader,
            depths=DepthReader(depth_scale, tuple(depth_invalid)) if "depth" in folders else None,
            cache=cache,
            transforms=transforms,
        )

    @property
    def stems(self) -> list[str]:
        """The samples' stems."""
        return [item.name for item in self.items]


_KINDS = {"masks": "mask", "depth": "depth map", "targets": "target"}


def _items(base: Path, folders: Mapping[str, str], suffixes: Mapping[str, str]) -> list[Files]:
    """Lists the samples' files.

    Raises:
        DataError: files do not pair up, or a listed one is not there.
    """
    found = {kind: find_images(base / folders[kind], suffixes[kind]) for kind in suffixes if kind in folders}
    images = found.pop("images")
    listed, pairs = None, dict[str, str]()
    if "stems" in folders:
        first = next(kind for kind in found)
        partners = Names(found[first], base / folders[first], base)
        listed, pairs = read_list(base / folders["stems"], Names(images, base / folders["images"], base), partners)
    chosen = list(images) if listed is None else listed
    files: dict[str, list[Path]] = {}
    for number, (kind, there) in enumerate(found.items()):
        wanted = [pairs.get(stem, stem) if number == 0 else stem for stem in chosen]
        what, folder = _KINDS[kind], str(base / folders[kind])
        missing = [stem for stem in wanted if stem not in there]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(wanted)} images have no {what} in {folder!r}, for example {missing[:3]}; each image "
                "needs one of the same relative path and stem. Add the files, set the suffix options, or list the images to "
                "use with stems"
            )
        extra = sorted(set(there) - set(wanted))
        if extra and listed is None:
            raise DataError(
                f"{len(extra)} files in {folder!r} belong to no image, for example {extra[:3]}; each {what} needs an image "
                "of the same relative path and stem. Remove them, or list the images to use with stems"
            )
        files[kind] = [there[stem] for stem in wanted]
    rows = ({kind: paths[number] for kind, paths in files.items()} for number in range(len(chosen)))
    return [
        Files(stem, images[stem], row.get("masks"), row.get("depth"), row.get("targets"))
        for stem, row in zip(chosen, rows, strict=True)
    ]


def _folders(split: str, given: Mapping[str, Any], splits: Mapping[str, Mapping[str, str]] | None) -> dict[str, str]:
    """Returns which folder holds what, for one split."""
    if splits is not None:
        if split not in splits:
            raise ConfigError(f"split={split!r} is not among the splits given: {', '.join(map(str, splits))}")
        chosen = dict(splits[split])
        if set(chosen) - set(given) or "images" not in chosen or not set(_KINDS) & set(chosen):
            raise ConfigError(
                f"splits[{split!r}] has the keys {sorted(chosen)}; it needs images, and masks, depth or targets, and may "
                "have stems"
            )
        return chosen
    folders = dict(given)
    if folders["depth"] is True:
        folders["depth"] = "{split}/depth"
    if folders["masks"] is None and not folders["depth"] and folders["targets"] is None:
        folders["masks"] = "{split}/labels"
    return {kind: str(name).replace("{split}", split) for kind, name in folders.items() if name not in (None, False)}


def _check_classes(classes: int, names: Sequence[str], palette: Sequence[Sequence[int]] | None, multi: bool) -> None:
    if classes < (1 if multi else 2):
        raise ConfigError(
            f"classes={classes or None}; with masks, give the number of classes (at least 2) or class_names"
        )
    for option, values in (("class_names", names or None), ("palette", palette)):
        if values is not None and len(values) != classes:
            raise ConfigError(f"{option} has {len(values)} entries for classes={classes}; give one per class")
