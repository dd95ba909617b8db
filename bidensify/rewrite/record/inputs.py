"""Example inputs of a network, derived from what it says about itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.errors import PlanError
from bidensify.rewrite.record.model_inputs import configured_inputs, configured_sizes

__all__ = ["candidate_inputs", "describe_inputs"]

_SIZES = (128, 224, 256, 64, 32)


def describe_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The inputs as short text: shapes for tensors, type names for the rest."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return "×".join(str(n) for n in value.shape)
        return type(value).__name__

    return ", ".join([*(one(value) for value in args), *(f"{key}={one(value)}" for key, value in kwargs.items())])


def _dtype_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            device = parameter.device
            # A meta network has no values; its record needs none either.
            return parameter.dtype, torch.device("cpu") if device.type == "meta" else device
    return torch.float32, torch.device("cpu")


def _channels(model: nn.Module) -> list[int]:
    """How many channels the images may have, likeliest first: what the model says of itself, or what a first layer takes."""
    config, found = getattr(model, "config", None), []
    for holder in (config, getattr(config, "backbone_config", None)):
        channels = getattr(holder, "num_channels", None)
        if isinstance(channels, int):
            found.append(channels)
    for settings in (getattr(model, "default_cfg", None), getattr(model, "pretrained_cfg", None)):
        size = settings.get("input_size") if isinstance(settings, Mapping) else None
        if isinstance(size, (tuple, list)) and len(size) == 3:
            found.append(int(size[0]))
    layers = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    layers.sort(key=lambda layer: not isinstance(layer, nn.Conv2d))
    # The first that is registered need not be the first that is called: a decoder may stand before its encoder.
    taken = [layer.in_channels for layer in layers if not isinstance(layer, nn.modules.conv._ConvTransposeNd)]
    usual = [count for count in (*taken[:1], 3, 1, 4, 2) if count in taken and count <= 4]
    return list(dict.fromkeys([*found, *usual, *taken[:1]])) or [3]


def _preferred_sizes(model: nn.Module) -> list[tuple[int, int]]:
    sizes = configured_sizes(model)
    settings = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    if isinstance(settings, Mapping) and settings.get("fixed_input_size") and settings.get("input_size"):
        sizes.append(tuple(settings["input_size"][-2:]))
    sizes.extend((size, size) for size in _SIZES)
    return list(dict.fromkeys(sizes))


def candidate_inputs(model: nn.Module, example_inputs: Any = None) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yields (args, kwargs) to try, best first; exactly one pair where the user gave inputs.

    Raises:
        PlanError: ``example_inputs`` is not a tensor, a tuple or list, or a dict.
    """
    if example_inputs is not None:
        if isinstance(example_inputs, Tensor):
            yield (example_inputs,), {}
        elif isinstance(example_inputs, Mapping):
            yield (), dict(example_inputs)
        elif isinstance(example_inputs, (tuple, list)):
            yield tuple(example_inputs), {}
        else:
            raise PlanError(
                f"example_inputs={type(example_inputs).__name__} must be a tensor, a tuple of positional arguments or "
                "a dict of keyword arguments"
            )
        return
    dtype, device = _dtype_device(model)
    generator = torch.Generator().manual_seed(0)
    for (height, width), channels in itertools.product(_preferred_sizes(model), _channels(model)):
        # Two images, so that what is per sample and what is per batch can be told apart.
        image = torch.randn(2, channels, height, width, generator=generator).to(device=device, dtype=dtype)
        named = configured_inputs(model, image, generator)
        if named is not None:
            yield (), named
        else:
            yield (image,), {}
            if height == 128:
                # Optical flow compares two images.
                yield (image, image.flip(-1)), {}
