"""The measured milliseconds of each layer in each precision, read from a file: data, checked by a schema."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from bidensify._util.names import near
from bidensify.errors import ConfigError, FormatError

__all__ = ["LayerTimes"]

_Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Benched(BaseModel):
    """A row of ``bidensify bench NETWORK --layers --out FILE``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    layer: str
    geometry: str = ""
    threads: int
    ms: dict[str, _Milliseconds]


# What bench calls the precisions.
_NAMES = {"packed": "binary", "openvino int8": "int8"}


class LayerTimes(BaseModel):
    """Times of one machine, runtime and input size.

    Attributes:
        rest: milliseconds of the network outside of these layers; 0 where only layers were timed.
        layers: path -> precision ("binary", "float", ...) -> milliseconds.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    rest: _Milliseconds
    layers: dict[str, dict[str, _Milliseconds]]

    @classmethod
    def _of_bench(cls, text: str) -> LayerTimes:
        rows = sorted(TypeAdapter(list[_Benched]).validate_json(text), key=lambda row: -row.threads)
        named: dict[str, dict[str, float]] = {}
        for row in rows:
            bits = "act_bits 2" if row.geometry.endswith("act_bits 2") else _NAMES["packed"]
            found = {bits if name == "packed" else _NAMES.get(name, name): ms for name, ms in row.ms.items()}
            named.setdefault(row.layer, {}).update(found)
        return cls(rest=0.0, layers=named)

    @classmethod
    def load(cls, path: str | os.PathLike[str], paths: Sequence[str]) -> LayerTimes:
        """Reads a table, its own or one of ``bench --layers``, and checks that it knows every layer of ``paths``.

        Of several numbers of threads in one file the smallest counts.

        Raises:
            ConfigError: there is no such file, or it is of another network.
            FormatError: it is no such table.
        """
        file = Path(path)
        if not file.is_file():
            raise ConfigError(
                f"there is no table of milliseconds {str(file)!r}; measure one on the machine that will run it"
            )
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
            found = cls._of_bench(text) if text.lstrip().startswith("[") else cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise FormatError(
                f"{str(file)!r} is no table of milliseconds: {where}: {first['msg']}; it holds "
                '{"rest": ms, "layers": {"PATH": {"binary": ms, "float": ms}}}, or what bench --layers --out wrote'
            ) from error
        for name in paths:
            if name not in found.layers:
                raise ConfigError(
                    f"the table {str(file)!r} has no milliseconds of the layer {name!r}{near(name, list(found.layers))}; it may "
                    "be of another network"
                )
        return found

    def of(self, path: str, precision: str) -> float | None:
        """Milliseconds of a layer; None where that precision was not measured."""
        return self.layers[path].get(precision)
