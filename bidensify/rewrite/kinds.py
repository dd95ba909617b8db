"""What a module or a function is, told by its class and name: the one place where such names are written.

A network's own activation, norm or drop-path is known by ``register_kind``::

    register_kind("activation", "StarReLU")      # replaced as a ReLU is, where a binary layer stands beside it
    register_kind("norm", mmcv.LayerNorm2d)      # one step of a record; what it normalises stays a feature
    register_kind("pass", "drop_tokens")         # hands its tensor through in evaluation mode

Names are those of classes (a module is what its class or any of its bases is) and of functions, in any case.
"""

from __future__ import annotations

from torch import nn

from bidensify.errors import ConfigError

__all__ = [
    "KINDS",
    "drops",
    "fused_activation",
    "is_absorbable_norm",
    "is_activation",
    "is_frozen_norm",
    "is_gate",
    "is_layer",
    "is_layer_scale",
    "is_norm",
    "is_pass",
    "more_than_norm",
    "register_kind",
]

KINDS = ("activation", "gate", "norm", "pass")
_NAMES: dict[str, set[str]] = {
    # The ReLU family: what stands behind a layer and is one of its activations.
    "activation": {
        "relu", "relu6", "leakyrelu", "leaky_relu", "prelu", "rrelu", "silu", "swish", "gelu", "hardswish", "hard_swish",
        "mish", "hardmish", "elu", "celu", "selu", "softplus", "hardtanh",
    },
    # What makes a factor between 0 and 1, or -1 and 1, to multiply with.
    "gate": {"sigmoid", "hardsigmoid", "hard_sigmoid", "tanh", "softmax", "log_softmax", "logsoftmax", "softmax2d"},
    "norm": {"layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"},
    "pass": {
        "dropout", "dropout1d", "dropout2d", "contiguous", "clone", "alias", "detach", "float", "to", "type_as", "identity",
        "drop_path", "droppath", "stochastic_depth", "stochasticdepth",
    },
}  # fmt: skip
_CLASSES: dict[str, tuple[type[nn.Module], ...]] = {
    "activation": (),
    "gate": (),
    "norm": (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm),
    "pass": (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
}
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_LAYER_FUNCTIONS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "deform_conv2d",
}  # fmt: skip
_NORM_BUFFERS = ("weight", "bias", "running_mean", "running_var")
What = nn.Module | str


def register_kind(kind: str, what: type[nn.Module] | str) -> None:
    """Says what modules of a class, or modules and functions of a name, are.

    Args:
        kind: "activation" (of the ReLU family), "gate" (sigmoid, softmax), "norm", or "pass" (hands its one tensor through
            in evaluation mode).
        what: a class, or the name of a class or function.

    Raises:
        ConfigError: another kind, or something that is neither a class of modules nor a name.
    """
    if kind not in KINDS:
        raise ConfigError(f"register_kind: {kind!r} must be one of {', '.join(KINDS)}")
    if isinstance(what, type) and issubclass(what, nn.Module):
        _CLASSES[kind] = (*_CLASSES[kind], what)
    elif isinstance(what, str) and what.isidentifier():
        _NAMES[kind].add(what.lower())
    else:
        raise ConfigError(f"register_kind({kind!r}): {what!r} must be a class of modules, or a name")


def _stem(name: str) -> str:
    """A lower-case name without what libraries put around it: FastGELUActivation is gelu."""
    for prefix in ("fast", "quick", "new", "clippedg"):
        if name.startswith(prefix) and name != prefix:
            name = name[len(prefix) :]
    for suffix in ("activation", "jitme", "jit", "me", "tanh"):
        if name.endswith(suffix) and len(name) > len(suffix):
            name = name[: -len(suffix)]
    return name


def _is(kind: str, what: What) -> bool:
    if isinstance(what, nn.Module) and isinstance(what, _CLASSES[kind]):
        return True
    names = [cls.__name__ for cls in type(what).__mro__] if isinstance(what, nn.Module) else [what]
    lower = [name.lower() for name in names]
    return any(name in _NAMES[kind] or _stem(name) in _NAMES[kind] for name in lower)


def is_activation(what: What) -> bool:
    """Whether a module, or a function by its name, is an activation of the ReLU family."""
    return _is("activation", what)


def is_gate(what: What) -> bool:
    """Whether a module, or a function by its name, is a sigmoid, softmax or the like."""
    return _is("gate", what)


def is_norm(what: What) -> bool:
    """Whether a module, or a function by its name, normalises."""
    return _is("norm", what) or (isinstance(what, nn.Module) and "FrozenBatchNorm" in type(what).__name__)


def is_pass(what: What) -> bool:
    """Whether a module, or a function by its name, hands its one tensor through in evaluation mode."""
    return _is("pass", what) or (isinstance(what, nn.Module) and "DropPath" in type(what).__name__)


def is_layer(what: What) -> bool:
    """Whether a module, or a function by its name, is a convolution or a linear layer."""
    return isinstance(what, _LAYERS) if isinstance(what, nn.Module) else what in _LAYER_FUNCTIONS


def is_layer_scale(module: nn.Module) -> bool:
    """Whether a module is a LayerScale: it multiplies by a parameter per channel."""
    return "LayerScale" in type(module).__name__


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm whose statistics and affine are buffers (torchvision, timm, DETR and its kin)."""
    return "FrozenBatchNorm" in type(module).__name__ and all(
        module._buffers.get(name) is not None for name in _NORM_BUFFERS
    )


def is_absorbable_norm(norm: nn.Module, channels: int) -> bool:
    """Whether a module is a BatchNorm with statistics over ``channels`` channels, trained or frozen, and no more than that."""
    if more_than_norm(norm):
        return False
    if is_frozen_norm(norm):
        return len(norm._buffers["weight"]) == channels  # type: ignore[arg-type]
    return isinstance(norm, nn.BatchNorm2d) and norm.num_features == channels and norm.running_mean is not None


def more_than_norm(norm: nn.Module) -> str:
    """What a BatchNorm2d does besides normalising and ``fused_activation``, or an empty string."""
    if not isinstance(getattr(norm, "drop", None), (nn.Identity, type(None))):
        return f"it drops values ({type(norm.drop).__name__})"
    if not isinstance(norm, nn.BatchNorm2d) or is_frozen_norm(norm):
        return ""
    writer = next(cls for cls in type(norm).__mro__ if "forward" in vars(cls))
    known = writer in nn.BatchNorm2d.__mro__ or (
        writer.__name__ == "BatchNormAct2d" and writer.__module__.startswith("timm.")
    )
    return "" if known and "forward" not in vars(norm) else f"{type(norm).__name__} has a forward of its own"


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
