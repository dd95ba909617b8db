"""What a module or a function is, by its class, name and parts; and what a layer costs."""

from __future__ import annotations

import torch
from torch import nn

__all__ = [
    "drops",
    "fused_activation",
    "is_absorbable_norm",
    "is_activation_module",
    "is_frozen_norm",
    "is_gate",
    "is_layer_scale_module",
    "is_norm_module",
    "is_relu_like",
    "macs_of",
]

_RELU_LIKE = {
    "relu", "relu6", "leakyrelu", "leaky_relu", "prelu", "rrelu", "silu", "swish", "gelu", "hardswish", "hard_swish",
    "mish", "hardmish", "elu", "celu", "selu", "softplus", "hardtanh",
}  # fmt: skip
_GATES = {"sigmoid", "hardsigmoid", "hard_sigmoid", "tanh", "softmax", "log_softmax", "logsoftmax", "softmax2d"}
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_NORM_BUFFERS = ("weight", "bias", "running_mean", "running_var")


def _stem(name: str) -> str:
    name = name.lower()
    for prefix in ("fast", "quick", "new", "clippedg"):
        if name.startswith(prefix) and name != prefix:
            name = name[len(prefix) :]
    for suffix in ("activation", "jitme", "jit", "me", "tanh"):
        if name.endswith(suffix) and len(name) > len(suffix):
            name = name[: -len(suffix)]
    return name


def is_relu_like(name: str) -> bool:
    """Whether a module's class or a function of this name is an activation of the ReLU family."""
    return _stem(name) in _RELU_LIKE or name.lower() in _RELU_LIKE


def is_gate(name: str) -> bool:
    """Whether a module's class or a function of this name is a gate (sigmoid, softmax, ...)."""
    return name.lower() in _GATES or _stem(name) in _GATES


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm whose statistics and affine are buffers (torchvision, timm, DETR and its kin)."""
    return "FrozenBatchNorm" in type(module).__name__ and all(
        module._buffers.get(name) is not None for name in _NORM_BUFFERS
    )


def is_norm_module(module: nn.Module) -> bool:
    """Whether a module normalises."""
    return isinstance(module, _NORMS) or "FrozenBatchNorm" in type(module).__name__


def is_absorbable_norm(norm: nn.Module, channels: int) -> bool:
    """Whether a module is a BatchNorm with statistics over ``channels`` channels, trained or frozen."""
    if is_frozen_norm(norm):
        return len(norm._buffers["weight"]) == channels  # type: ignore[arg-type]
    return isinstance(norm, nn.BatchNorm2d) and norm.num_features == channels and norm.running_mean is not None


def is_activation_module(module: nn.Module) -> bool:
    """Whether a module is an activation of the ReLU family, or of a subclass of one."""
    return any(is_relu_like(cls.__name__) for cls in type(module).__mro__)


def is_layer_scale_module(module: nn.Module) -> bool:
    """Whether a module is a LayerScale: it multiplies by a parameter per channel."""
    return "LayerScale" in type(module).__name__


def fused_activation(norm: nn.Module | None) -> nn.Module | None:
    """The activation inside a fused norm+act (timm's BatchNormAct2d, GroupNormAct, ...), or None."""
    inner = getattr(norm, "act", None)
    return inner if isinstance(inner, nn.Module) and not isinstance(inner, nn.Identity) else None


def drops(module: nn.Module | None) -> bool:
    """Whether a module drops values in training: a dropout or stochastic depth with a chance above 0."""
    name = type(module).__name__
    if not (name.startswith(("Dropout", "StochasticDepth")) or "DropPath" in name):
        return False
    return any(bool(getattr(module, key, None)) for key in ("p", "drop_prob"))


def macs_of(module: nn.Module, output: tuple[int, ...]) -> int:
    """Multiply-accumulates per sample of one call of a convolution or linear layer.

    Args:
        module: the layer.
        output: its output's shape, batch first.
    """
    numel = 1
    for size in output[1:]:
        numel *= size
    if isinstance(module, nn.Linear):
        return numel * module.in_features
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # Every input value feeds all taps; counted from the weight and the input's positions, which are the output's
        # divided by the stride.
        positions = numel // module.out_channels
        stride = int(torch.tensor(module.stride).prod())
        taps = int(torch.tensor(module.kernel_size).prod())
        return positions * module.in_channels * (module.out_channels // module.groups) * taps // stride
    if isinstance(module, nn.modules.conv._ConvNd):
        taps = int(torch.tensor(module.kernel_size).prod())
        return numel * (module.in_channels // module.groups) * taps
    return 0
