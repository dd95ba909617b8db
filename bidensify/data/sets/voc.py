"""PASCAL VOC 2012 segmentation (Everingham et al., IJCV 2010), with the extra masks of SBD (Hariharan et al., ICCV 2011)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bidensify.data.base import Colour, DataInfo, Transforms
from bidensify.data.filedata import FileDataset, Files
from bidensify.data.files import Array, named
from bidensify.data.listing import read_lines
from bidensify.data.readers import MaskReader
from bidensify.data.registry import register_data_set
from bidensify.data.sets.places import check_split, fewer, locate
from bidensify.errors import DataError, MissingExtraError

PUBLISHED = {"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582}
_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_GET = (
    "download http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar, unpack it, and give the folder "
    "VOCdevkit/VOC2012 as root"
)
_GET_SBD = (
    "put the masks of SBD as PNG into SegmentationClassAug, or give sbd=.../benchmark_RELEASE/dataset from "
    "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"
)


def voc_palette(classes: int) -> tuple[Colour, ...]:
    """Returns VOC's colours: the bits of a label, in threes, from the highest bit of red, green and blue downwards."""
    return tuple(
        (
            sum((label >> 3 * bit & 1) << 7 - bit for bit in range(3)),
            sum((label >> 3 * bit + 1 & 1) << 7 - bit for bit in range(3)),
            sum((label >> 3 * bit + 2 & 1) << 7 - bit for bit in range(3)),
        )
        for label in range(classes)
    )


@dataclass(frozen=True)
class _VocMasks(MaskReader):
    """Masks of VOC as PNG, and of SBD as MATLAB files."""

    def raw(self, path: Path) -> Array:
        if path.suffix != ".mat":
            return super().raw(path)
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise MissingExtraError(f"{str(path)!r} needs scipy; pip install 'bidensify[data]'") from error
        with named(path, "mask"):
            return np.asarray(loadmat(path)["GTcls"]["Segmentation"][0, 0])


@register_data_set("voc2012")
class Voc2012(FileDataset):
    """PASCAL VOC 2012 segmentation: 20 objects and background; the outlines are ignored (255).

    Reads ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation/{split}.txt``. The split ``trainaug`` adds the
    masks of SBD, without the images of ``val``: from ``SegmentationClassAug`` and the list ``trainaug.txt`` or
    ``train_aug.txt`` beside the others, or from ``sbd``.

    Args:
        split: ``train`` (1,464 images), ``val`` (1,449), ``trainval`` (2,913) or ``trainaug`` (10,582).
        root: the folder VOC2012, or one that holds it or VOCdevkit.
        sbd: the folder ``dataset`` of SBD (``cls/*.mat``, ``train.txt``, ``val.txt``); needs scipy.
        cache: decode every file once, when the data set is built, and keep it in memory.

    Raises:
        ConfigError: there is no such split.
        DataError: a folder, list or file is missing.

    Example:
        ::

            train: {name: voc2012, split: trainaug, root: /data/VOCdevkit/VOC2012, sbd: /data/benchmark_RELEASE/dataset}
            val: {name: voc2012, split: val, root: /data/VOCdevkit/VOC2012, cache: true}
    """

    def __init__(
        self,
        split: str,
        *,
        root: str,
        sbd: str | None = None,
        cache: bool = False,
        transforms: Transforms | None = None,
    ) -> None:
        title = "PASCAL VOC 2012"
        check_split(title, split, PUBLISHED)
        lists = "ImageSets/Segmentation"
        needed = ["JPEGImages", "SegmentationClass", *(f"{lists}/{n}.txt" for n in _needed_lists(split, sbd))]
        base = locate(title, root, ["VOC2012", "VOCdevkit/VOC2012"], needed, _GET)
        if split == "trainaug":
            masks = _with_sbd(base, base / lists, sbd)
        else:
            masks = {
                name: base / "SegmentationClass" / f"{name}.png" for name in read_lines(base / lists / f"{split}.txt")
            }
        items = [Files(name, base / "JPEGImages" / f"{name}.jpg", mask) for name, mask in masks.items()]
        missing = [str(path) for item in items for path in (item.image, item.mask) if path and not path.is_file()]
        if missing:
            raise DataError(
                f"{title} {split}: {len(missing)} listed files are missing, for example {missing[:3]}; {_GET}"
            )
        info = DataInfo(num_classes=21, class_names=_NAMES, palette=voc_palette(21))
        super().__init__(items, info, masks=_VocMasks(21), cache=cache, transforms=transforms)
        self.notes = fewer(title, split, len(items), PUBLISHED)


def _needed_lists(split: str, sbd: str | None) -> list[str]:
    if split != "trainaug":
        return [split]
    return ["train", "val"] if sbd is not None else ["val"]


def _with_sbd(base: Path, lists: Path, sbd: str | None) -> dict[str, Path]:
    """Returns {name: mask} of ``trainaug``: VOC's own masks where it has some, SBD's elsewhere, nothing of VOC's val."""
    held_out = set(read_lines(lists / "val.txt"))
    if sbd is not None:
        other = locate("SBD", sbd, ["dataset", "benchmark_RELEASE/dataset"], ["cls", "train.txt", "val.txt"], _GET_SBD)
        names = [name for part in ("train", "val") for name in read_lines(other / f"{part}.txt")]
        masks = {name: other / "cls" / f"{name}.mat" for name in names}
        masks |= {name: base / "SegmentationClass" / f"{name}.png" for name in read_lines(lists / "train.txt")}
    else:
        found = [lists / name for name in ("trainaug.txt", "train_aug.txt") if (lists / name).is_file()]
        if not found or not (base / "SegmentationClassAug").is_dir():
            raise DataError(
                f"PASCAL VOC 2012 trainaug: {lists / 'trainaug.txt'!s} and {base / 'SegmentationClassAug'!s} are needed; "
                f"{_GET_SBD}"
            )
        # A line is a name, or (DeepLab's list) the paths of image and mask.
        names = [Path(line.split()[0]).stem for line in read_lines(found[0])]
        masks = {name: base / "SegmentationClassAug" / f"{name}.png" for name in names}
    return {name: path for name, path in sorted(masks.items()) if name not in held_out}
