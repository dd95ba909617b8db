"""Methods by name: a method is one registered function from a layer's description to its binary parts."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from bidensify._util.names import near
from bidensify.config import FRAMES, BidensifyConfig
from bidensify.errors import ConfigError
from bidensify.nn import ActivationBinarizer, RPReLU, WeightBinarizer

__all__ = [
    "LayerParts",
    "LayerSpec",
    "Method",
    "available_methods",
    "get_method",
    "in_frame",
    "no_such_bits",
    "register_method",
]


@dataclass(frozen=True)
class LayerSpec:
    """What a method is told of the layer that it makes parts for.

    Attributes:
        kind: "conv2d", "conv_transpose2d" or "linear".
        in_channels, out_channels: C_in, C_out.
        groups: groups of the convolution.
        dim: the channel dimension: 1 for (N, C, H, W), -1 for (..., C).
        kernel_size, stride, dilation: (height, width) each; (1, 1) of a linear layer.
        nonnegative: whether the layer's input is never below 0 (it comes from a ReLU that stays).
        weight: the latent weight to start from, as the layer holds it, detached; None where a plan is made without values.
    """

    kind: str
    in_channels: int
    out_channels: int
    groups: int = 1
    dim: int = 1
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    nonnegative: bool = False
    weight: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def transposed(self) -> bool:
        """Whether the weight is (C_in, C_out / groups, kH, kW)."""
        return self.kind == "conv_transpose2d"

    @property
    def fan_in(self) -> int:
        """How many weights feed one output channel."""
        return self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    @property
    def keeps_shape(self) -> bool:
        """Whether a shortcut of the same shape leads around the layer: equal channels, no stride."""
        return self.in_channels == self.out_channels and self.stride == (1, 1)


@dataclass(frozen=True)
class LayerParts:
    """The binarizers that a method gives to a layer."""

    binarizer: ActivationBinarizer
    weight_binarizer: WeightBinarizer


@dataclass(frozen=True)
class Method:
    """A registered method: its parts, and what its authors set up around a layer.

    Attributes:
        name: its name in configurations.
        parts: makes a layer's binarizers.
        activation: makes what replaces a ReLU-like activation of (channels, dim), or None to leave it.
        bypass: which layers have a full-precision bypass of their own: "none", "same" (where input and output agree in shape)
            or "all".
        norm: "after" (a layer has a BatchNorm behind its convolution: the network's, or a new one) or "none" (a new one is
            never added).
        activation_first: the bypass joins behind the activation.
        centred: activations start centred, for a bypass hands their mean on to all layers behind; otherwise as they are made.
        residual: what happens to residual adds under this method (as ``BidensifyConfig.residual``); None: as configured.
        keeps: (spec) -> why the method leaves a layer in full precision, or "".
        act_bits: bits of an activation that it has.
        citation: the paper.
    """

    name: str
    parts: Callable[[LayerSpec, BidensifyConfig], LayerParts]
    activation: Callable[[int, int], nn.Module] | None = None
    bypass: str = "none"
    norm: str = "after"
    activation_first: bool = False
    residual: str | None = None
    keeps: Callable[[LayerSpec], str] | None = None
    act_bits: tuple[int, ...] = (1,)
    citation: str = ""
    centred: bool = True

    def takes(self, kind: str) -> bool:
        """Whether the method binarizes layers of a kind ("conv2d", "conv_transpose2d" or "linear") at all."""
        size = (1, 1) if kind == "linear" else (3, 3)
        spec = LayerSpec(kind, 8, 8, dim=-1 if kind == "linear" else 1, kernel_size=size)
        return self.keeps is None or not self.keeps(spec)

    def has_bypass(self, spec: LayerSpec) -> bool:
        """Whether a layer has a bypass of its own."""
        return self.bypass == "all" or (self.bypass == "same" and spec.keeps_shape)


_METHODS: dict[str, Method] = {}
# Behind a method's name: its binarizers in another frame than its authors', so that a comparison can tell them from the frame:
# in BiDense's layer (BatchNorm, RPReLU, bypasses) or its paper's (the bypass joins before RPReLU), as the paper sets up its
# baselines (a BatchNorm behind each convolution, the blocks' residual adds, no bypass), or as the network itself has it (the
# same, and RPReLU is ReLU at first).
_FRAMES = {frame: f"-in-{frame}" for frame in FRAMES}
_CHOICES: dict[str, tuple[object, ...]] = {
    "bypass": ("none", "same", "all"),
    "norm": ("after", "none"),
    "residual": (None, "auto", "keep", "double"),
    "activation_first": (True, False),
}

PartsFunction = Callable[[LayerSpec, BidensifyConfig], LayerParts]


def rprelu(channels: int, dim: int) -> RPReLU:
    """ReActNet's activation, which learns a slope of its negative side, from 0.25 as there.

    A rewrite starts it from the slopes that a PReLU which it replaces has learned, and from a LeakyReLU's if that is larger.
    ReLU's slope of 0 is no such start: with it, and the shift that centres it, deep networks learn less (benchmarks/RESULTS.md).
    """
    return RPReLU(channels, dim)


def rectifier(channels: int, dim: int) -> RPReLU:
    """The same, from the slope 0 that ReLU has: with float layers a network in its own frame is the network that it was."""
    return RPReLU(channels, dim, slope=0.0)


def register_method(
    name: str,
    *,
    activation: Callable[[int, int], nn.Module] | None = None,
    bypass: str | bool = "none",
    norm: str = "after",
    activation_first: bool = False,
    residual: str | None = None,
    keeps: Callable[[LayerSpec], str] | None = None,
    act_bits: Sequence[int] = (1,),
    citation: str = "",
) -> Callable[[PartsFunction], PartsFunction]:
    """Registers the decorated function (spec, config) -> ``LayerParts`` as method ``name``; a newer one takes over, and says so.

    Args:
        name: letters, digits, "-" and "_".
        activation: function of (channels, dim) that makes what replaces a ReLU-like activation beside binary layers.
        bypass: "none", "same" or "all"; True is "all". See ``Method``, also for the rest.
        norm: "after" or "none".
        activation_first: the bypass joins behind the activation.
        residual: None, "auto", "keep" or "double".
        keeps: function of a ``LayerSpec`` that says why a layer stays in full precision, or "".
        act_bits: bits of an activation that the function gives where ``config.act_bits`` asks for them: (1,), (1, 2) or (2,).
        citation: the method's paper.

    Raises:
        ConfigError: a name that is reserved or not an identifier, a value that is none of its choices, or what is given is no
            function.
    """
    if not isinstance(name, str) or name in ("keep", "int8", "binarize") or not name.replace("-", "_").isidentifier():
        raise ConfigError(f"register_method: {name!r} cannot be a method's name; use letters, digits, '-' and '_'")
    for what, function in (("activation", activation), ("keeps", keeps)):
        if function is not None and not callable(function):
            rule = "(channels, dim)" if what == "activation" else "a LayerSpec"
            raise ConfigError(f"register_method({name!r}): {what}={function!r} must be a function of {rule}, or None")
    if isinstance(bypass, bool):
        bypass = "all" if bypass else "none"
    given = {"bypass": bypass, "norm": norm, "residual": residual, "activation_first": activation_first}
    for what, value in given.items():
        if value not in _CHOICES[what]:
            choices = ", ".join(repr(choice) for choice in _CHOICES[what])
            raise ConfigError(f"register_method({name!r}): {what}={value!r} must be one of {choices}")

    bits = tuple(act_bits) if isinstance(act_bits, Sequence) else ()
    if bits not in ((1,), (1, 2), (2,)):
        raise ConfigError(f"register_method({name!r}): act_bits={act_bits!r} must be (1,), (1, 2) or (2,)")

    def register(function: PartsFunction) -> PartsFunction:
        if not callable(function):
            raise ConfigError(f"register_method({name!r}): {function!r} must be a function of (spec, config)")
        if name in _METHODS:
            warnings.warn(f"the method {name!r} is registered again: the newer one takes over", stacklevel=2)
        _METHODS[name] = Method(
            name, _checked(name, function), activation, bypass, norm, activation_first, residual, keeps, bits, citation
        )
        return function

    return register


def _checked(name: str, function: PartsFunction) -> PartsFunction:
    """``function``, whose result is looked at: a layer without binarizers would fail far from the method."""

    @functools.wraps(function)
    def parts(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
        made = function(spec, config)
        if not isinstance(made, LayerParts):
            raise ConfigError(f"the method {name!r} gave {made!r} for {spec}; it must give LayerParts")
        if config.act_scale == "spatial" and getattr(made.binarizer, "act_scale", None) != "spatial":
            raise ConfigError(
                f"act_scale='spatial' is XNOR-Net's map of scales, which the method {name!r} does not have; use "
                "method='xnor', or another act_scale"
            )
        if made.binarizer.planes != config.act_bits:
            if config.act_bits not in _METHODS[name].act_bits:
                raise ConfigError(no_such_bits(_METHODS[name], config.act_bits))
            raise ConfigError(
                f"the method {name!r} gave {type(made.binarizer).__name__}, whose planes={made.binarizer.planes}, for "
                f"act_bits={config.act_bits}, which it is registered with; hand config.act_bits on to the binarizer"
            )
        return made

    return parts


def no_such_bits(method: Method, bits: int, where: str = "") -> str:
    """What an error says where a method lacks activations of so many bits."""
    others = [name for name in available_methods() if bits in _METHODS[name].act_bits]
    return (
        f"{f'{where}: ' if where else ''}act_bits={bits}: the method {method.name!r} has activations of "
        f"{' or '.join(map(str, method.act_bits))} bit{'s' if method.act_bits != (1,) else ''}; {bits} have "
        f"{', '.join(others)}. Use one of them, in a rule for these layers too"
    )


def available_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str) -> Method:
    """The method registered as ``name``; with "-in-" and a frame behind it, its parts in that frame.

    Raises:
        ConfigError: there is none; the message lists near names.
    """
    frames = _FRAMES.values() if isinstance(name, str) else ()
    base = next((name.removesuffix(frame) for frame in frames if name.endswith(frame)), name)
    if base not in _METHODS:
        raise ConfigError(f"unknown method {name!r}{near(base, available_methods())}")
    found = _METHODS[base]
    if base == name:
        return found
    framed = replace(
        found,
        name=name,
        bypass="none",
        norm="after",
        activation_first=False,
        residual="keep",
        keeps=_anywhere(found.keeps),
    )
    frame = name.removeprefix(f"{base}-in-")
    if frame == "teacher":
        return replace(framed, activation=rectifier, centred=False)
    if frame != "paper":
        first = frame == "bidense"
        return replace(framed, activation=rprelu, bypass="all", residual=None, activation_first=first)
    # What the paper proposes has its own layer there; with drawn weights RPReLU starts as ReActNet's, whatever it replaces.
    framed = replace(found, name=name, activation_first=False) if base.split("-")[0] == "bidense" else framed
    return replace(framed, activation=RPReLU if found.activation is rprelu else found.activation)


def _anywhere(keeps: Callable[[LayerSpec], str] | None) -> Callable[[LayerSpec], str] | None:
    """``keeps`` outside the authors' networks: kinds of layer that the method does not know stay, their shortcuts do not."""
    return None if keeps is None else lambda spec: keeps(replace(spec, kernel_size=(3, 3), stride=(1, 1)))


def in_frame(name: str, config: BidensifyConfig) -> str:
    """The name of a method under ``config.frame``."""
    if config.frame == "own" or name.endswith(tuple(_FRAMES.values())):
        return name
    return name + _FRAMES[config.frame]
