"""Several looks at an image for one prediction: sliding windows, mirror images, other scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bidensify.errors import ConfigError

__all__ = ["Views"]


@dataclass(frozen=True)
class Views:
    """How often and where a network looks at an image before its prediction is read.

    Looks are averaged pixel by pixel: probabilities where channels are scores of classes or labels, the network's own values
    where they are values. One look alone (a window that covers the image, no mirror, scale 1) is the network's output as it
    came, so it gives the very figures of evaluation without windows.

    Args:
        window: (height, width) of a sliding window in pixels of the network's input; None: the whole input.
        stride: of the window; two thirds of it where it is not given. The last window of an axis ends with the image.
        flip: look at the mirror image (left and right exchanged) too.
        scales: of the input; each is rounded up to a multiple of ``multiple`` pixels.
        multiple: of a scaled input, pixels.

    Raises:
        ConfigError: an option is out of range.
    """

    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    multiple: int = 32

    def __post_init__(self) -> None:
        if self.stride is not None and self.window is None:
            raise ConfigError(
                f"evaluate.stride={list(self.stride)} without evaluate.window; give the window that it moves"
            )
        if self.window is not None and self.stride is not None:
            for axis, side, step in zip(("height", "width"), self.window, self.stride, strict=True):
                if not 0 < step <= side:
                    raise ConfigError(
                        f"evaluate.stride={list(self.stride)}, evaluate.window={list(self.window)}: the stride's {axis} lies "
                        "between 1 and the window's, or pixels between two windows would have no prediction"
                    )
        if not self.scales or min(self.scales) <= 0 or len(set(self.scales)) < len(self.scales):
            raise ConfigError(
                f"evaluate.scales={list(self.scales)}; give different numbers above 0, for example [0.75, 1, 1.25]"
            )

    def check(self, task: Any) -> None:
        """Raises ConfigError where a task's predictions cannot be averaged so."""
        name = getattr(task, "name", type(task).__name__)
        if self.flip and name == "flow":
            raise ConfigError(
                "evaluate.flip: a flow points elsewhere in the mirror image; leave it out for the task 'flow'"
            )
        if self.scales != (1.0,) and name in ("depth", "flow"):
            raise ConfigError(
                f"evaluate.scales={list(self.scales)}: an enlarged image shows other depths and other motions, so predictions "
                f"of the task {name!r} are not to be averaged over scales; leave it out"
            )

    def __call__(self, model: Callable[[Tensor], Any], task: Any, image: Tensor) -> Any:
        """Runs ``model`` on a batch.

        Args:
            model: the network, in eval mode.
            task: reads its outputs.
            image: (N, C, H, W), as evaluation gives it to the network.

        Returns:
            The network's output where one look is all there is, else the mean as a raw prediction (N, channels, H, W).

        Raises:
            ConfigError: as :meth:`check`.
        """
        self.check(task)
        size = (int(image.shape[-2]), int(image.shape[-1]))
        looks = [
            (_scaled(image, self._size(size, scale)), mirrored)
            for scale in self.scales
            for mirrored in ((False, True) if self.flip else (False,))
        ]
        places = [list(self._places((int(look.shape[-2]), int(look.shape[-1])))) for look, _ in looks]
        if len(looks) == 1 and len(places[0]) == 1:
            return model(looks[0][0])
        mean: Tensor | None = None
        for (look, mirrored), windows in zip(looks, places, strict=True):
            found = self._look(model, task, look.flip(-1) if mirrored else look, windows)
            found = found.flip(-1) if mirrored else found
            found = (
                F.interpolate(found, size, mode="bilinear", align_corners=False) if found.shape[-2:] != size else found
            )
            mean = found if mean is None else mean + found
        assert mean is not None
        return _as_raw(mean / len(looks), task)

    def _size(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        if scale == 1:
            return size
        up = [max(1, math.ceil(round(side * scale, 6) / self.multiple)) * self.multiple for side in size]
        return up[0], up[1]

    def _places(self, size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
        """The windows that cover an image of ``size``; windows are never larger than it."""
        window = self.window or size
        stride = self.stride or tuple(max(1, side * 2 // 3) for side in window)
        starts = [_starts(length, side, step) for length, side, step in zip(size, window, stride, strict=True)]
        for top in starts[0]:
            for left in starts[1]:
                yield slice(top, min(size[0], top + window[0])), slice(left, min(size[1], left + window[1]))

    def _look(
        self, model: Callable[[Tensor], Any], task: Any, image: Tensor, windows: Sequence[tuple[slice, slice]]
    ) -> Tensor:
        """The mean over windows, as what is averaged, (N, channels, H, W)."""
        total: Tensor | None = None
        count = image.new_zeros(1, 1, *image.shape[-2:])
        for rows, columns in windows:
            part = image[..., rows, columns]
            raw: Tensor = task.logits(model(part), (int(part.shape[-2]), int(part.shape[-1])))
            if total is None:
                total = raw.new_zeros(len(raw), raw.shape[1], *image.shape[-2:])
            total[..., rows, columns] += _as_mean(raw, task)
            count[..., rows, columns] += 1
        assert total is not None
        return total / count


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = max(0, length - window)
    return sorted({*range(0, last, stride), last})


def _scaled(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)


def _kind(task: Any) -> str:
    return str(getattr(task, "outputs", "values"))


def _as_mean(raw: Tensor, task: Any) -> Tensor:
    kind = _kind(task)
    return raw.softmax(1) if kind == "classes" else raw.sigmoid() if kind == "labels" else raw


def _as_raw(mean: Tensor, task: Any) -> Tensor:
    """The raw prediction whose probabilities are ``mean``, so that a task reads it as it reads a network's."""
    kind = _kind(task)
    tiny = torch.finfo(mean.dtype).tiny
    if kind == "classes":
        return mean.clamp(min=tiny).log()
    return mean.logit(eps=torch.finfo(mean.dtype).eps) if kind == "labels" else mean
