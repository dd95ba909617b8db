"""The small interface behind which every data set stands."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from bidensify.data.count import Count
from bidensify.errors import ConfigError

Colour = tuple[int, int, int]
Sample = dict[str, Tensor]
Transforms = Callable[[Sample], Sample]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Depth(tv_tensors.Mask):  # type: ignore[misc]  # torchvision is untyped
    """A depth map, float32 (H, W), 0 = invalid; transforms move it like a mask, so values of two pixels never mix."""


@dataclass(frozen=True)
class DataInfo:
    """What a data set tells about itself.

    Attributes:
        num_classes: number of classes, 0 where there are no masks.
        class_names: one name per class.
        palette: one colour (r, g, b) per class.
        ignore_index: label of pixels that do not count.
        mean, std: per channel, on images scaled to [0, 1]; by default ImageNet's for 3 channels, its average for 1, and
            0.5 and 0.25 for any other number.
        depth: whether samples have a depth map.
        max_depth: upper end of the depth in metres, if it is known.
        channels: of the image; by default as many as ``mean`` has entries, or 3.
        image_max: the value that counts as 1 in images of more than 8 bits, if it is not the type's usual one.
        multilabel: whether a mask has one plane of 0 and 1 per class, (C, H, W), instead of one class per pixel.

    Raises:
        ConfigError: mean, std and channels do not agree.
    """

    num_classes: int
    class_names: tuple[str, ...]
    palette: tuple[Colour, ...]
    ignore_index: int = 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    depth: bool = False
    max_depth: float | None = None
    channels: int = 0
    image_max: float | None = None
    multilabel: bool = False

    def __post_init__(self) -> None:
        channels = self.channels or len(self.mean) or len(self.std) or 3
        middle = {3: (IMAGENET_MEAN, IMAGENET_STD), 1: ((0.449,), (0.226,))}
        mean, std = middle.get(channels, ((0.5,) * channels, (0.25,) * channels))
        for name, value in (("channels", channels), ("mean", self.mean or mean), ("std", self.std or std)):
            object.__setattr__(self, name, value)
        if not len(self.mean) == len(self.std) == channels or min(self.std) <= 0:
            raise ConfigError(
                f"mean={list(self.mean)}, std={list(self.std)} for images of {channels} channels; give both one entry per "
                "channel, std above 0"
            )


class DenseDataset(Dataset[Sample]):
    """A data set of images with a mask, a depth map, or both.

    A sub-class gives ``info``, ``__len__`` and :meth:`load`. A sample is a dict of tv_tensors: ``image`` (C, H, W),
    uint8, or float32 in [0, 1]; ``mask`` int64 (H, W), or (classes, H, W) where several labels may hold at once;
    ``depth`` float32 (H, W) in metres with 0 = invalid; ``target`` (C, H, W) like the image, what restoration restores.
    ``transforms`` are applied last.

    Attributes:
        info: what the data set tells about itself.
        notes: what was found while the files were listed and should be told (samples left out, for example).
    """

    info: DataInfo
    notes: tuple[str, ...] = ()

    def __init__(self, transforms: Transforms | None = None) -> None:
        self.transforms = transforms

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> Sample:
        """Returns sample ``index`` (0 <= index < len) before the transforms, always the same."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """Returns what to call sample ``index`` in reports: a file's stem, or its number."""
        return str(index)

    def count(self, index: int) -> Count:
        """Counts what the labels of sample ``index`` hold, for :func:`bidensify.data.check_dataset`."""
        sample = self.load(index)
        image = sample["image"]
        return Count.of((int(image.shape[-2]), int(image.shape[-1])), sample)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)}")
        sample = self.load(int(index) % len(self))
        return sample if self.transforms is None else self.transforms(sample)


def default_palette(classes: int) -> tuple[Colour, ...]:
    """Returns ``classes`` well separated colours (golden-angle hues at three brightness levels)."""
    colours = []
    for index in range(classes):
        rgb = colorsys.hsv_to_rgb((index * 0.61803399) % 1.0, 0.55 + 0.3 * (index % 2), 0.95 - 0.2 * (index % 3))
        colours.append((round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)))
    return tuple(colours)
