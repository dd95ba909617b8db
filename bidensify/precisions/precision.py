"""The precisions that a layer may have: what a rule asks for, what it costs, and how a layer of the float network takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from bidensify._util.names import near
from bidensify.errors import ConfigError
from bidensify.methods import get_method
from bidensify.nn import BinaryLayer, Int8Layer, binary_layers, int8_layers
from bidensify.nn.used_weight import copy_model
from bidensify.rewrite.apply.model import apply_plan
from bidensify.rewrite.plan.entries import LayerPlan
from bidensify.rewrite.plan.schema import Plan

__all__ = [
    "BINARY",
    "FLOAT",
    "INT8",
    "PRECISIONS",
    "TWO_BITS",
    "Branch",
    "Precision",
    "branches_of",
    "precision_called",
    "students",
]

BINARY, TWO_BITS, INT8, FLOAT = "binary", "act_bits 2", "int8", "float"


class Branch:
    """What stands where a float convolution was: a layer in another precision; norm, bypass and activation are no part of it.

    Attributes:
        dim: which dimension of its result is that of the channels.
    """

    dim: int

    def begin(self) -> None:
        """Starts calibration: what is then given to ``observe`` is what the float network gives the layer."""
        raise NotImplementedError

    def observe(self, x: Tensor) -> None:
        """Sees the layer's input on a batch of calibration images."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends calibration."""
        raise NotImplementedError

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What stands for the float layer's result on the same arguments, up to a scale and a shift per channel."""
        raise NotImplementedError


class _Binary(Branch):
    """A binary layer's sums."""

    def __init__(self, layer: BinaryLayer) -> None:
        self.layer, self.dim = layer, layer.binarizer.dim

    def begin(self) -> None:
        self.layer.binarizer.begin_calibration()

    def observe(self, x: Tensor) -> None:
        self.layer.binarizer(x)

    def end(self) -> None:
        self.layer.binarizer.end_calibration()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        binarizer = self.layer.binarizer
        return binarizer.weigh(x, self.layer.conv_only(binarizer(x), *args, **kwargs), self.layer)


class _Rounded(Branch):
    """An int8 layer."""

    def __init__(self, layer: Int8Layer) -> None:
        assert layer.int8 is not None
        self.layer, self.int8, self.dim = layer, layer.int8, -1 if isinstance(layer, nn.Linear) else 1

    def begin(self) -> None:
        self.int8.begin_calibration()

    def observe(self, x: Tensor) -> None:
        self.int8(x)

    def end(self) -> None:
        self.int8.end_calibration()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self.layer(x, *args, **kwargs))


@dataclass(frozen=True)
class Precision:
    """One precision of a layer.

    Attributes:
        name: "binary", "float", ...
        action: what a :class:`bidensify.Rule` gives the layers that are to have it; None where the defaults do.
        planned: the plan of a student all of whose layers have it where they can; None of the full-precision network's own.
    """

    name: str
    action: str | Mapping[str, Any] | None
    planned: Callable[[Plan], Plan] | None


def _two_bits(plan: Plan) -> Plan:
    layers = [
        replace(layer, act_bits=2) if layer.action == "binary" and 2 in get_method(layer.method).act_bits else layer
        for layer in plan.layers
    ]
    return replace(plan, layers=layers)


def _int8(plan: Plan) -> Plan:
    """The float network as it is, with the layers rounded that would be binary."""

    def rounded(layer: LayerPlan) -> LayerPlan:
        bare = replace(layer, action="keep", int8=True, way="", method="", norm=None, layer_scale=None)
        return replace(bare, bypass=False, activation=False)

    layers = [rounded(layer) if layer.action == "binary" else layer for layer in plan.layers]
    return replace(plan, layers=layers, activations=[], blocks=[])


# In the order of what they cost.
_ALL = (
    Precision(BINARY, None, lambda plan: plan),
    Precision(TWO_BITS, {"act_bits": 2}, _two_bits),
    Precision(INT8, "int8", _int8),
    Precision(FLOAT, "keep", None),
)
PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in _ALL}


def precision_called(name: str) -> Precision:
    """The precision of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"there is no precision {name!r}{near(name, list(PRECISIONS))}")
    return PRECISIONS[name]


def students(network: nn.Module, plan: Plan, names: Iterable[str]) -> dict[str, nn.Module]:
    """The full-precision network rewritten in each precision but its own, with its own weights, in evaluation mode."""
    found = {}
    for name in names:
        planned = precision_called(name).planned
        if planned is not None:
            found[name] = apply_plan(copy_model(network), planned(plan)).eval()
    return found


def branches_of(students: Mapping[str, nn.Module]) -> dict[str, dict[str, Branch]]:
    """Precision -> path -> branch, of the layers that have a precision of their own in it."""
    found: dict[str, dict[str, Branch]] = {}
    for name, student in students.items():
        if name == INT8:
            found[name] = {path: _Rounded(layer) for path, layer in int8_layers(student)}
            continue
        wanted = 2 if name == TWO_BITS else None
        found[name] = {
            path: _Binary(layer) for path, layer in binary_layers(student) if wanted in (None, layer.binarizer.planes)
        }
    return found
