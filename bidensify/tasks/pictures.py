"""Colour pictures of masks and depth maps for reports."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bidensify.data.base import Colour, default_palette
from bidensify.errors import ConfigError

__all__ = [
    "Colour",
    "colour_depth",
    "colour_labels",
    "colour_mask",
    "colours",
    "default_palette",
    "depth_limits",
    "finish",
]


def colours(classes: int, palette: Sequence[Sequence[int]] | None) -> tuple[Colour, ...]:
    """Returns the palette as tuples, or a default one."""
    return default_palette(classes) if palette is None else tuple((c[0], c[1], c[2]) for c in palette)


def colour_labels(labels: Tensor, palette: Sequence[Colour]) -> Tensor:
    """Colours labels of which several may hold: (C, H, W) of 0 and 1 to uint8 (3, H, W), the mean of their colours."""
    there = (labels.detach().cpu() == 1).float()
    mixed = torch.einsum("chw,cr->rhw", there, torch.tensor([list(colour) for colour in palette], dtype=torch.float32))
    return (mixed / there.sum(0).clamp(min=1)).round().to(torch.uint8)


def colour_mask(mask: Tensor, palette: Sequence[Colour], ignore_index: int) -> Tensor:
    """Colours class indices: (H, W) integers to uint8 (3, H, W); ignored pixels are black."""
    table = torch.zeros(len(palette) + 1, 3, dtype=torch.uint8)
    table[:-1] = torch.tensor([list(colour) for colour in palette], dtype=torch.uint8)
    index = mask.detach().to("cpu", torch.int64)
    index = torch.where(index == ignore_index, torch.full_like(index, len(palette)), index)
    return table[index].permute(2, 0, 1).contiguous()


@functools.cache
def _colour_table(name: str) -> Tensor:
    from matplotlib import colormaps  # only reports need it, and it is slow to import

    colours = [colormaps[name](step / 255)[:3] for step in range(256)]
    return (torch.tensor(colours) * 255).round().to(torch.uint8)


def colour_depth(depth: Tensor, *, limits: tuple[float, float] | None = None, colours: str = "magma_r") -> Tensor:
    """Colours a depth map on a logarithmic scale: (H, W) to uint8 (3, H, W); invalid pixels (≤ 0, NaN, ∞) are black.

    Args:
        depth: (H, W).
        limits: nearest and farthest depth of the colour scale; by default the map's own 2nd and 98th percentile. Give
            the ground truth's to compare a prediction with it.
        colours: a matplotlib colour map.
    """
    depth = depth.detach().to("cpu", torch.float32)
    valid = torch.isfinite(depth) & (depth > 0)
    if not valid.any():
        return torch.zeros(3, *depth.shape, dtype=torch.uint8)
    low, high = limits if limits is not None else depth_limits(depth)
    span = max(torch.tensor(high / low).log().item(), 1e-6)
    position = torch.where(valid, depth, torch.full_like(depth, low)).div(low).log().div(span).clamp(0, 1)
    picture = _colour_table(colours)[(position * 255).round().long()].permute(2, 0, 1)
    return (picture * valid).contiguous()


def depth_limits(depth: Tensor) -> tuple[float, float]:
    """Returns the 2nd and 98th percentile of the valid depths, the default colour scale; (1, 1) if there is none."""
    values = depth.detach().to("cpu", torch.float32)
    values = values[torch.isfinite(values) & (values > 0)].sort().values
    if not len(values):
        return 1.0, 1.0
    last = len(values) - 1
    return float(values[round(0.02 * last)]), float(values[round(0.98 * last)])


def finish(picture: Tensor, image: Tensor | None, blend: float) -> Tensor:
    """Brings a colour picture to the image's size (nearest) and blends the image in.

    Args:
        picture: uint8 (3, H, W).
        image: (C, H', W'), uint8 or floats in [0, 1], or None; one or two channels show as grey, of more the first three.
        blend: share of the image, 0 to 1.

    Raises:
        ConfigError: the image is not (C, H, W), or was normalised.
    """
    if image is None:
        return picture
    floats = image.is_floating_point()
    if image.ndim != 3 or (
        blend > 0 and not (image.dtype == torch.uint8 or (floats and 0 <= image.min() <= image.max() <= 1))
    ):
        raise ConfigError(
            f"the picture's image has shape {tuple(image.shape)} and type {image.dtype}; give (C, H, W), uint8 or floats in "
            "[0, 1], before normalisation"
        )
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    image = image * 255 if floats else image
    if picture.shape[-2:] != image.shape[-2:]:
        size = (image.shape[-2], image.shape[-1])
        picture = F.interpolate(picture[None].float(), size=size, mode="nearest-exact")[0].to(torch.uint8)
    if blend > 0:
        mixed = picture.float() * (1 - blend) + image.detach().cpu().float() * blend
        picture = mixed.round().to(torch.uint8)
    return picture
