"""What an allocation may cost, or lose: a schema, the same in Python, in a recipe and on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bidensify._util.names import near
from bidensify.errors import ConfigError
from bidensify.precisions.precision import PRECISIONS

__all__ = ["BOUNDS", "Budget", "read_budget"]

BOUNDS = ("macs", "ops", "bytes", "ms", "accuracy")
_Share = Annotated[float, Field(gt=0, le=1)]


class Budget(BaseModel):
    """Bounds, one or several, that must all hold.

    Attributes:
        macs, ops, bytes: at most this share of the full-precision network's float multiply-accumulates, operations, bytes of
            parameters.
        ms: at most so many milliseconds, by the ``table``.
        accuracy: lose at most so much of the task's primary metric, in its own unit, at the least cost.
        minimize: with ``accuracy``, which cost is the least; by default milliseconds where they are known, else operations.
        precisions: what layers may have beside "binary" and "float"; by default all that were measured.
        by: what counts as harm: the metric, or the distance to the teacher, which hears more (the default where it is known).
        table: in a recipe, the file of measured milliseconds.
        images: in a recipe, how many validation images are measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    macs: _Share | None = None
    ops: _Share | None = None
    bytes: _Share | None = None
    ms: Annotated[float, Field(gt=0)] | None = None
    accuracy: Annotated[float, Field(ge=0)] | None = None
    minimize: Literal["macs", "ops", "bytes", "ms"] | None = None
    precisions: tuple[str, ...] | None = None
    by: Literal["metric", "distance"] | None = None
    table: str | None = None
    images: Annotated[int, Field(ge=1)] = 128

    @model_validator(mode="after")
    def _bounds(self) -> Budget:
        if not self.bounds:
            raise ValueError(f"a budget needs a bound: {', '.join(BOUNDS)}")
        if self.minimize is not None and self.accuracy is None:
            raise ValueError(
                f"minimize={self.minimize!r} goes with accuracy: under a bound of cost, accuracy is the aim"
            )
        for name in self.precisions or ():
            if name not in PRECISIONS:
                raise ValueError(f"there is no precision {name!r}{near(name, list(PRECISIONS))}")
        return self

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are given."""
        return {name: value for name in BOUNDS if (value := getattr(self, name)) is not None}


def read_budget(budget: Budget | Mapping[str, Any] | None = None, **bounds: Any) -> Budget:
    """A budget from a mapping or from keywords.

    Raises:
        ConfigError: it breaks the schema.
    """
    if isinstance(budget, Budget) and not bounds:
        return budget
    if budget is not None and not isinstance(budget, (Budget, Mapping)):
        raise ConfigError(f"budget={budget!r} must be a mapping of bounds, for example {{'ops': 0.2}}")
    given = {
        **(budget.model_dump(exclude_defaults=True) if isinstance(budget, Budget) else dict(budget or {})),
        **bounds,
    }
    try:
        return Budget.model_validate(given)
    except ValidationError as error:
        raise ConfigError("; ".join(complaints(error))) from error


def complaints(error: ValidationError) -> list[str]:
    """What is wrong with a budget, a line each."""
    found = []
    for item in error.errors(include_url=False):
        name = ".".join(("budget", *map(str, item["loc"])))
        if item["type"] == "extra_forbidden":
            found.append(f"{name}: unknown key{near(str(item['loc'][-1]), list(Budget.model_fields))}")
        else:
            message = str(item["msg"]).removeprefix("Value error, ")
            found.append(f"{name}={item['input']!r}: {message}" if item["loc"] else f"{name}: {message}")
    return found
