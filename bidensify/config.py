"""What a rewrite is asked to do: data only, with a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bidensify._util.names import near
from bidensify.errors import ConfigError

__all__ = ["FRAMES", "BidensifyConfig", "Rule", "name_of_1"]

CONFIG_VERSION = 2
# What a method's binarizers may stand in, besides its authors' own layer.
FRAMES = ("bidense", "bidense-paper", "paper", "teacher")

_CHOICES: dict[str, tuple[str, ...]] = {
    "act_scale": ("per_tensor", "per_channel", "none", "spatial"),
    "frame": ("own", *FRAMES),
    "residual": ("auto", "keep", "double"),
    "linear": ("off", "pointwise", "all"),
    "activation": ("rprelu", "keep"),
}

# Version 1's names, and what has their layer now: there the bypass joined before the activation, as in the paper.
_NAMES_OF_1 = {"bidense": "bidense-in-paper", "bidense-cfb": "bidense-cfb-in-paper"}
# Options of earlier releases, and the one value that is left of each.
GONE = {"fusion_grouping": "interleaved", "weights": "pretrained"}

_OVERRIDES = ("method", "act_scale", "act_bits", "bypass", "activation")
_ACT_BITS = (1, 2)


def name_of_1(method: str, frame: str = "own") -> str:
    """What a method of a configuration of version 1 is called today; under a frame a bare name says nothing of its layer."""
    if method.endswith("-in-bidense"):
        return f"{method}-paper"
    return _NAMES_OF_1.get(method, method) if frame == "own" else method


def _check_act_bits(bits: Any, where: str) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in _ACT_BITS:
        raise ConfigError(f"{where}: act_bits={bits!r} must be 1 or 2, the bits of an activation")


def _range(bounds: Any, what: str) -> tuple[int | None, int | None]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ConfigError(f"{what}={bounds!r} must be [low, high]")
    low, high = bounds
    for bound in (low, high):
        if bound is not None and (not isinstance(bound, int) or isinstance(bound, bool)):
            raise ConfigError(f"{what}={bounds!r}: {bound!r} must be an integer, or None for no bound")
    if low is not None and high is not None and low > high:
        raise ConfigError(f"{what}={bounds!r} holds nothing: low is above high")
    return low, high


@dataclass(frozen=True)
class Rule:
    """One ordered rule: the first whose ``match`` fits a layer decides it.

    Args:
        match: a glob on the module's path ("decoder.*"), "re:" and a regular expression that must match the whole
            path, or a class name as "class:Conv2d" (the class itself or any of its bases). A class object may be given;
            it is stored by name.
        action: "keep", "int8" (the float layer, weights and input rounded to 8 bits), "binarize", the name of a method, or a
            mapping of overrides: method, act_scale ("per_tensor" | "per_channel" | "none" | "spatial"), act_bits (1 | 2), bypass
            (bool; a residual add that carries the signal still takes it away, unless residual="double"), activation
            ("rprelu" | "keep").
        where: predicates on the layer that must hold too, each a closed range [low, high] (None: open):
            in_channels, out_channels, kernel_size (the larger side), stride, groups, height, width (of the output).

    Raises:
        ConfigError: a field that breaks these rules.
    """

    match: str
    action: str | Mapping[str, Any] = "keep"
    where: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.match, type):
            object.__setattr__(self, "match", f"class:{self.match.__name__}")
        if not isinstance(self.match, str) or not self.match:
            raise ConfigError(f"Rule: match={self.match!r} must be a glob, 're:...', 'class:...' or a class")
        if isinstance(self.action, Mapping):
            for key in self.action:
                if key not in _OVERRIDES:
                    raise ConfigError(f"Rule({self.match!r}): unknown override {key!r}{near(key, _OVERRIDES)}")
            for key in ("act_scale", "activation"):
                if key in self.action and self.action[key] not in _CHOICES[key]:
                    raise ConfigError(
                        f"Rule({self.match!r}): {key}={self.action[key]!r} must be one of {', '.join(_CHOICES[key])}"
                    )
            if "act_bits" in self.action:
                _check_act_bits(self.action["act_bits"], f"Rule({self.match!r})")
            for key, kind in (("bypass", bool), ("method", str)):
                if key in self.action and not isinstance(self.action[key], kind):
                    wanted = "true or false" if kind is bool else "a method's name"
                    raise ConfigError(f"Rule({self.match!r}): {key}={self.action[key]!r} must be {wanted}")
            object.__setattr__(self, "action", dict(self.action))
        elif not isinstance(self.action, str):
            raise ConfigError(
                f"Rule({self.match!r}): action={self.action!r} must be 'keep', 'int8', 'binarize', a method's name or a "
                "mapping of overrides"
            )
        known = ("in_channels", "out_channels", "kernel_size", "stride", "groups", "height", "width")
        if not isinstance(self.where, Mapping):
            raise ConfigError(
                f"Rule({self.match!r}): where={self.where!r} must be a mapping, for example {{'kernel_size': (1, 1)}}"
            )
        ranges: dict[str, tuple[int | None, int | None]] = {}
        for key, bounds in self.where.items():
            if key not in known:
                raise ConfigError(f"Rule({self.match!r}): unknown predicate {key!r}{near(key, known)}")
            ranges[key] = _range(bounds, f"Rule({self.match!r}): where[{key!r}]")
        object.__setattr__(self, "where", ranges)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; ``where`` only if there is one."""
        action: Any = dict(self.action) if isinstance(self.action, Mapping) else self.action
        result: dict[str, Any] = {"match": self.match, "action": action}
        if self.where:
            result["where"] = {key: list(bounds) for key, bounds in self.where.items()}
        return result


@dataclass(frozen=True)
class BidensifyConfig:
    """How a network is rewritten.

    Args:
        method: a registered method ("bidense", "bnn", ...); see ``bidensify.available_methods()``.
        rules: ordered ``Rule``s; the first that fits a layer decides it, before the defaults do.
        act_scale: granularity of the activation scale alpha: "per_tensor", "per_channel" (not packable) or "none"; "spatial" is
            XNOR-Net's map of scales (not packable).
        act_bits: bits of an activation: 1, or 2 (four levels; weights keep one bit), which methods with a plain sign, BiDense's
            and DoReFa-Net have.
        residual: what happens to residual adds. "auto": removed where the bypasses inside already carry everything the
            shortcut carried, else kept with the last layer's bypass dropped. "keep": always kept, with the last
            layer's bypass dropped. "double": kept with every bypass, which trains better on networks of few or inverted
            residual blocks, and doubles the signal in every block of plain convolutions.
        linear: "off", "pointwise" (linear layers on NHWC maps, as in ConvNeXt) or "all".
        activation: "rprelu" exchanges ReLU-like activations beside binary layers, "keep" leaves them.
        frame: "own" sets a method's layers up as its authors do (norm, activation, bypass, what stays float); "bidense" puts its
            binarizers into BiDense's layer, "bidense-paper" into that of its paper, whose bypass joins before the activation, to
            tell the binarizer from the frame; "paper" sets it up as that paper has its baselines: a BatchNorm behind each
            convolution, the blocks' own residual adds, no bypass; "teacher" does so for every method, and RPReLU is at first the
            ReLU, LeakyReLU or PReLU that it replaces, uncentred: with float layers a network of these and norms is the one given.
        keep_first: keep the first convolution on the image in full precision.
        keep_last: keep the last prediction layers in full precision.
        keep_slower: keep in full precision what is slower as bits on this machine, by the table that
            ``bidensify bench NETWORK --layers`` measured; a layer without a row there is an error.

    Raises:
        ConfigError: a field outside its choices.
    """

    # What transformers knows it by: from_pretrained(quantization_config=BidensifyConfig(...)).
    quant_method: ClassVar[str] = "bidensify"

    method: str = "bidense"
    rules: tuple[Rule, ...] = ()
    act_scale: str = "per_tensor"
    act_bits: int = 1
    frame: str = "own"
    residual: str = "auto"
    linear: str = "pointwise"
    activation: str = "rprelu"
    keep_first: bool = True
    keep_last: bool = True
    keep_slower: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ConfigError(f"BidensifyConfig: method={self.method!r} must be a method's name")
        if not isinstance(self.rules, (tuple, list)):
            raise ConfigError(f"BidensifyConfig: rules={self.rules!r} must be a list of rules")
        rules = []
        for rule in self.rules:
            if isinstance(rule, Mapping):
                rule = _rule_from_dict(rule)
            if not isinstance(rule, Rule):
                raise ConfigError(f"BidensifyConfig: rules must hold Rule objects, got {rule!r}")
            rules.append(rule)
        object.__setattr__(self, "rules", tuple(rules))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"BidensifyConfig: {name}={value!r} is none of its values{near(value, choices)}")
        _check_act_bits(self.act_bits, "BidensifyConfig")
        for name in ("keep_first", "keep_last", "keep_slower"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"BidensifyConfig: {name}={getattr(self, name)!r} must be true or false")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form with a ``version``."""
        result: dict[str, Any] = {"version": CONFIG_VERSION}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            result[item.name] = [rule.to_dict() for rule in value] if item.name == "rules" else value
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BidensifyConfig:
        """The reverse of ``to_dict``; missing fields take their defaults, and options that are gone may hold theirs.

        Raises:
            ConfigError: an unknown key, or a version that this release does not know.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"BidensifyConfig: {data!r} must be a mapping of fields to values")
        fields = dict(data)
        version = fields.pop("version", CONFIG_VERSION)
        if version not in (1, CONFIG_VERSION) or isinstance(version, bool):
            raise ConfigError(
                f"BidensifyConfig: version {version!r} is not known to this release (it reads 1 and {CONFIG_VERSION}); "
                "update bidensify"
            )
        if version == 1:
            fields = _of_version_1(fields)
        for key, left in GONE.items():
            value = fields.pop(key, left)
            if value != left:
                raise ConfigError(
                    f"BidensifyConfig: the option {key!r} is gone, and every rewrite is as with {left!r}; {value!r} was given: "
                    "leave it out, or use release 0.1"
                )
        known = tuple(item.name for item in dataclasses.fields(cls))
        for key in fields:
            if key not in known:
                raise ConfigError(f"BidensifyConfig: unknown key {key!r}{near(key, known)}")
        return cls(**fields)

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> BidensifyConfig:
        """The reverse of ``to_json``.

        Raises:
            ConfigError: not JSON, or what ``from_dict`` does not take.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"BidensifyConfig: {text[:80]!r} is not JSON ({error})") from error
        if not isinstance(data, dict):
            raise ConfigError(f"BidensifyConfig: the JSON text must hold an object, got {type(data).__name__}")
        return cls.from_dict(data)


def _of_version_1(fields: dict[str, Any]) -> dict[str, Any]:
    """The same layers by this release's names."""
    was = fields.get("frame", "own")

    def named(action: Any) -> Any:
        if isinstance(action, Mapping):
            return {key: named(value) if key == "method" else value for key, value in action.items()}
        return name_of_1(action, was) if isinstance(action, str) else action

    def renamed(rule: Any) -> Any:
        return {**rule, "action": named(rule["action"])} if isinstance(rule, Mapping) and "action" in rule else rule

    rules = fields.get("rules", ())
    if isinstance(rules, tuple | list):
        rules = [renamed(rule) for rule in rules]
    frame = "bidense-paper" if was == "bidense" else was
    return {**fields, "frame": frame, "method": named(fields.get("method", "bidense")), "rules": rules}


def _rule_from_dict(data: Mapping[str, Any]) -> Rule:
    known = ("match", "action", "where")
    for key in data:
        if key not in known:
            raise ConfigError(f"Rule: unknown key {key!r}{near(key, known)}")
    if "match" not in data:
        raise ConfigError(f"Rule: {dict(data)!r} has no 'match'; say which layers it is for")
    return Rule(**data)
