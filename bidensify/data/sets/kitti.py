"""KITTI depth (Geiger et al., IJRR 2013; Uhrig et al., 3DV 2017): street depth from a laser scanner, Eigen's split."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bidensify.data.base import DataInfo, Transforms
from bidensify.data.filedata import FileDataset
from bidensify.data.readers import DepthReader
from bidensify.data.registry import register_data_set
from bidensify.data.sets.places import check_split, listed
from bidensify.errors import ConfigError, DataError

PUBLISHED = {"train": 23158, "test": 697}
MAX_DEPTH = 80.0
_KB = (352, 1216)
# Shares of height (first, last) and width (first, last) of the whole image: Garg et al., arXiv 1603.04992, and Eigen et al.,
# arXiv 1406.2283, as papers on KITTI evaluate.
_CROPS = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
_GET = (
    "unpack the raw data (2011_09_26, ...) and data_depth_annotated.zip of https://www.cvlibs.net/datasets/kitti into root, and "
    "copy eigen_train_files_with_gt.txt and eigen_test_files_with_gt.txt of https://github.com/cleinc/bts there"
)


@register_data_set("kitti")
class Kitti(FileDataset):
    """KITTI, Eigen's split: street images of about 375x1242 with sparse depth up to 80 m.

    Reads the list ``eigen_{train,test}_files_with_gt.txt`` of BTS in ``root`` or ``root/train_test_inputs``, the images it
    names below ``root`` (or ``raw``, ``kitti_raw``), and depth as 16-bit PNG in 1/256 m below ``data_depth_annotated`` (or its
    ``train`` and ``val``). Images whose line has no depth (``None``) are left out and counted.

    Args:
        split: ``train`` (23,158 images) or ``test`` (697, of which 652 have depth).
        root: the folder that holds these.
        list_file: another list of lines ``image depth [focal length]``, relative to ``root``.
        kb_crop: cut images and depth to the lower middle 352x1216, as the KITTI benchmark does.
        crop: where a test's depth counts: ``garg``, ``eigen`` or ``none``, of the whole image.
        cache: decode every file once, when the data set is built, and keep it in memory.

    Raises:
        ConfigError: there is no such split or crop.
        DataError: a list, folder or file is missing.

    Example:
        ::

            train: {name: kitti, split: train, root: /data/kitti, kb_crop: true, list_file: lists/quarter.txt}
            val: {name: kitti, split: test, root: /data/kitti, crop: garg, cache: false}
    """

    def __init__(
        self,
        split: str,
        *,
        root: str,
        list_file: str | None = None,
        kb_crop: bool = True,
        crop: Literal["garg", "eigen", "none"] = "garg",
        cache: bool = False,
        transforms: Transforms | None = None,
    ) -> None:
        check_split("KITTI", split, PUBLISHED)
        if crop not in (*_CROPS, "none"):
            raise ConfigError(f"crop={crop!r} is not known; use {', '.join(_CROPS)} or none")
        self.split, self.kb_crop, self.crop = split, kb_crop, crop
        annotated = "data_depth_annotated"
        items, notes = listed(
            "KITTI", split, root, list_file, f"eigen_{split}_files_with_gt.txt", images=(".", "raw", "kitti_raw"),
            depths=(annotated, f"{annotated}/train", f"{annotated}/val"), published=PUBLISHED, get=_GET,
        )  # fmt: skip
        info = DataInfo(0, (), (), depth=True, max_depth=MAX_DEPTH)
        super().__init__(items, info, depths=DepthReader(1 / 256), cache=cache, transforms=transforms)
        self.notes = notes

    def prepare(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves a test's depth inside the crop alone, then cuts image and depth as the benchmark does.

        Raises:
            DataError: an image is smaller than 352x1216.
        """
        height, width = next(tuple(value.shape[-2:]) for value in parts.values())
        if self.split == "test" and self.crop != "none" and "depth" in parts:
            top, bottom, left, right = _CROPS[self.crop]
            inside = torch.zeros_like(parts["depth"])
            window = (slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width)))
            inside[window] = parts["depth"][window]
            parts["depth"] = inside
        if not self.kb_crop:
            return parts
        if height < _KB[0] or width < _KB[1]:
            raise DataError(
                f"KITTI: a file is {height}x{width}, smaller than 352x1216; unpack it again, or set kb_crop: false"
            )
        left_margin = int((width - _KB[1]) / 2)
        window = (slice(height - _KB[0], height), slice(left_margin, left_margin + _KB[1]))
        return {key: value[(..., *window)].contiguous() for key, value in parts.items()}
