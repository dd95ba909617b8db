"""How much information a network's activations hold per channel, before and after its first binarization.

BiDense (arXiv 2411.10346), Figure 3: a binarizer whose threshold does not fit a channel's distribution gives that channel
one sign nearly everywhere, and with it no information.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bidensify.compare.results import Entropy
from bidensify.errors import PlanError
from bidensify.nn import binary_layers

__all__ = ["channel_entropy", "first_binarization"]

_LEVELS = 256


def channel_entropy(values: Tensor, levels: int = _LEVELS) -> Tensor:
    """Shannon entropy in bits of each channel, over all images and pixels.

    Args:
        values: (N, C, ...); each channel is told apart at ``levels`` steps between its own lowest and highest value.
        levels: 2 for what has two values.

    Returns:
        (C,), between 0 (one value) and log2(levels).
    """
    rows = values.detach().double().transpose(0, 1).flatten(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    steps = ((rows - low) / (high - low).clamp_min(1e-300) * (levels - 1)).round().long()
    counts = torch.zeros(len(rows), levels, dtype=torch.float64).scatter_add_(1, steps, torch.ones_like(rows))
    share = counts / rows.shape[1]
    return -torch.where(share > 0, share * share.clamp_min(1e-300).log2(), share).sum(1)


def _signs(binarized: Tensor) -> Tensor:
    """0 and 1 for the lower and the higher of an image's two values (N, C, pixels)."""
    low, high = binarized.amin((1, 2), keepdim=True), binarized.amax((1, 2), keepdim=True)
    return torch.where(low == high, binarized >= 0, binarized >= (low + high) / 2).double()


def first_binarization(model: nn.Module, images: Sequence[Tensor]) -> Entropy:
    """Measures the channels of what reaches the first binary layer that the network calls, and of its binarized form.

    Args:
        model: a latent network in evaluation mode.
        images: batches (N, C, H, W).

    Raises:
        PlanError: the network calls no binary layer.
    """
    layers = dict(binary_layers(model))
    seen: list[tuple[str, Tensor]] = []

    def keep(path: str, value: Tensor) -> None:
        if not seen or seen[0][0] == path:
            seen.append((path, value.detach()))

    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: keep(path, args[0]))
        for path, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            for batch in images:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise PlanError(f"{type(model).__name__} called no binary layer; give a network that bidensify() returned")
    path = seen[0][0]
    binarizer = layers[path].binarizer
    dim = getattr(binarizer, "dim", 1)
    with torch.no_grad():
        pairs = [(_pixels(value, dim), _signs(_pixels(binarizer(value), dim))) for _, value in seen]
    before, after = (channel_entropy(_join(values), levels) for values, levels in zip(zip(*pairs), (_LEVELS, 2)))
    return Entropy(layer=path, before=before.tolist(), after=after.tolist())


def _pixels(value: Tensor, dim: int) -> Tensor:
    """(N, C, pixels)."""
    value = value.movedim(dim, 1)
    return value.reshape(*value.shape[:2], -1)


def _join(values: Sequence[Tensor]) -> Tensor:
    """(1, C, pixels of all images): images may be of several sizes."""
    return torch.cat([value.transpose(0, 1).flatten(1) for value in values], 1)[None]
