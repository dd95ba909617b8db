"""Methods by name: a method is one registered function from a layer's description to its binary parts."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bidensify.config import BidensifyConfig
from bidensify.errors import ConfigError
from bidensify.nn import ActivationBinarizer, WeightBinarizer

__all__ = ["LayerParts", "LayerSpec", "Method", "available_methods", "get_method", "register_method"]


@dataclass(frozen=True)
class LayerSpec:
    """What a method is told of the layer that it makes parts for.

    Attributes:
        kind: "conv2d", "conv_transpose2d" or "linear".
        in_channels, out_channels: C_in, C_out.
        groups: groups of the convolution.
        dim: the channel dimension: 1 for (N, C, H, W), -1 for (..., C).
    """

    kind: str
    in_channels: int
    out_channels: int
    groups: int = 1
    dim: int = 1

    @property
    def transposed(self) -> bool:
        """Whether the weight is (C_in, C_out / groups, kH, kW)."""
        return self.kind == "conv_transpose2d"


@dataclass(frozen=True)
class LayerParts:
    """The binarizers that a method gives to a layer."""

    binarizer: ActivationBinarizer
    weight_binarizer: WeightBinarizer


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: its name in configurations.
        parts: makes a layer's binarizers.
        activation: makes what replaces a ReLU-like activation of (channels, dim), or None to leave it.
        bypass: whether every layer has a full-precision bypass (and residual adds follow the outer rule).
        citation: the paper.
    """

    name: str
    parts: Callable[[LayerSpec, BidensifyConfig], LayerParts]
    activation: Callable[[int, int], nn.Module] | None
    bypass: bool
    citation: str


_METHODS: dict[str, Method] = {}

PartsFunction = Callable[[LayerSpec, BidensifyConfig], LayerParts]


def register_method(
    name: str,
    *,
    activation: Callable[[int, int], nn.Module] | None = None,
    bypass: bool = False,
    citation: str = "",
) -> Callable[[PartsFunction], PartsFunction]:
    """Registers the decorated function as method ``name``.

    Args:
        name: a new name; letters, digits, "-" and "_".
        activation: function of (channels, dim) that makes what replaces a ReLU-like activation beside binary layers.
        bypass: give every layer a parameter-free full-precision bypass.
        citation: the method's paper.

    Raises:
        ConfigError: the name is taken, reserved or not an identifier, or what is given is no function.
    """

    taken = ("keep", "binarize")
    if not isinstance(name, str) or name in taken or not name.replace("-", "_").isidentifier():
        raise ConfigError(f"register_method: {name!r} cannot be a method's name; use letters, digits, '-' and '_'")
    if activation is not None and not callable(activation):
        raise ConfigError(
            f"register_method({name!r}): activation={activation!r} must be a function of (channels, dim), or None"
        )

    def register(function: PartsFunction) -> PartsFunction:
        if not callable(function):
            raise ConfigError(f"register_method({name!r}): {function!r} must be a function of (spec, config)")
        if name in _METHODS:
            raise ConfigError(f"register_method: {name!r} is taken; choose another name")
        _METHODS[name] = Method(name, _checked(name, function), activation, bypass, citation)
        return function

    return register


def _checked(name: str, function: PartsFunction) -> PartsFunction:
    """``function``, whose result is looked at: a layer without binarizers would fail far from the method."""

    @functools.wraps(function)
    def parts(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
        made = function(spec, config)
        if not isinstance(made, LayerParts):
            raise ConfigError(f"the method {name!r} gave {made!r} for {spec}; it must give LayerParts")
        return made

    return parts


def available_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str) -> Method:
    """The method registered as ``name``.

    Raises:
        ConfigError: there is none; the message lists near names.
    """
    if name not in _METHODS:
        close = difflib.get_close_matches(str(name), available_methods(), n=2)
        hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
        raise ConfigError(f"unknown method {name!r}; registered: {', '.join(available_methods())}.{hint}")
    return _METHODS[name]
