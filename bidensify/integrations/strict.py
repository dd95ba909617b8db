"""Loads that are not strict: the weights of a rewritten network must not go into one that is not.

Many libraries load with ``strict=False`` by default or on the way (segmentation_models.pytorch's ``from_pretrained``, timm's
``load_pretrained`` for another number of classes, torch.hub scripts). The latent weights would then take the places of float
ones and the rest be dropped without a word. With bidensify imported, ``nn.Module.load_state_dict(..., strict=False)`` refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch.nn.modules.module import Module

__all__ = ["refuse_rewritten"]

# What a binary layer has under its path, and a packed one.
_PARTS = ("binarizer", "weight_binarizer", "activation")
_PACKED = ("bits", "side")


def refuse_rewritten(module: Module, state: Mapping[str, Any]) -> None:
    """Compares the names of a state with a network's.

    Args:
        module: the network that is to be given ``state``.
        state: tensors by name.

    Raises:
        FormatError: ``state`` has parts of binary or packed layers where ``module`` has full-precision ones.
    """
    found = None
    for key in state:
        path, _, name = str(key).rpartition(".")
        parent, _, part = path.rpartition(".")
        if part in _PARTS:
            found = parent
        elif name in _PACKED and all(f"{path}.{each}" in state for each in _PACKED):
            found = path
        else:
            continue
        try:
            layer = module.get_submodule(found)
        except AttributeError:
            continue
        # A full-precision convolution or linear layer has nothing below it, and a weight.
        if part not in layer._modules and name not in layer._buffers and layer._parameters.get("weight") is not None:
            from bidensify.errors import FormatError

            raise FormatError(
                f"the weights are of a network that bidensify rewrote ({str(key)!r}), and {type(module).__name__} is "
                f"full-precision at {found!r}: with strict=False it would run with the wrong weights. Rewrite it first "
                "(bidensify(model), the same configuration), or load with bidensify.from_pretrained"
            )


_load_state_dict = Module.load_state_dict


@functools.wraps(_load_state_dict)
def _checked(self: Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    if not strict:
        refuse_rewritten(self, state_dict)
    return _load_state_dict(self, state_dict, strict, assign)


Module.load_state_dict = _checked  # type: ignore[method-assign]
