"""The list of networks, each with random weights: nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.models import build_model

__all__ = ["SHORT", "Entry", "networks", "strict"]

DECODERS = (
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet",
    "Segformer", "DPT",
)  # fmt: skip
ENCODERS = ("resnet18", "tu-convnext_tiny", "tu-mobilenetv3_large_100", "mit_b0", "efficientnet-b0")
VIT = "tu-vit_tiny_patch16_224"
TORCHVISION = (
    "fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large", "raft_small", "raft_large",
)  # fmt: skip
# Feature extractors; the number is the side of the only square that a network takes, 0 where it takes any.
TIMM = {
    "resnet50": 0, "convnext_tiny": 0, "mobilenetv3_large_100": 0, "efficientnet_b0": 0, "tf_efficientnet_b0": 0,
    "hrnet_w18": 0, "swin_tiny_patch4_window7_224": 224, "maxvit_tiny_tf_224": 224, "fastvit_t8": 0, "repvit_m0_9": 0,
    "nf_resnet50": 0, "efficientvit_b0": 0, "mobilevitv2_050": 0, "mobilevitv2_100": 0,
}  # fmt: skip
# The scale is asked of what this names, and reported for all.
SCALED = ("smp:", "timm:resnet50", "timm:convnext", "timm:mobilenetv3", "_resnet50", "mobilenet_v3_large")
# What falls short, so that a change is noticed either way.
SHORT: dict[str, tuple[str, ...]] = {"smp:DPT/tu-vit_tiny_patch16_224": ("scale",)}

SIDE = 96
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One network.

    Attributes:
        name: SOURCE:NAME, as ``build_model`` has it (transformers: SOURCE:AUTO/CLASS).
        build: makes it.
        inputs: a batch of n examples: positional and keyword arguments. None: what ``bidensify`` derives from the network.
        unavailable: why it cannot be built here, or an empty string.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs] | None
    unavailable: str = ""

    @property
    def source(self) -> str:
        """ "smp", "timm", "torchvision" or "transformers"."""
        return self.name.partition(":")[0]


def image(batch: int, side: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Images of unit variance with structure at every scale, as photographs have and white noise has not."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(batch, channels, side, side)
    size = 2
    while size <= side:
        noise = torch.randn(batch, channels, size, size, generator=generator)
        total += nn.functional.interpolate(noise, (side, side), mode="bilinear", align_corners=False)
        size *= 2
    return total / total.std()


def _images(side: int, count: int = 1) -> Callable[[int], Inputs]:
    return lambda batch: (tuple(image(batch, side, seed=number) for number in range(count)), {})


def _entry(name: str, inputs: Callable[[int], Inputs]) -> Entry:
    return Entry(name, lambda: build_model(name), inputs)


def _transformers() -> dict[str, Entry]:
    """What ``zoo.transformers`` lists."""
    try:
        listed = importlib.import_module("zoo.transformers")
    except ImportError as error:
        if error.name not in ("zoo.transformers", "transformers"):
            raise
        return {}
    given: Mapping[str, Callable[[int], dict[str, Tensor]]] = getattr(listed, "INPUTS", {})
    missing: Mapping[str, str] = getattr(listed, "UNAVAILABLE", {})
    entries = {}
    for name, build in listed.MODELS.items():
        inputs = given.get(name)
        entries[name] = Entry(name, build, _keywords(inputs) if inputs is not None else None)
    for name, reason in missing.items():
        entries[name] = Entry(name, nn.Identity, None, reason)
    return entries


def _keywords(inputs: Callable[[int], dict[str, Tensor]]) -> Callable[[int], Inputs]:
    return lambda batch: ((), inputs(batch))


def strict(name: str, check: str) -> bool:
    """Whether a figure of ``check`` outside its range is a failure for this network, rather than reported."""
    return check != "scale" or any(part in name for part in SCALED)


def networks() -> dict[str, Entry]:
    """Every network of the page by name, in its order."""
    # PAN pools its encoder's last map, of a sixteenth of the side, three times.
    sides = {"PAN": 128}
    entries = [
        _entry(f"smp:{decoder}/{encoder}", _images(sides.get(decoder, SIDE)))
        for decoder in DECODERS
        for encoder in ENCODERS
    ]
    entries.append(_entry(f"smp:DPT/{VIT}", _images(224)))
    for name in TORCHVISION:
        entries.append(_entry(f"torchvision:{name}", _images(128, 2) if "raft" in name else _images(SIDE)))
    entries += [_entry(f"timm:{name}", _images(side or SIDE)) for name, side in TIMM.items()]
    return {**{entry.name: entry for entry in entries}, **_transformers()}
