"""``scenes``: generated images with semantic labels and metric depth; nothing to download.

A scene has a ground, a sky, walls, and objects that a light makes cast shadows. An object's class is its shape **and** its
texture: ball (ellipsoid with spots), melon (ellipsoid with stripes), crate (box with stripes), die (box with spots), pylon
(truncated cone, either). Grounds and walls wear the same textures, and every surface draws its colours from one distribution,
so that neither a colour nor a texture tells the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from bidensify.data.base import DataInfo, DenseDataset, Depth, Sample, Transforms
from bidensify.data.registry import register_data_set
from bidensify.data.scenes.layout import CLASS_NAMES, MAX_DEPTH, PALETTE, draw_layout
from bidensify.data.scenes.render import Rendered, render
from bidensify.errors import ConfigError

SPLITS = ("train", "val", "test")


def generate(seed: int, split: str, index: int, size: tuple[int, int]) -> Rendered:
    """Generates one scene, a function of its arguments alone.

    Returns:
        image uint8 (H, W, 3); mask uint8 (H, W); depth float32 (H, W) in metres, 0 = none.
    """
    random = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), index]))
    height, width = size
    return render(random, draw_layout(random, height / width), height, width)


def _scene(seed: int, split: str, index: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    image, mask, depth = generate(seed, split, index, size)
    return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask), torch.from_numpy(depth)


@lru_cache(maxsize=2)
def _cached(seed: int, split: str, length: int, size: tuple[int, int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The scenes of the last two data sets that asked to keep them: teacher and students of one job draw them once."""
    return [_scene(seed, split, index, size) for index in range(length)]


@register_data_set("scenes")
class Scenes(DenseDataset):
    """Generated scenes: 8 classes and depth up to 40 m; nothing to download.

    Args:
        split: ``train``, ``val`` or ``test``; each draws from a random stream of its own.
        size: (height, width), each at least 16.
        length: number of scenes.
        seed: at least 0; another seed gives other scenes.
        cache: generate every scene once, when the data set is built, and keep it in memory.

    Raises:
        ConfigError: an option is out of range.

    Example:
        ::

            train: {name: scenes, split: train, size: [96, 128], length: 2000, seed: 0, cache: true}
    """

    def __init__(
        self,
        split: str,
        *,
        size: Sequence[int] = (96, 128),
        length: int = 1000,
        seed: int = 0,
        cache: bool = False,
        transforms: Transforms | None = None,
    ) -> None:
        super().__init__(transforms)
        if split not in SPLITS:
            raise ConfigError(f"split={split!r}; the splits of scenes are {', '.join(SPLITS)}")
        if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(n, int) and n >= 16 for n in size):
            raise ConfigError(f"size={size!r}; give (height, width), two whole numbers of at least 16")
        if not isinstance(length, int) or length < 1:
            raise ConfigError(f"length={length!r}; it is a number of scenes, at least 1")
        if not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed={seed!r}; it is a whole number of at least 0")
        self.split, self.size, self.length, self.seed = split, (int(size[0]), int(size[1])), length, seed
        self.info = DataInfo(
            num_classes=len(CLASS_NAMES), class_names=CLASS_NAMES, palette=PALETTE, depth=True, max_depth=MAX_DEPTH
        )
        self._cache: list[tuple[Tensor, Tensor, Tensor]] | None = None
        if cache:
            self._cache = _cached(seed, split, length, self.size)

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> Sample:
        """Returns scene ``index`` before the transforms: ``image``, ``mask`` and ``depth``."""
        image, mask, depth = (
            _scene(self.seed, self.split, index, self.size) if self._cache is None else self._cache[index]
        )
        return {
            "image": tv_tensors.Image(image.clone()),
            "mask": tv_tensors.Mask(mask.to(torch.int64)),
            "depth": Depth(depth.clone()),
        }
