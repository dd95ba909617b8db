"""The precisions that a layer may have: what a rule asks for, what it costs, and how a layer of the float network takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bidensify._util.names import near
from bidensify.costs.rows import LayerSummary
from bidensify.errors import ConfigError
from bidensify.nn import BinaryLayer, binary_layers
from bidensify.nn.used_weight import copy_model
from bidensify.rewrite.apply.model import apply_plan
from bidensify.rewrite.plan.schema import Plan

__all__ = ["BINARY", "FLOAT", "PRECISIONS", "Branch", "Precision", "precision_called"]

BINARY, FLOAT = "binary", "float"


class Branch:
    """A layer's sums in some precision, where its float convolution was; norm, bypass and activation are not part of it.

    Attributes:
        dim: which dimension of its result is that of the channels.
    """

    dim: int = 1

    def begin(self) -> None:
        """Starts calibration: what is then given to ``observe`` is what the float network gives the layer."""

    def observe(self, x: Tensor) -> None:
        """Sees the layer's input on a batch of calibration images."""

    def end(self) -> None:
        """Ends calibration."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What stands for the float layer's result on the same arguments, up to a scale and a shift per channel."""
        raise NotImplementedError


class _BinaryBranch(Branch):
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


def _binary(teacher: nn.Module, plan: Plan) -> dict[str, Branch]:
    student = apply_plan(copy_model(teacher), plan).eval()
    return {path: _BinaryBranch(layer) for path, layer in binary_layers(student)}


@dataclass(frozen=True)
class Precision:
    """One precision of a layer.

    Attributes:
        name: "binary", "float", ...
        action: what a :class:`bidensify.Rule` gives the layers that are to have it; None where the defaults do.
        branches: of the plan's binary layers by path, with the weights of the full-precision network that is given; None of the
            full-precision network's own precision.
        macs: multiply-accumulates in full precision that a layer has in it, of what is counted of the binary layer.
        ops, bytes: the same of operations, and of bytes of parameters.
    """

    name: str
    action: str | Mapping[str, Any] | None
    branches: Callable[[nn.Module, Plan], dict[str, Branch]] | None
    macs: Callable[[LayerSummary], float]
    ops: Callable[[LayerSummary], float]
    bytes: Callable[[LayerSummary], float]


# In the order of what they cost.
_ALL = (
    Precision(BINARY, None, _binary, lambda row: 0, lambda row: row.ops, lambda row: row.bytes),
    Precision(
        FLOAT,
        "keep",
        None,
        lambda row: row.binary_macs,
        lambda row: 2 * row.binary_macs + row.elementwise,
        lambda row: 4 * (row.binary_params + row.float_params),
    ),
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
