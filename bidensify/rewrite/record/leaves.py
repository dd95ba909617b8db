"""Which modules are one step of a record."""

from __future__ import annotations

import torch
from torch import nn

from bidensify.nn import FrozenLayer, RPReLU
from bidensify.rewrite.kinds import is_activation, is_gate, is_layer, is_layer_scale, is_norm, is_pass

__all__ = ["is_leaf"]


def is_leaf(module: nn.Module) -> bool:
    """Whether a module's call is one node: torch's own layers, their subclasses, activations, scripted modules."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if type(module).__module__.startswith("torch.nn.") and not type(module).__module__.startswith("torch.nn.parallel."):
        return not isinstance(module, (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)) or bool(
            module._parameters
        )
    # A packed layer counts itself; RPReLU's functions are fused operators, which say less than its name.
    if (
        isinstance(module, (FrozenLayer, RPReLU, nn.Embedding))
        or is_layer(module)
        or is_norm(module)
        or is_pass(module)
    ):
        return True
    if any(cls.__module__ == "torch.nn.modules.activation" for cls in type(module).__mro__) or is_layer_scale(module):
        return True
    return (is_activation(module) or is_gate(module)) and not any(True for _ in module.parameters())
