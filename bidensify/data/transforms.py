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
from bidensify.errors import ConfigError

Size = tuple[int, int]


def build_transforms(
    train: bool,
    size: Size,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    hflip: bool = True,
    scale: tuple[float, float] = (0.5, 2.0),
    color_jitter: float = 0.3,
    *,
    ignore_index: int = 255,
    keep_target_size: bool = False,
) -> Transforms:
    """Builds the transforms of one split.

    Training: random scale and crop (:class:`RandomScaleCrop`), horizontal flip, colour jitter, normalisation.
    Evaluation: resize to ``size``, normalisation.

    Args:
        train: which of the two.
        size: (height, width) in pixels of what comes out.
        mean, std: one entry per channel, on images scaled to [0, 1].
        hflip: flip half of the training samples.
        scale: lowest and highest zoom of a training crop; at 1 it is as large as fits into the image.
        color_jitter: strength s: brightness, contrast and saturation vary by ±s, hue by ±s/8 of a turn; 0 = off.
        ignore_index: label where a crop reaches beyond its image.
        keep_target_size: in evaluation, leave mask and depth at their own size, so that metrics are taken there
            (they must then be of one size to be batched).

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
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ConfigError(f"scale={tuple(scale)}; give (lowest, highest) with 0 < lowest <= highest")
    steps: list[v2.Transform] = []
    if train:
        fill = [round(255 * value) for value in mean]
        steps.append(RandomScaleCrop(size, (scale[0], scale[1]), fill=fill, ignore_index=ignore_index))
        if hflip:
            steps.append(v2.RandomHorizontalFlip(0.5))
        if color_jitter > 0:
            s = color_jitter
            steps.append(v2.ColorJitter(brightness=s, contrast=s, saturation=s, hue=s / 8))
    else:
        steps.append(ResizeAll(size, keep_target_size=keep_target_size))
    steps += [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    steps += [v2.Normalize(list(mean), list(std)), v2.ToPureTensor()]
    composed: Transforms = v2.Compose(steps)
    return composed


class RandomScaleCrop(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Cuts a random window out of a sample and resizes it to ``size``; aspect ratio kept.

    The zoom is drawn log-uniformly from ``scale``; at zoom 1 the window is the largest with the aspect of ``size`` that
    fits into the image. Where a window reaches beyond the image, the image is filled with ``fill``, the mask with
    ``ignore_index``, the depth with 0. Depth is divided by the zoom: an object that fills twice the width is seen as from
    half the distance (Eigen et al., arXiv 1406.2283, section 3.4).
    """

    def __init__(self, size: Size, scale: tuple[float, float], *, fill: Sequence[int], ignore_index: int) -> None:
        super().__init__()
        self.size = _checked_size(size)
        self.scale = scale
        self.fill = list(fill)
        self.ignore_index = ignore_index

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
            fill: Any = self.fill
            if isinstance(inpt, tv_tensors.Mask):
                fill = 0 if isinstance(inpt, Depth) else self.ignore_index
            out = tv_tensors.wrap(tv.pad(out, params["padding"], fill=fill), like=inpt)
        return tv_tensors.wrap(out / params["zoom"], like=inpt) if isinstance(inpt, Depth) else out


class ResizeAll(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Resizes image, mask and depth map to ``size``; the aspect ratio follows."""

    def __init__(self, size: Size, *, keep_target_size: bool = False) -> None:
        super().__init__()
        self.size = _checked_size(size)
        self.keep_target_size = keep_target_size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes one of them."""
        if self.keep_target_size and isinstance(inpt, tv_tensors.Mask):
            return inpt
        return resize(inpt, self.size)


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
    """Undoes the normalisation: float (..., 3, H, W) to uint8, for pictures."""
    shape = (len(mean), 1, 1)
    scaled = image.detach().float() * image.new_tensor(list(std)).view(shape) + image.new_tensor(list(mean)).view(shape)
    return (scaled * 255).round().clamp(0, 255).to(torch.uint8)


__all__ = ["RandomScaleCrop", "ResizeAll", "build_transforms", "denormalise", "resize"]
