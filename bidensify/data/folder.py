"""``image_mask_folder``: any tree of images with masks, depth maps, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from bidensify.data import files
from bidensify.data.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataInfo,
    DenseDataset,
    Depth,
    Sample,
    Transforms,
    register_dataset,
)
from bidensify.data.palette import default_palette
from bidensify.errors import ConfigError, DataError


@register_dataset("image_mask_folder")
class ImageMaskFolder(DenseDataset):
    """Images and their masks or depth maps, matched by relative path without suffix.

    Args:
        split: replaces ``{split}`` in the folder names, or is a key of ``splits``.
        root: folder that the others are relative to.
        images, masks, depth: folders, searched with their sub-folders. ``masks`` defaults to ``{split}/labels`` unless
            ``depth`` is given; ``depth=True`` means ``{split}/depth``.
        splits: instead of the three, {split: {"images": ..., "masks": ..., "depth": ..., "stems": ...}}.
        stems: text file, relative to ``root``, with one stem a line: use only these (the folders may hold more).
        image_suffix, mask_suffix, depth_suffix: end of the stem that is not part of the match, such as ``_leftImg8bit``.
        classes: number of classes; defaults to the number of ``class_names``. Required with masks.
        class_names, palette: one entry per class.
        ignore_index: label of pixels that do not count.
        label_map: {label in the file: class}, for masks whose labels are not 0 ... classes − 1. Labels that it does not
            name stay what they are.
        depth_scale: metres per step of the depth file (0.001 for millimetres, 1/256 for KITTI); 0 stays invalid.
        mean, std: per channel, on images scaled to [0, 1].
        cache: decode every file once, when the data set is built, and keep it in memory.

    Masks are single-channel (or palette) images of class indices, depth maps single-channel images of 8 or 16 bits.
    Files that are not images, and hidden files, are not looked at.

    Raises:
        ConfigError: an option is missing or out of range, or the split is unknown.
        DataError: a folder is missing or empty, an image has no mask (or the reverse), or, when a sample is loaded,
            a file is empty, truncated, of the wrong kind or size, or holds a label outside the classes.
    """

    def __init__(
        self,
        split: str,
        *,
        root: str,
        images: str = "{split}/images",
        masks: str | None = None,
        depth: str | bool | None = None,
        splits: Mapping[str, Mapping[str, str]] | None = None,
        stems: str | None = None,
        image_suffix: str = "",
        mask_suffix: str = "",
        depth_suffix: str = "",
        classes: int | None = None,
        class_names: Sequence[str] = (),
        palette: Sequence[Sequence[int]] | None = None,
        ignore_index: int = 255,
        label_map: Mapping[int, int] | None = None,
        depth_scale: float = 0.001,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        cache: bool = False,
        transforms: Transforms | None = None,
    ) -> None:
        super().__init__(transforms)
        base = Path(root).expanduser()
        if not base.is_dir():
            raise DataError(f"root={str(root)!r} is not a folder; give the folder that holds the data set")
        folders = _folders(split, images, masks, depth, splits, stems)
        has_masks, has_depth = "masks" in folders, "depth" in folders
        names = tuple(class_names)
        if has_masks:
            classes = (len(names) or None) if classes is None else classes
            _check_classes(classes, names, palette)
        if depth_scale <= 0:
            raise ConfigError(f"depth_scale={depth_scale}; it is metres per step of the depth file, above 0")
        count = int(classes or 0) if has_masks else 0
        colours = default_palette(count) if palette is None else tuple((c[0], c[1], c[2]) for c in palette)
        self.info = DataInfo(
            num_classes=count,
            class_names=names or tuple(f"class_{i}" for i in range(count)),
            palette=colours[:count],
            ignore_index=ignore_index,
            mean=tuple(mean),
            std=tuple(std),
            depth=has_depth,
        )
        self.depth_scale = float(depth_scale)
        self.label_map = {int(k): int(v) for k, v in (label_map or {}).items()}
        self._allowed = {*range(count), ignore_index}

        found = files.find_images(base / folders["images"], image_suffix)
        wanted = files.read_stems(base / folders["stems"]) if "stems" in folders else None
        self.stems = files.select(found, wanted, "image", base / folders["images"])
        self.images = [found[stem] for stem in self.stems]
        self.masks = self._partners(base / folders["masks"], "mask", mask_suffix, wanted) if has_masks else None
        self.depths = self._partners(base / folders["depth"], "depth map", depth_suffix, wanted) if has_depth else None
        self._cache: list[tuple[Tensor, Tensor | None, Tensor | None]] | None = None
        if cache:
            with ThreadPoolExecutor(max_workers=4) as pool:
                self._cache = list(pool.map(self._read, range(len(self))))

    def _partners(self, folder: Path, kind: str, suffix: str, wanted: Sequence[str] | None) -> list[Path]:
        found = files.find_images(folder, suffix)
        missing = [stem for stem in self.stems if stem not in found]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self.stems)} images have no {kind} in {str(folder)!r}, for example "
                f"{missing[:3]}; each image needs one of the same relative path and stem. Add the files, set the "
                "suffix options, or list the images to use with stems"
            )
        extra = sorted(set(found) - set(self.stems))
        if extra and wanted is None:
            raise DataError(
                f"{len(extra)} files in {str(folder)!r} belong to no image, for example {extra[:3]}; each {kind} needs "
                "an image of the same relative path and stem. Remove them, or list the images to use with stems"
            )
        return [found[stem] for stem in self.stems]

    def __len__(self) -> int:
        return len(self.images)

    def name_of(self, index: int) -> str:
        """Returns the stem of sample ``index``."""
        return self.stems[index]

    def check(self) -> None:
        """Reads every file once and raises the first mistake found (labels, sizes, broken files)."""
        for index in range(len(self)):
            self._read(index)

    def load(self, index: int) -> Sample:
        """Returns sample ``index`` before the transforms.

        Raises:
            DataError: as the class says; the message names the file.
        """
        image, mask, depth = self._read(index) if self._cache is None else self._cache[index]
        # Copies, so that nobody can write into the cache through a sample.
        sample: Sample = {"image": tv_tensors.Image(image.clone())}
        if mask is not None:
            sample["mask"] = tv_tensors.Mask(mask.to(torch.int64, copy=True))
        if depth is not None:
            sample["depth"] = Depth(depth.clone())
        return sample

    def _read(self, index: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        path = self.images[index]
        image = torch.from_numpy(files.read_rgb(path)).permute(2, 0, 1).contiguous()
        size = (image.shape[1], image.shape[2])
        mask = depth = None
        if self.masks is not None:
            labels = files.map_labels(files.read_channel(self.masks[index], "mask"), self.label_map)
            files.check_size(self.masks[index], labels.shape, path, size)
            files.check_labels(self.masks[index], labels, self._allowed, self.info.num_classes, self.info.ignore_index)
            mask = torch.from_numpy(labels.astype(_label_type(labels), copy=False))
        if self.depths is not None:
            steps = files.read_channel(self.depths[index], "depth map")
            files.check_size(self.depths[index], steps.shape, path, size)
            depth = torch.from_numpy(steps.astype(np.float32) * np.float32(self.depth_scale))
        return image, mask, depth


def _label_type(labels: files.Array) -> type[np.generic]:
    small = labels.size == 0 or (int(labels.min()) >= 0 and int(labels.max()) <= 255)
    return np.uint8 if small else np.int64


def _folders(
    split: str,
    images: str,
    masks: str | None,
    depth: str | bool | None,
    splits: Mapping[str, Mapping[str, str]] | None,
    stems: str | None,
) -> dict[str, str]:
    """Returns which folder holds what, for one split."""
    kinds = ("images", "masks", "depth", "stems")
    if splits is not None:
        if split not in splits:
            raise ConfigError(f"split={split!r} is not among the splits given: {', '.join(map(str, splits))}")
        chosen = dict(splits[split])
        unknown = sorted(set(chosen) - set(kinds))
        if unknown or "images" not in chosen or not {"masks", "depth"} & set(chosen):
            raise ConfigError(
                f"splits[{split!r}] has the keys {sorted(chosen)}; it needs images, and masks or depth or both, and may "
                "have stems"
            )
        return chosen
    if depth is True:
        depth = "{split}/depth"
    if masks is None and not depth:
        masks = "{split}/labels"
    given = {"images": images, "masks": masks, "depth": depth or None, "stems": stems}
    return {kind: str(name).replace("{split}", split) for kind, name in given.items() if name is not None}


def _check_classes(classes: int | None, names: tuple[str, ...], palette: Sequence[Sequence[int]] | None) -> None:
    if not classes or classes < 2:
        raise ConfigError(f"classes={classes}; with masks, give the number of classes (at least 2) or class_names")
    for option, values in (("class_names", names or None), ("palette", palette)):
        if values is not None and len(values) != classes:
            raise ConfigError(f"{option} has {len(values)} entries for classes={classes}; give one per class")
