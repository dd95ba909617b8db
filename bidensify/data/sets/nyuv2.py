"""NYU Depth v2 (Silberman et al., ECCV 2012): indoor depth in metres, from the files of BTS or the labelled .mat."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bidensify.data.base import DataInfo, Transforms
from bidensify.data.filedata import FileDataset, Files
from bidensify.data.readers import DepthReader
from bidensify.data.registry import register_data_set
from bidensify.data.sets.places import check_split, listed, locate
from bidensify.errors import ConfigError, DataError, MissingExtraError

PUBLISHED = {"train": 24231, "test": 654}
LABELLED = {"train": 795, "test": 654}
MAX_DEPTH = 10.0
_MAT = "nyu_depth_v2_labeled.mat"
_FOLDERS = {"train": ("sync", "."), "test": ("official_splits/test", ".")}
# Rows and columns. The frame that registration leaves white is cut off in training (BTS, arXiv 1907.10326); a test's
# depth counts inside Eigen's crop (arXiv 1406.2283).
_FRAME = (slice(45, 472), slice(43, 608))
_EIGEN = (slice(45, 471), slice(41, 601))
_BLACK = (slice(7, 474), slice(7, 632))
_GET = (
    "follow https://github.com/cleinc/bts: unpack sync.zip, extract official_splits, copy nyudepthv2_train_files_with_gt.txt and "
    "nyudepthv2_test_files_with_gt.txt beside them; or put nyu_depth_v2_labeled.mat and splits.mat of "
    "http://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2 into root"
)


@register_data_set("nyuv2")
class NyuV2(FileDataset):
    """NYU Depth v2: indoor images of 480x640 with depth up to 10 m.

    Reads the files that BTS prepares: the list ``nyudepthv2_{train,test}_files_with_gt.txt`` in ``root`` or
    ``root/train_test_inputs``, and the files it names below ``sync`` (training) and ``official_splits/test``, depth as
    16-bit PNG in millimetres. Where there is no list but the labelled ``nyu_depth_v2_labeled.mat`` with ``splits.mat``,
    its 795 and 654 images (raw depth, not the filled one; needs h5py and scipy).

    Args:
        split: ``train`` (24,231 images; 795 of the .mat) or ``test`` (654).
        root: the folder that holds these.
        list_file: another list of lines ``image depth [focal length]``, relative to ``root``.
        border: in training, cut off the white frame (rows 45 to 471, columns 43 to 607 stay).
        crop: where a test's depth counts: ``eigen`` (rows 45 to 470, columns 41 to 600) or ``none``.
        cache: decode every file once, when the data set is built, and keep it in memory.

    Raises:
        ConfigError: there is no such split or crop.
        DataError: a list, folder or file is missing.
        MissingExtraError: the .mat needs h5py and scipy.

    Example:
        ::

            train: {name: nyuv2, split: train, root: /data/nyu_depth_v2, border: true, list_file: lists/half.txt}
            val: {name: nyuv2, split: test, root: /data/nyu_depth_v2, crop: eigen, cache: true}
    """

    def __init__(
        self,
        split: str,
        *,
        root: str,
        list_file: str | None = None,
        border: bool = True,
        crop: Literal["eigen", "none"] = "eigen",
        cache: bool = False,
        transforms: Transforms | None = None,
    ) -> None:
        check_split("NYU Depth v2", split, PUBLISHED)
        if crop not in ("eigen", "none"):
            raise ConfigError(f"crop={crop!r} is not known; use eigen or none")
        self.split, self.border, self.crop = split, border, crop
        self.mat = _mat(root) if list_file is None else None
        self._open: tuple[int, Any] | None = None
        info = DataInfo(0, (), (), depth=True, max_depth=MAX_DEPTH)
        if self.mat is not None:
            items, notes = _labelled(self.mat, split), tuple[str, ...]()
        else:
            name = f"nyudepthv2_{split}_files_with_gt.txt"
            items, notes = listed(
                "NYU Depth v2", split, root, list_file, name, images=_FOLDERS[split], depths=_FOLDERS[split],
                published=PUBLISHED, get=_GET,
            )  # fmt: skip
        super().__init__(items, info, depths=DepthReader(0.001), cache=cache, transforms=transforms)
        self.notes = notes

    def prepare(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cuts the frame off in training; leaves depth inside Eigen's crop alone in a test.

        Raises:
            DataError: a file is not 480x640.
        """
        size = next(tuple(value.shape[-2:]) for value in parts.values())
        if size != (480, 640):
            raise DataError(f"NYU Depth v2: a file is {size[0]}x{size[1]}, the data set's are 480x640; unpack it again")
        if self.split == "train" and self.border:
            return {key: value[(..., *_FRAME)].contiguous() for key, value in parts.items()}
        if self.split == "test" and self.crop == "eigen" and "depth" in parts:
            inside = torch.zeros_like(parts["depth"])
            inside[_EIGEN] = parts["depth"][_EIGEN]
            parts["depth"] = inside
        return parts

    # The .mat: items name it and the number of the sample in it.

    def image_of(self, index: int) -> Tensor:
        """Returns the image of sample ``index``, (3, 480, 640)."""
        if self.mat is None:
            return super().image_of(index)
        image = torch.from_numpy(self._read_mat("images", index)).transpose(1, 2)
        black = torch.zeros_like(image)
        black[(..., *_BLACK)] = image[(..., *_BLACK)]  # as BTS extracts it
        return black.contiguous()

    def size_of(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of the image of sample ``index``."""
        return super().size_of(index) if self.mat is None else (480, 640)

    def labels_of(self, index: int, size: tuple[int, int], *, check: bool = True) -> dict[str, Tensor]:
        """Returns the depth of sample ``index``."""
        if self.mat is None:
            return super().labels_of(index, size, check=check)
        depth = torch.from_numpy(self._read_mat("rawDepths", index).astype(np.float32)).T
        return {"depth": torch.where(torch.isfinite(depth) & (depth > 0), depth, 0).contiguous()}

    def _read_mat(self, name: str, index: int) -> Any:
        import h5py

        # A handle of HDF5 is of one process: workers open the file anew.
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), h5py.File(self.mat, "r"))
        try:
            return self._open[1][name][int(self.items[index].name)]
        except (KeyError, OSError) as error:
            raise DataError(
                f"{str(self.mat)!r}: {name} of sample {self.items[index].name} cannot be read ({error})"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


def _mat(root: str) -> Path | None:
    base = Path(root).expanduser()
    lists = list(base.glob("nyudepthv2_*_files_with_gt.txt")) + list(base.glob("train_test_inputs/nyudepthv2_*.txt"))
    return base / _MAT if not lists and (base / _MAT).is_file() else None


def _labelled(mat: Path, split: str) -> list[Files]:
    try:
        import h5py
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingExtraError(f"{str(mat)!r} needs h5py and scipy; pip install 'bidensify[data]'") from error
    locate("NYU Depth v2", str(mat.parent), [], [_MAT, "splits.mat"], _GET)
    try:
        numbers = loadmat(mat.with_name("splits.mat"))[f"{split}Ndxs"].ravel()
        with h5py.File(mat, "r") as file:
            shapes = {name: tuple(file[name].shape) for name in ("images", "rawDepths")}
    except Exception as error:  # both libraries tell damage by a dozen classes
        raise DataError(f"{str(mat)!r} or splits.mat beside it is damaged ({error}); fetch them again") from error
    count = shapes["images"][0]
    wanted = {"images": (count, 3, 640, 480), "rawDepths": (count, 640, 480)}
    if shapes != wanted or not 1 <= numbers.min() <= numbers.max() <= count:
        raise DataError(
            f"{str(mat)!r} holds {shapes}, splits.mat numbers up to {numbers.max()}; the arrays are {wanted} and the numbers "
            "within them. Fetch both again"
        )
    return [Files(str(number - 1), mat) for number in sorted(map(int, numbers))]
