"""Augmentation and evaluation transforms on torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from bidensify.data.base import IMAGENET_MEAN, IMAGENET_STD, Depth, Sample, Transforms
from bidensify.errors import ConfigError, DataError

Size = tuple[int, int]
Resize = Literal["letterbox", "pad", "native", "cover", "squash"]


def build_transforms(
    train: bool,
    size: Size,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    hflip: bool = True,
    scale: tuple[float, float] = (0.5, 2.0),
    color_jitter: float = 0.3,
    rotate: float = 0.0,
    *,
    ignore_index: int = 255,
    resize: Resize = "letterbox",
    multiple: int = 32,
) -> Transforms:
    """Builds the transforms of one split.

    Training: random rotation, scale and crop (:class:`RandomScaleCrop`), horizontal flip, colour jitter, normalisation.
    Random numbers come from PyTorch's global CPU generator, which :class:`bidensify.data.Seeded` seeds for each sample.
    Evaluation: :class:`Fit` and normalisation; masks and depth maps keep their own size.

    Args:
        train: which of the two.
        size: (height, width) in pixels of what comes out.
        mean, std: one entry per channel, on images scaled to [0, 1].
        hflip: flip half of the training samples.
        scale: lowest and highest zoom of a training crop; at 1 it is as large as fits into the image.
        color_jitter: strength s: brightness, contrast and saturation vary by ±s, hue by ±s/8 of a turn; 0 = off.
        rotate: turn training samples by up to so many degrees either way.
        ignore_index: label where a crop reaches beyond its image.
        resize: how an evaluation image comes to the network's size; see :class:`Fit`.
        multiple: with ``native`` and ``cover``, the network's input is a multiple of this, in pixels.

    Returns:
        A callable from a sample of tv_tensors to one of plain tensors: ``image`` float32, normalised.

    Raises:
        ConfigError: an option is out of range.
    """
    size = _checked_size(size)
    if len(mean) != len(std) or not mean or min(std) <= 0:
        raise ConfigError(f"mean={list(mean)}, std={list(std)}; give both one entry per channel, std above 0")
    if not 0 <= color_jitter < 1:
        raise ConfigError(f"color_jitter={color_jitter}; it lies in [0, 1)")
    if train and color_jitter and len(mean) not in (1, 3):
        raise ConfigError(
            f"color_jitter={color_jitter} for images of {len(mean)} channels; it needs 1 or 3, so set it to 0"
        )
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ConfigError(f"scale={tuple(scale)}; give (lowest, highest) with 0 < lowest <= highest")
    if not 0 <= rotate <= 180:
        raise ConfigError(f"rotate={rotate}; give the largest angle in degrees, 0 to 180")
    if not train:
        return Fit(size, mean, std, resize=resize, multiple=multiple)
    steps: list[Any] = []
    if rotate > 0:
        steps.append(RandomRotate(rotate, fill=mean, ignore_index=ignore_index))
    steps.append(RandomScaleCrop(size, (scale[0], scale[1]), fill=mean, ignore_index=ignore_index))
    if hflip:
        steps.append(v2.RandomHorizontalFlip(0.5))
    if color_jitter > 0:
        s = color_jitter
        steps.append(v2.ColorJitter(brightness=s, contrast=s, saturation=s, hue=s / 8))
    composed: Transforms = v2.Compose([*steps, Normalize(mean, std)])
    return composed


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
        self.size = _checked_size(size)
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


class _Filling(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """A transform that fills what lies beyond an image: with ``fill``, in a mask ``ignore_index``, in a depth map 0."""

    def __init__(self, fill: Sequence[float], ignore_index: int) -> None:
        super().__init__()
        self.fill, self.ignore_index = list(fill), ignore_index

    def filling(self, inpt: Any) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return 0 if isinstance(inpt, Depth) else self.ignore_index
        return self.fill if inpt.is_floating_point() else [round(255 * value) for value in self.fill]


class RandomRotate(_Filling):
    """Turns a sample about its centre by an angle drawn evenly from ±``degrees``; the size stays."""

    def __init__(self, degrees: float, *, fill: Sequence[float], ignore_index: int) -> None:
        super().__init__(fill, ignore_index)
        self.degrees = degrees

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the angle."""
        return {"angle": self.degrees * (2 * float(torch.rand((), dtype=torch.float64)) - 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Turns an image (bilinear), a mask or a depth map (nearest)."""
        bilinear = v2.InterpolationMode.BILINEAR
        turned = tv.rotate(inpt, params["angle"], interpolation=bilinear, fill=self.filling(inpt))
        return tv_tensors.wrap(turned, like=inpt)


class RandomScaleCrop(_Filling):
    """Cuts a random window out of a sample and resizes it to ``size``; aspect ratio kept.

    The zoom is drawn log-uniformly from ``scale``; at zoom 1 the window is the largest with the aspect of ``size`` that
    fits into the image. Where a window reaches beyond the image, the image is filled with ``fill`` (on [0, 1]), the mask
    with ``ignore_index``, the depth with 0. Depth is divided by the zoom: an object that fills twice the width is seen as
    from half the distance (Eigen et al., arXiv 1406.2283, section 3.4).
    """

    def __init__(self, size: Size, scale: tuple[float, float], *, fill: Sequence[float], ignore_index: int) -> None:
        super().__init__(fill, ignore_index)
        self.size = _checked_size(size)
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the zoom and the window."""
        height, width = _spatial(flat_inputs)
        low, high = self.scale
        draws = torch.rand(3, dtype=torch.float64).tolist()
        zoom = low * (high / low) ** draws[0]
        base = max(self.size[0] / height, self.size[1] / width)
        factor = base * zoom
        window = (max(1, round(self.size[0] / factor)), max(1, round(self.size[1] / factor)))
        top, rows, out_top, out_rows = _place(height, window[0], self.size[0], draws[1])
        left, columns, out_left, out_columns = _place(width, window[1], self.size[1], draws[2])
        padding = [out_left, out_top, self.size[1] - out_left - out_columns, self.size[0] - out_top - out_rows]
        return {
            "crop": (top, left, rows, columns),
            "inner": (out_rows, out_columns),
            "padding": padding,
            # Not the resize factor: evaluation resizes to the same size and leaves the depth as it is.
            "zoom": factor / base,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Applies the drawn window to an image, a mask or a depth map."""
        out = resize(tv.crop(inpt, *params["crop"]), params["inner"])
        if any(params["padding"]):
            out = tv_tensors.wrap(tv.pad(out, params["padding"], fill=self.filling(inpt)), like=inpt)
        return tv_tensors.wrap(out / params["zoom"], like=inpt) if isinstance(inpt, Depth) else out


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


def _place(source: int, window: int, out: int, draw: float) -> tuple[int, int, int, int]:
    """Places a window on one axis: returns (start, length) in the source and (start, length) in the output."""
    if window <= source:
        return min(int(draw * (source - window + 1)), source - window), window, 0, out
    length = min(out, max(1, round(source * out / window)))
    return 0, source, min(int(draw * (out - length + 1)), out - length), length


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _spatial(flat_inputs: list[Any]) -> Size:
    sizes = {(int(value.shape[-2]), int(value.shape[-1])) for value in flat_inputs}
    if len(sizes) != 1:
        raise ConfigError(f"the image, mask and depth of a sample have the sizes {sorted(sizes)}; they must agree")
    return sizes.pop()


def _checked_size(size: Sequence[int]) -> Size:
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ConfigError(f"size={size!r}; give (height, width), two whole numbers above 0")
    return int(size[0]), int(size[1])


def denormalise(image: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Undoes the normalisation: float (..., C, H, W) to uint8, for pictures."""
    shape = (len(mean), 1, 1)
    scaled = image.detach().float() * image.new_tensor(list(std)).view(shape) + image.new_tensor(list(mean)).view(shape)
    return (scaled * 255).round().clamp(0, 255).to(torch.uint8)


__all__ = ["Fit", "RandomRotate", "RandomScaleCrop", "build_transforms", "denormalise", "resize"]
