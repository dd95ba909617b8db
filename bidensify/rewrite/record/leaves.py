"""Which modules are one step of a record."""

from __future__ import annotations

import re

import torch
from torch import nn

from bidensify.nn import FrozenLayer
from bidensify.rewrite.plan.kinds import is_frozen_norm

__all__ = ["is_leaf"]

_ACTIVATION_NAMES = re.compile(
    r"^(?:Fast|Quick|New|ClippedG|GELUT|)"
    r"(ReLU6?|LeakyReLU|PReLU|RReLU|SiLU|Swish|GELU|Hardswish|HardSwish|Mish|HardMish|ELU|CELU|SELU|Softplus|"
    r"Sigmoid|Hardsigmoid|HardSigmoid|Tanh|Hardtanh|Softmax|Softmax2d)"
    r"(?:Me|Jit|JitMe|Activation|Tanh)*$",
    re.IGNORECASE,
)


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
    leaf_bases = (
        nn.modules.conv._ConvNd,
        nn.Linear,
        nn.modules.batchnorm._NormBase,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.Embedding,
        nn.Identity,
    )
    # A packed layer counts itself.
    if isinstance(module, (*leaf_bases, FrozenLayer)):
        return True
    if any(cls.__module__ == "torch.nn.modules.activation" for cls in type(module).__mro__):
        return True
    name = type(module).__name__
    if is_frozen_norm(module):
        return True
    # RPReLU: its functions are fused operators, which say less than its name.
    if name.startswith(("RPReLU", "DropPath", "StochasticDepth", "LayerScale")) or name.endswith("DropPath"):
        return True
    return _ACTIVATION_NAMES.match(name) is not None and not any(True for _ in module.parameters())
