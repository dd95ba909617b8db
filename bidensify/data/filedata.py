"""What every data set of files has in common: reading, caching, sizes that agree, and what a survey counts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from bidensify.data import files
from bidensify.data.base import DataInfo, DenseDataset, Depth, Sample, Transforms
from bidensify.data.count import Count
from bidensify.data.readers import DepthReader, ImageReader, MaskReader
from bidensify.errors import DataError


class Files(NamedTuple):
    """The files of one sample."""

    name: str
    image: Path
    mask: Path | None = None
    depth: Path | None = None
    target: Path | None = None


class FileDataset(DenseDataset):
    """A data set whose samples are files.

    Args:
        items: the samples' files.
        info: what the data set tells about itself.
        masks, depths: read masks and depth maps, where the items have them.
        cache: decode every file once, when the data set is built, and keep it in memory.
        transforms: applied to each sample.
    """

    def __init__(
        self,
        items: Sequence[Files],
        info: DataInfo,
        *,
        masks: MaskReader | None = None,
        depths: DepthReader | None = None,
        cache: bool = False,
        transforms: Transforms | None = None,
    ) -> None:
        super().__init__(transforms)
        self.items, self.info = tuple(items), info
        self.images = ImageReader(info.channels, info.image_max)
        self.masks, self.depths = masks, depths
        self._cache: list[dict[str, Tensor]] | None = None
        if cache:
            with ThreadPoolExecutor(max_workers=4) as pool:
                self._cache = list(pool.map(self._read, range(len(self))))

    def __len__(self) -> int:
        return len(self.items)

    def name_of(self, index: int) -> str:
        """Returns the name of sample ``index``: its stem."""
        return self.items[index].name

    def files_of(self, index: int) -> list[Path]:
        """Returns the files that sample ``index`` is read from."""
        return [path for path in self.items[index][1:] if isinstance(path, Path)]

    def prepare(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Changes what was read, before the transforms; here nothing. Crops of a benchmark belong here.

        Args:
            parts: any of ``image`` (C, H, W), ``mask`` (..., H, W), ``depth`` (H, W), ``target`` (C, H, W).
        """
        return parts

    def load(self, index: int) -> Sample:
        """Returns sample ``index`` before the transforms.

        Raises:
            DataError: a file is missing, empty, truncated, of the wrong kind or size, or holds a label outside the
                classes; the message names the file.
        """
        if self._cache is None:
            parts = self._read(index)
        else:  # copies, so that nobody can write into the cache through a sample
            parts = {key: value.clone() for key, value in self._cache[index].items()}
        types = {"image": tv_tensors.Image, "mask": tv_tensors.Mask, "depth": Depth, "target": tv_tensors.Image}
        if "mask" in parts:
            parts["mask"] = parts["mask"].long()
        return {key: types[key](value) for key, value in parts.items()}

    def image_of(self, index: int) -> Tensor:
        """Returns the image of sample ``index``, (C, H, W)."""
        return self.images.tensor(self.items[index].image)

    def size_of(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of the image of sample ``index``; only its header is read."""
        return files.image_size(self.items[index].image, "image", self.info.channels)

    def labels_of(self, index: int, size: tuple[int, int], *, check: bool = True) -> dict[str, Tensor]:
        """Returns ``mask`` and ``depth`` of sample ``index``, as far as there are some.

        Args:
            index: of the sample.
            size: (height, width) of its image.
            check: refuse labels outside the classes.

        Raises:
            DataError: a file cannot be read, or is not of the image's size.
        """
        item, parts = self.items[index], dict[str, Tensor]()
        if item.mask is not None and self.masks is not None:
            labels = self.masks(item.mask) if check else self.masks.raw(item.mask)
            _same_size(item.mask, labels.shape, item.image, size)
            parts["mask"] = torch.from_numpy(labels.astype(_label_type(labels), copy=False))
        if item.depth is not None and self.depths is not None:
            parts["depth"] = torch.from_numpy(self.depths(item.depth))
            _same_size(item.depth, parts["depth"].shape, item.image, size)
        return parts

    def _read(self, index: int) -> dict[str, Tensor]:
        image, target = self.image_of(index), self.items[index].target
        size = (image.shape[1], image.shape[2])
        parts = {"image": image, **self.labels_of(index, size)}
        if target is not None:
            parts["target"] = self.images.tensor(target)
            _same_size(target, parts["target"].shape, self.items[index].image, size)
        return self.prepare(parts)

    def count(self, index: int) -> Count:
        """Counts what the labels of sample ``index`` hold; of the image only header and end are read.

        Raises:
            DataError: a file cannot be read or was cut off, or is not of the image's size. Labels outside the classes are
                counted.
        """
        size = self.size_of(index)
        for path in (self.items[index].image, self.items[index].target):
            if path is not None:
                files.check_whole(path, "image")
        return Count.of(size, self.prepare(self.labels_of(index, size, check=False)))


def _label_type(labels: files.Array) -> type[np.generic]:
    small = labels.size == 0 or (int(labels.min()) >= 0 and int(labels.max()) <= 255)
    return np.uint8 if small else np.int64


def _same_size(path: Path, shape: tuple[int, ...], image: Path, size: tuple[int, int]) -> None:
    """Raises DataError where a mask, depth map or target is not of its image's size."""
    if tuple(shape[-2:]) != tuple(size):
        turned = tuple(shape[-2:]) == (size[1], size[0])
        raise DataError(
            f"{str(path)!r} is {shape[-1]}x{shape[-2]} pixels but its image {str(image)!r} is {size[1]}x{size[0]}, both "
            f"upright{' (each as its EXIF orientation says)' if turned else ''}; they must agree. Resize the former with "
            "nearest-neighbour interpolation, or correct the pairing"
        )
