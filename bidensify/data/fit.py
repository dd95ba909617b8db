"""How an image comes to the network's size and numbers: resizing to pixel centres, padding, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from bidensify.data.base import Sample
from bidensify.errors import ConfigError, DataError

__all__ = ["Fit", "Normalize", "Resize", "Size", "checked_size", "resize"]

Size = tuple[int, int]
Resize = Literal["letterbox", "pad", "native", "cover", "squash"]


class Normalize:
    """Ends a chain of transforms: ``image`` becomes float32 and normalised, ``target`` float32 in [0, 1], all plain."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = list(mean), list(std)

    def __call__(self, sample: Sample) -> Sample:
        """Returns the sample as plain tensors.

        Raises:
            DataError: the image has not as many channels as ``mean``.
        """
        out = {}
        for key, value in sample.items():
            plain = value.as_subclass(Tensor)
            if isinstance(value, tv_tensors.Image):
                plain = tv.to_dtype(plain, torch.float32, scale=True)
            out[key] = plain
        if out["image"].shape[0] != len(self.mean):
            raise DataError(
                f"an image has {out['image'].shape[0]} channels, mean and std have {len(self.mean)} entries; give the data "
                "set's channels, and mean and std one entry for each"
            )
        out["image"] = tv.normalize(out["image"], self.mean, self.std)
        return out


class Fit:
    """Brings an evaluation image to the network's size, normalises it, and notes where in the input it lies.

    The sample gains ``extent``, int64 (4,): the height and width that the image takes at the upper left of the input, and
    the input's own height and width. With it a prediction is brought back to the image's size
    (:func:`bidensify.tasks.restore`). Mask, depth and target stay as they are.

    Args:
        size: (height, width) in pixels.
        mean, std: one entry per channel, on images scaled to [0, 1].
        resize: ``letterbox``: as large as fits into ``size``, aspect ratio kept, the rest padded. ``pad``: at its own
            size, padded to ``size``. ``native``: at its own size, padded to a multiple of ``multiple``. ``cover``: as small
            as covers ``size``, aspect ratio kept, padded to a multiple of ``multiple``. ``squash``: stretched to ``size``.
            Padding lies at the right and at the bottom and has the mean colour.
        multiple: of ``native`` and ``cover``, pixels.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(
        self, size: Size, mean: Sequence[float], std: Sequence[float], *, resize: Resize, multiple: int = 32
    ) -> None:
        self.size = checked_size(size)
        if resize not in get_args(Resize):
            raise ConfigError(f"resize={resize!r} is not known; use one of {', '.join(get_args(Resize))}")
        if not isinstance(multiple, int) or multiple < 1:
            raise ConfigError(f"multiple={multiple!r}; it is a number of pixels, at least 1")
        self.normalize = Normalize(mean, std)
        self.resize, self.multiple = resize, multiple

    def sizes(self, height: int, width: int) -> tuple[Size, Size]:
        """Returns the size that an image takes, and the network's input, for an image of (height, width).

        Raises:
            DataError: with ``pad``, the image is larger than ``size``.
        """
        if self.resize == "squash":
            return self.size, self.size
        if self.resize == "native":
            return (height, width), (_up(height, self.multiple), _up(width, self.multiple))
        if self.resize == "cover":
            factor = max(self.size[0] / height, self.size[1] / width)
            inner = (max(self.size[0], round(height * factor)), max(self.size[1], round(width * factor)))
            return inner, (_up(inner[0], self.multiple), _up(inner[1], self.multiple))
        if self.resize == "letterbox":
            factor = min(self.size[0] / height, self.size[1] / width)
            inner = (min(self.size[0], round(height * factor)), min(self.size[1], round(width * factor)))
            return (max(1, inner[0]), max(1, inner[1])), self.size
        if height > self.size[0] or width > self.size[1]:
            raise DataError(
                f"an image is {height}x{width}, larger than the size {self.size[0]}x{self.size[1]} that it would be padded "
                "to; use resize: letterbox or native, or a larger size"
            )
        return (height, width), self.size

    def __call__(self, sample: Sample) -> Sample:
        """Returns the sample as plain tensors, with ``extent``."""
        image = sample["image"]
        inner, outer = self.sizes(int(image.shape[-2]), int(image.shape[-1]))
        out = self.normalize({**sample, "image": resize(image, inner)})
        out["image"] = F.pad(out["image"], (0, outer[1] - inner[1], 0, outer[0] - inner[0]))
        out["extent"] = torch.tensor([*inner, *outer])
        return out


def resize(values: Tensor, size: Size) -> Tensor:
    """Resizes an image bilinearly with antialiasing; a mask or depth map to the nearest pixel centre."""
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    if isinstance(values, tv_tensors.Mask):
        # torchvision's own mask kernel takes "nearest", which is off by up to half a source pixel from the image's grid.
        rows = _nearest(values.shape[-2], size[0])
        columns = _nearest(values.shape[-1], size[1])
        wrapped: Tensor = tv_tensors.wrap(values.as_subclass(Tensor)[..., rows[:, None], columns], like=values)
        return wrapped
    resized: Tensor = tv.resize(values, list(size), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
    return resized


def _nearest(source: int, target: int) -> Tensor:
    return ((torch.arange(target, dtype=torch.float64) + 0.5) * (source / target)).long().clamp_(max=source - 1)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def checked_size(size: Sequence[int]) -> Size:
    """``size`` as (height, width), or a ConfigError."""
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ConfigError(f"size={size!r}; give (height, width), two whole numbers above 0")
    return int(size[0]), int(size[1])
