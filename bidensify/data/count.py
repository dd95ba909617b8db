"""What samples hold, added up."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Count:
    """What the samples of a data set hold, added up.

    Attributes:
        images: samples counted.
        sizes: {(height, width): images}.
        labels, holders: {label: pixels} and {label: images with it}.
        pixels: of all masks (times the classes where several labels may hold at once).
        depth_pixels, depth_valid: pixels of all depth maps, and those with a depth.
        depth_low, depth_high: nearest and farthest depth, metres.
        empty: depth maps without one valid pixel.
    """

    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    holders: Counter[int] = field(default_factory=Counter)
    pixels: int = 0
    depth_pixels: int = 0
    depth_valid: int = 0
    depth_low: float = float("inf")
    depth_high: float = 0.0
    empty: int = 0

    @classmethod
    def of(cls, size: tuple[int, int], parts: Mapping[str, Tensor]) -> Count:
        """Counts one sample: the image's (height, width), and ``mask`` and ``depth`` where they are (then theirs counts)."""
        size = next(
            ((int(p.shape[-2]), int(p.shape[-1])) for key, p in parts.items() if key in ("mask", "depth")), size
        )
        count = cls(images=1, sizes=Counter([size]))
        if "mask" in parts:
            mask = parts["mask"]
            if mask.ndim == 3:  # planes of 0 and 1
                pixels = dict(enumerate(mask.flatten(1).sum(1).tolist()))
            else:
                if mask.dtype == torch.uint8:  # counting is faster than sorting
                    numbers = torch.bincount(mask.flatten(), minlength=256)
                    values = torch.arange(256)
                else:
                    values, numbers = torch.unique(mask, return_counts=True)
                pixels = dict(zip(values.tolist(), numbers.tolist(), strict=True))
            count.labels = Counter({int(label): int(number) for label, number in pixels.items() if number})
            count.holders = Counter(list(count.labels))
            count.pixels = mask.numel()
        if "depth" in parts:
            depth = parts["depth"]
            valid = depth[depth > 0]
            count.depth_pixels, count.depth_valid, count.empty = depth.numel(), valid.numel(), int(not valid.numel())
            if valid.numel():
                count.depth_low, count.depth_high = float(valid.min()), float(valid.max())
        return count

    def add(self, other: Count) -> None:
        """Adds what another count holds."""
        for item in dataclasses.fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                ends: dict[str, Any] = {"depth_low": min, "depth_high": max}
                how = ends.get(item.name, operator.add)
                setattr(self, item.name, how(mine, theirs))

    def to_json(self) -> dict[str, Any]:
        """Returns what :meth:`from_json` reads."""
        return {k: list(v.items()) if isinstance(v, Counter) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Count:
        """Reads what :meth:`to_json` wrote."""
        values = dict(data)
        values["sizes"] = Counter({(int(h), int(w)): int(n) for (h, w), n in data["sizes"]})
        for name in ("labels", "holders"):
            values[name] = Counter({int(label): int(n) for label, n in data[name]})
        return cls(**values)
