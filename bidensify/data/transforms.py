"""Augmentation and evaluation transforms on torchvision.transforms.v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from bidensify.data.base import IMAGENET_MEAN, IMAGENET_STD, Depth, Transforms
from bidensify.data.fit import Fit, Normalize, Resize, Size, checked_size, resize
from bidensify.errors import ConfigError


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
    size = checked_size(size)
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
        self.size = checked_size(size)
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


def _place(source: int, window: int, out: int, draw: float) -> tuple[int, int, int, int]:
    """Places a window on one axis: returns (start, length) in the source and (start, length) in the output."""
    if window <= source:
        return min(int(draw * (source - window + 1)), source - window), window, 0, out
    length = min(out, max(1, round(source * out / window)))
    return 0, source, min(int(draw * (out - length + 1)), out - length), length


def _spatial(flat_inputs: list[Any]) -> Size:
    sizes = {(int(value.shape[-2]), int(value.shape[-1])) for value in flat_inputs}
    if len(sizes) != 1:
        raise ConfigError(f"the image, mask and depth of a sample have the sizes {sorted(sizes)}; they must agree")
    return sizes.pop()


def denormalise(image: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Undoes the normalisation: float (..., C, H, W) to uint8, for pictures."""
    shape = (len(mean), 1, 1)
    scaled = image.detach().float() * image.new_tensor(list(std)).view(shape) + image.new_tensor(list(mean)).view(shape)
    return (scaled * 255).round().clamp(0, 255).to(torch.uint8)


__all__ = ["RandomRotate", "RandomScaleCrop", "build_transforms", "denormalise"]
