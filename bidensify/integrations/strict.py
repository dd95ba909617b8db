"""Loads that are not strict: the weights of a rewritten network must not go into one that is not.

Many libraries load with ``strict=False`` by default or on the way (segmentation_models.pytorch's ``from_pretrained``, timm's
``load_pretrained`` for another number of classes, torch.hub scripts). The latent weights would then take the places of float
ones and the rest be dropped without a word. With bidensify imported, ``nn.Module.load_state_dict(..., strict=False)`` refuses.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch.nn.modules.module import Module

__all__ = ["refuse_rewritten"]

# What a binary layer has under its path, and a packed one. A norm is other libraries' layers' too (detectron2's Conv2d).
_PARTS = ("binarizer", "weight_binarizer", "activation", "norm")
_PACKED = ("bits", "side")


def refuse_rewritten(module: Module, state: Mapping[str, Any]) -> None:
    """Compares the names of a state with a network's.

    Args:
        module: the network that is to be given ``state``.
        state: tensors by name.

    Raises:
        FormatError: ``state`` has parts of binary or packed layers where ``module`` has full-precision ones.

    Warns:
        UserWarning: ``state`` has norms inside of such layers and no other part, as ``bnn`` and libraries of convolutions
            with a norm have them.
    """
    doubt = ""
    for key in map(str, state):
        found, part = next(((p, n) for p, n in _layers(key, state) if _plain(module, p, n)), ("", ""))
        if not part:
            continue
        said = f"({key!r}), and {type(module).__name__} is full-precision at {found!r}: with strict=False it"
        if part != "norm":
            from bidensify.errors import FormatError

            raise FormatError(f"the weights are of a network that bidensify rewrote {said} would run with the {_REST}")
        doubt = (
            doubt
            or f"the weights have a norm inside of a layer {said} is lost; if bidensify rewrote it, these are {_REST}"
        )
    if doubt:
        warnings.warn(doubt, stacklevel=3)


_REST = (
    "wrong weights. Rewrite the network first (bidensify(model), the same configuration), or load with "
    "bidensify.from_pretrained"
)


def _layers(key: str, state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The paths of the binary or packed layers that ``key`` may belong to, and which part of them it names."""
    path, _, name = key.rpartition(".")
    if name in _PACKED and all(f"{path}.{each}" in state for each in _PACKED):
        yield path, name
    names = path.split(".")
    yield from ((".".join(names[:i]), names[i]) for i in range(1, len(names)) if names[i] in _PARTS)


def _plain(module: Module, path: str, part: str) -> bool:
    """Whether a full-precision convolution or linear layer is there: nothing below it, and a weight."""
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        return False
    return not layer._modules and part not in layer._buffers and layer._parameters.get("weight") is not None


_load_state_dict = Module.load_state_dict


@functools.wraps(_load_state_dict)
def _checked(self: Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    if not strict:
        refuse_rewritten(self, state_dict)
    return _load_state_dict(self, state_dict, strict, assign)


Module.load_state_dict = _checked  # type: ignore[method-assign]
