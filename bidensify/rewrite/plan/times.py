"""Milliseconds of layers on one machine: the table that ``bidensify bench NETWORK --layers`` measures and a plan reads.

A row is a geometry, not a place in a network, so that networks share rows. The table is one JSON file per user
(``BIDENSIFY_LAYER_TIMES`` names another).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bidensify._util.files import atomic_write
from bidensify._util.machine import cpu_name
from bidensify.errors import FormatError
from bidensify.rewrite.fields import MANY, STRICT, Size, Text
from bidensify.rewrite.plan.entries import LayerPlan

__all__ = ["Times", "geometry", "geometry_of", "read_times", "times_path", "write_times"]

VARIABLE = "BIDENSIFY_LAYER_TIMES"


@dataclass(frozen=True, config=STRICT)
class Times:
    """One geometry on one output size: medians of interleaved runs, one image.

    Attributes:
        geometry: see ``geometry``.
        output: (H, W), or the number of tokens.
        threads: that it ran on.
        ms: "float" (the layer, its norm and ReLU), "packed" and, where it was measured, "openvino int8" (within the network), in
            milliseconds.
        machine: the processor.
    """

    geometry: Text
    output: Annotated[tuple[Size, ...], Field(max_length=8)]
    threads: Size
    ms: Annotated[dict[Text, Annotated[float, Field(gt=0)]], Field(max_length=8)]
    machine: Text

    @property
    def saved(self) -> float:
        """Milliseconds that the layer takes less as bits; below 0 where it takes more."""
        return self.ms["float"] - self.ms["packed"]


_READER: TypeAdapter[list[Times]] = TypeAdapter(Annotated[list[Times], MANY])


def times_path() -> Path:
    """Where this user's table is."""
    named = os.environ.get(VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "bidensify" / "layers.json"


def geometry_of(
    kind: str,
    kernel: Sequence[int],
    in_channels: int,
    out_channels: int,
    stride: Sequence[int],
    groups: int,
    act_bits: int = 1,
) -> str:
    """What tells one row's layers from another's, but for the size of the image."""
    across, step = "x".join(map(str, kernel)), "x".join(map(str, stride))
    text = f"{kind} {across} {in_channels}->{out_channels} stride {step} groups {groups}"
    return text if act_bits == 1 else f"{text} act_bits {act_bits}"


def geometry(layer: LayerPlan) -> str:
    """``geometry_of`` a layer of a plan."""
    return geometry_of(
        layer.kind, layer.kernel_size, layer.in_channels, layer.out_channels, layer.stride, layer.groups, layer.act_bits
    )


class Table:
    """Rows of this machine, found by layer."""

    def __init__(self, rows: Iterable[Times]) -> None:
        self._rows: dict[str, list[Times]] = {}
        for row in rows:
            if row.machine == cpu_name() and {"float", "packed"} <= set(row.ms):
                self._rows.setdefault(row.geometry, []).append(row)

    def of(self, layer: LayerPlan) -> Times | None:
        """The row of the layer's geometry that is nearest in size, with fewer threads first; None where there is none."""
        found = self._rows.get(geometry(layer))
        if not found:
            return None
        wanted = math.log(max(1, math.prod(layer.output)))
        return min(found, key=lambda row: (abs(math.log(max(1, math.prod(row.output))) - wanted), row.threads))


def read_times(path: Path | None = None) -> Table:
    """This machine's rows of a table; an absent file has none.

    Raises:
        FormatError: the file is no table.
    """
    return Table(_read(path or times_path()))


def _read(path: Path) -> list[Times]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        return _READER.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise FormatError(
            f"{str(path)!r} is no table of layers' times ({'.'.join(map(str, first['loc']))}: {first['msg']}); delete it and "
            "measure again: bidensify bench NETWORK --layers"
        ) from error


def write_times(rows: Iterable[Times], path: Path | None = None) -> Path:
    """Adds rows to the table, in place of earlier ones of the same geometry, size, threads and machine."""
    path = path or times_path()
    kept: Mapping[tuple[object, ...], Times] = {_place(row): row for row in [*_read(path), *rows]}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(json.loads(_READER.dump_json(list(kept.values()))), indent=1), encoding="utf-8")
    return path


def _place(row: Times) -> tuple[object, ...]:
    return row.geometry, row.output, row.threads, row.machine
