"""Example inputs of models that say what they take: transformers' ``main_input_name``, signature and configuration.

Nothing of transformers is imported: a model is known by its ``config`` and ``main_input_name``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["configured_inputs", "configured_sizes"]

_FRAMES = 2
# Optional arguments without which a part of the network would never run.
_WANTED = ("prompt_depth",)


def _size(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return int(value[0]), int(value[1])
    return None


def configured_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """(height, width) that the model's configuration names, best first; an empty list if it names none."""
    config = getattr(model, "config", None)
    sizes: list[tuple[int, int]] = []
    patch, ratios = _size(getattr(config, "patch_size", None)), getattr(config, "scaled_images_ratios", None)
    if patch is not None and isinstance(ratios, (tuple, list)) and ratios:
        # DepthPro cuts patches from the image at several scales: the smallest scale must hold one.
        sizes.append((round(patch[0] / min(ratios)), round(patch[1] / min(ratios))))
    for holder in (config, getattr(config, "backbone_config", None)):
        found = _size(getattr(holder, "image_size", None))
        if found is not None:
            sizes.append(found)
    return sizes


def _names(model: nn.Module) -> list[str]:
    """The arguments to fill: the main inputs, and what ``forward`` takes without a default."""
    main = getattr(model, "main_input_name", None)
    names = [main] if isinstance(main, str) else [str(name) for name in main] if isinstance(main, (tuple, list)) else []
    if not names or getattr(model, "config", None) is None:
        return []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if (required or name in _WANTED) and name not in names:
            names.append(name)
    return names


def configured_inputs(model: nn.Module, image: Tensor, generator: torch.Generator) -> dict[str, Tensor] | None:
    """Keyword arguments for ``model``, or None if it does not say which it takes.

    Args:
        model: any module.
        image: (N, C, H, W).
        generator: for what else is drawn.
    """
    names = _names(model)
    if not names:
        return None
    config = model.config
    inputs: dict[str, Tensor] = {}
    for name in names:
        if name == "pixel_values_videos":
            inputs[name] = torch.stack([image] * _FRAMES, 1)
        elif name == "prompt_depth":
            depth = torch.rand(image.shape[0], 1, *image.shape[2:], generator=generator)
            inputs[name] = depth.to(device=image.device, dtype=image.dtype)
        elif name in ("task_inputs", "input_ids"):
            length = getattr(config, "task_seq_len", None) or 8
            vocabulary = getattr(config, "text_encoder_vocab_size", None) or getattr(config, "vocab_size", None) or 16
            shape = (image.shape[0], int(length))
            inputs[name] = torch.randint(1, int(vocabulary), shape, generator=generator).to(image.device)
        else:
            inputs[name] = image
    return inputs
