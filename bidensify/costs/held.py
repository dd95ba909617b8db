"""What a latent layer will hold and do once it is packed, from what its parts say of themselves."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import nn

from bidensify.costs.work import per_element
from bidensify.errors import ConfigError
from bidensify.exact import fold
from bidensify.nn import BinaryLayer

__all__ = ["Held", "held"]


@dataclass(frozen=True)
class Held:
    """A layer as its file has it.

    Attributes:
        tensors: name -> bytes: the bits, the side parameters in float32, and the parts that are kept as they are.
        work: elementwise operations per input and per output element.
    """

    tensors: dict[str, int]
    work: tuple[int, int]


def held(layer: BinaryLayer) -> Held:
    """What is left of a latent layer; of one that cannot be packed, everything that it has."""
    bits = -(-layer.latent_weight.numel() // 8)
    stored = layer.binarizer.stored()
    try:
        _, scale, offset = layer.binary_weight()
        folded = fold(layer, scale, offset)
    except (ConfigError, RuntimeError):
        # Nothing says what it will be: a norm that cannot be folded, values that the meta device does not have.
        side = 4 * (sum(p.numel() for p in layer.parameters()) - layer.latent_weight.numel())
        after = 2 + (layer.bypass is not None) + per_element(layer.activation)
        return Held({"bits": bits, "side": side}, (layer.binarizer.work, after))
    kept = {name: value for f in fields(folded) if (value := getattr(folded, name := f.name)) is not None}
    activation = kept.pop("activation", None)
    parts = {"activation": activation, "binarizer": layer.binarizer if stored is None else None}
    side = sum(value.numel() for value in (*kept.values(), *(stored or {}).values()))
    tensors = {"bits": bits, "side": 4 * side}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            tensors |= {
                f"{name}.{key}": value.numel() * value.element_size() for key, value in part.state_dict().items()
            }
    before = layer.binarizer.work
    if stored is not None:
        before = (4 if {"k", "a"} & set(stored) else 1) + 2 * (layer.binarizer.planes - 1)
    after = 2 + (layer.bypass is not None) + (activation is not None)
    after += 3 * ("slope" in kept) + 2 * ("offset" in kept) + ("clamp" in kept)
    return Held(tensors, (before, after))
