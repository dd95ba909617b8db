"""Cityscapes (Cordts et al., CVPR 2016): street scenes of 50 cities, 19 classes."""

from __future__ import annotations

from bidensify.data.base import DataInfo, Transforms
from bidensify.data.filedata import FileDataset
from bidensify.data.readers import MaskReader
from bidensify.data.registry import register_data_set
from bidensify.data.sets.places import check_split, colours, fewer, locate, paired

PUBLISHED = {"train": 2975, "val": 500}
# Label ids of the files whose class counts in the benchmark, in the order of the classes; all others are ignored.
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
_COLOURS = (
    "804080f423e846464666669cbe9999999999faaa1edcdc006b8e2398fb984682b4dc143cff000000008e000046003c640050640000e6770b20"
)
_GET = (
    "download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com (an account is "
    "needed), unzip both into one folder, and give it as root"
)


@register_data_set("cityscapes")
class Cityscapes(FileDataset):
    """Cityscapes, fine annotations: 19 classes of street scenes.

    Reads ``leftImg8bit/{split}/CITY/*_leftImg8bit.png`` and ``gtFine/{split}/CITY/*_gtFine_labelIds.png``; label ids become
    the 19 training ids, the others are ignored (255). The test split has no public labels.

    Args:
        split: ``train`` (2,975 images) or ``val`` (500).
        root: the folder with leftImg8bit and gtFine, or the one that holds it as ``cityscapes``.
        cache: decode every file once, when the data set is built, and keep it in memory.

    Raises:
        ConfigError: there is no such split.
        DataError: a folder is missing or files do not pair up.

    Example:
        ::

            val: {name: cityscapes, split: val, root: /data/cityscapes, cache: false}
    """

    def __init__(self, split: str, *, root: str, cache: bool = False, transforms: Transforms | None = None) -> None:
        check_split("Cityscapes", split, PUBLISHED)
        needed = [f"leftImg8bit/{split}", f"gtFine/{split}"]
        base = locate("Cityscapes", root, ["cityscapes"], needed, _GET)
        items = paired(base / needed[0], base / needed[1], "_leftImg8bit", "_gtFine_labelIds")
        info = DataInfo(num_classes=19, class_names=_NAMES, palette=colours(_COLOURS))
        ignored = dict.fromkeys(range(34), 255)
        reader = MaskReader(19, label_map={**ignored, **{label: number for number, label in enumerate(IDS)}})
        super().__init__(items, info, masks=reader, cache=cache, transforms=transforms)
        self.notes = fewer("Cityscapes", split, len(items), PUBLISHED)
