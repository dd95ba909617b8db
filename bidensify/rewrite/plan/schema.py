"""The plan: everything that a rewrite does, as data with a JSON round trip."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, PlainValidator, TypeAdapter, ValidationError

from bidensify._util.terminal import as_text
from bidensify.config import BidensifyConfig, name_of_1
from bidensify.errors import PlanError
from bidensify.rewrite.fields import MANY, STRICT, Count, Text
from bidensify.rewrite.plan.entries import ActivationPlan, BlockPlan, LayerPlan
from bidensify.rewrite.plan.version_1 import from_version_1

if TYPE_CHECKING:
    from rich.table import Table

    from bidensify.rewrite.plan.times import Table as Times

__all__ = ["Plan"]

PLAN_VERSION = 2


def _differing(item: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(item)}
    return {name: value for name, value in dataclasses.asdict(item).items() if value != defaults[name]}


def _config(data: Any) -> BidensifyConfig:
    return data if isinstance(data, BidensifyConfig) else BidensifyConfig.from_dict(data)


@dataclass
class Plan:
    """Everything that a rewrite does; replaying it needs neither data nor a forward pass.

    Attributes:
        model_class: the network's class name.
        config: the configuration that it was planned under.
        layers: every convolution and linear layer, in order of first call, then those never called.
        activations: modules whose role changes at their path.
        blocks: blocks whose code changes.
        notes: what could not be done, and why.
        inputs: the example inputs, as text.
        fingerprint: of the full-precision network (names and shapes of its state_dict).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model_class: Text
    config: Annotated[BidensifyConfig, PlainValidator(_config)]
    layers: Annotated[list[LayerPlan], MANY]
    activations: Annotated[list[ActivationPlan], MANY] = field(default_factory=list)
    blocks: Annotated[list[BlockPlan], MANY] = field(default_factory=list)
    notes: Annotated[list[Text], MANY] = field(default_factory=list)
    rule_matches: dict[Text, Count] = field(default_factory=dict)
    inputs: Text = ""
    fingerprint: Text = ""

    @property
    def binary(self) -> list[LayerPlan]:
        """The layers that become binary."""
        return [layer for layer in self.layers if layer.action == "binary"]

    @property
    def kept(self) -> list[LayerPlan]:
        """The layers that stay as they are, in full precision or rounded to int8, each with its reason."""
        return [layer for layer in self.layers if layer.action != "binary"]

    @property
    def int8(self) -> list[LayerPlan]:
        """The layers that compute in int8."""
        return [layer for layer in self.layers if layer.int8]

    def binary_mac_share(self, *, eligible_only: bool = False) -> float:
        """Share of multiply-accumulates that are binary, over all layers or over the eligible ones."""
        layers = [layer for layer in self.layers if layer.eligible or not eligible_only]
        total = sum(layer.macs for layer in layers)
        return sum(layer.macs for layer in layers if layer.action == "binary") / total if total else 0.0

    def to_dict(self, *, compact: bool = False) -> dict[str, Any]:
        """JSON-able form with a ``version``.

        Args:
            compact: leave out what has its default value; ``from_dict`` reads both forms.
        """
        data = _differing if compact else dataclasses.asdict
        return {
            "version": PLAN_VERSION,
            "model_class": self.model_class,
            "inputs": self.inputs,
            "fingerprint": self.fingerprint,
            "config": self.config.to_dict(),
            "layers": [data(layer) for layer in self.layers],
            "activations": [data(item) for item in self.activations],
            "blocks": [data(block) | {"edits": [data(edit) for edit in block.edits]} for block in self.blocks],
            "notes": list(self.notes),
            "rule_matches": dict(self.rule_matches),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The reverse of ``to_dict``; plans of version 1 are read too.

        Raises:
            PlanError: an unknown version, or a field that is missing, unknown or of another kind; the message names it.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"the plan is a {type(data).__name__}, not an object; plan again")
        fields = dict(data)
        version = fields.pop("version", None)
        if version not in (1, PLAN_VERSION) or isinstance(version, bool):
            raise PlanError(
                f"the plan has version {str(version)[:40]!r}; this release reads 1 and {PLAN_VERSION}: update bidensify"
            )
        try:
            # As JSON text: a file's lists become tuples there, and nothing but plain values comes through.
            text = json.dumps(from_version_1(fields) if version == 1 else fields, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"the plan is no plain data ({str(error)[:120]}); plan again") from error
        try:
            plan = _reader().validate_json(text)
        except ValidationError as error:
            raise PlanError(_complaint(error)) from error
        if fields["config"].get("version") == 1:
            plan.layers = [dataclasses.replace(layer, method=name_of_1(layer.method)) for layer in plan.layers]
        return plan

    def moved(self, prefix: str, *, out: bool = False) -> Plan:
        """The plan of a network that has this plan's network as its child ``prefix``; with ``out`` the plan of that child."""

        def move(path: str | None) -> str | None:
            if path is None:
                return None
            if not out:
                return f"{prefix}.{path}" if path else prefix
            return "" if path == prefix else path.removeprefix(f"{prefix}.")

        def moved(item: Any) -> Any:
            names = [name for name in ("path", "norm", "layer_scale", "slope_from") if hasattr(item, name)]
            new: dict[str, Any] = {name: move(getattr(item, name)) for name in names}
            if isinstance(item, BlockPlan):
                new["modules"] = {name: moved(child) for name, child in item.modules.items()}
            return dataclasses.replace(item, **new)

        def inside(items: Sequence[Any]) -> list[Any]:
            return [moved(item) for item in items if not out or f"{item.path}.".startswith(f"{prefix}.")]

        return dataclasses.replace(
            self, layers=inside(self.layers), activations=inside(self.activations), blocks=inside(self.blocks)
        )

    def table(self, times: Times | None = None) -> Table:
        """A rich table: layer, kind (where there are several), shape, output, millions of MACs per sample and their share of
        all, action, reason, way. Names stand as text: a square bracket in one is no markup.

        Args:
            times: this machine's measured layers (``plan.times.read_times``): the milliseconds that each saves as bits.
        """
        from rich.table import Table
        from rich.text import Text

        share = 100 * self.binary_mac_share()
        rules = "".join(
            f"\nrule {match!r} matches {count} layer{'s' * (count != 1)}" for match, count in self.rule_matches.items()
        )
        table = Table(
            title=Text(
                f"{self.model_class}: {len(self.binary)} of {len(self.layers)} layers binary, {share:.1f} % of MACs"
                + (f"; {len(self.int8)} in int8" if self.int8 else "")
            ),
            caption=Text(f"recorded on {self.inputs}{rules}" + "".join(f"\n{note}" for note in self.notes)),
        )
        kinds = len({layer.kind for layer in self.layers}) > 1
        for column in ("layer", "kind", "shape", "output") if kinds else ("layer", "shape", "output"):
            table.add_column(column, overflow="fold")
        saved = () if times is None else ("ms saved",)
        for column in ("MMACs", "%", *saved):
            table.add_column(column, justify="right", no_wrap=True)
        whole = sum(layer.macs for layer in self.layers) or 1
        for column in ("action", "reason", "way"):
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            style = None if layer.action == "binary" else "yellow"
            what = (layer.kind, layer.shape) if kinds else (layer.shape,)
            action = layer.method or ("int8" if layer.int8 else "keep")
            output = "×".join(str(n) for n in layer.output)
            macs = (f"{layer.macs / 1e6:.1f}", f"{100 * layer.macs / whole:.1f}")
            row = times.of(layer) if times is not None else None
            gain = tuple(f"{row.saved:.2f}" if row is not None else "" for _ in saved)
            cells = (layer.path, *what, output, *macs, *gain, action, layer.reason, layer.way)
            table.add_row(*map(Text, cells), style=style)
        return table

    def __str__(self) -> str:
        return as_text(self.table())


@functools.cache
def _reader() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


def _complaint(error: ValidationError) -> str:
    """The first fault: which field, what it held, which rule it broke."""
    first = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{str(part)[:80]}" for part in first["loc"])
    if first["type"] == "missing":
        return f"the plan is not whole: {where[1:]} is missing; plan again"
    if first["type"] == "unexpected_keyword_argument":
        return f"the plan has the unknown key {where[1:]}; it may be of a newer release: update bidensify"
    return (
        f"the plan's {where[1:]}={str(first['input'])[:80]!r}: {first['msg'].removeprefix('Value error, ')}; plan again"
    )
