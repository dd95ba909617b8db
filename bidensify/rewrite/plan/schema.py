"""The plan: what a rewrite does to each layer, activation and block, as data with a JSON round trip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from bidensify._util.tables import as_text
from bidensify.config import BidensifyConfig
from bidensify.errors import PlanError
from bidensify.rewrite.blocks.edit import BlockEdit

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ActivationPlan", "BlockPlan", "LayerPlan", "Plan"]

PLAN_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """One convolution or linear layer.

    Attributes:
        path: module path.
        kind: "conv2d", "conv_transpose2d", "linear" or "function".
        in_channels, out_channels: C_in, C_out.
        kernel_size, stride: (height, width) each.
        groups: of the convolution.
        output: (H, W) of the recorded output, or its token shape.
        macs: multiply-accumulates per sample over all calls of the record.
        calls: how often the record called it.
        action: "binary" or "keep".
        reason: why.
        way: "path" (exchanged where it stands) or "block" (its block's code changes too); empty if kept.
        method: the method's name; empty if kept.
        act_scale: granularity of the activation scale.
        bypass: whether the layer has its own full-precision bypass.
        norm: path of the BatchNorm that it absorbs, or None (it then gets one of its own).
        activation: whether the activation behind it becomes its own.
        layer_scale: path of the parameter (LayerScale's gamma) that its BatchNorm absorbs, or None.
        makes_weight: whether the layer's own code makes the weight that it convolves with (weight standardisation, a
            parametrization, a hook); what it makes is binarized.
        eligible: False for what is kept by default (stem, predictor, 1×1 map, gate, never called).
    """

    path: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    output: tuple[int, ...]
    macs: int
    calls: int
    action: str
    reason: str
    way: str = ""
    method: str = ""
    act_scale: str = "per_tensor"
    bypass: bool = False
    norm: str | None = None
    activation: bool = False
    layer_scale: str | None = None
    makes_weight: bool = False
    eligible: bool = True

    @property
    def shape(self) -> str:
        """The layer's geometry as short text: "3×3 64→128 /2"."""
        text = "×".join(str(k) for k in self.kernel_size) + f" {self.in_channels}→{self.out_channels}"
        if max(self.stride, default=1) > 1:
            text += f" /{max(self.stride)}"
        if self.groups > 1:
            text += f" g{self.groups}"
        return text


@dataclass(frozen=True)
class ActivationPlan:
    """One module whose role changes at its own path.

    Attributes:
        path: module path.
        action: "replace" (the method's activation of ``channels``), "absorbed" (its work moved into a binary layer: it
            hands its input through), "by_width" (called on several widths: the method's activation for each of ``widths``,
            the network's own for any other) or "norm" (a fused norm+act whose norm was absorbed: its activation alone stays).
        channels: C.
        dim: the channel dimension, 1 or -1.
        method: whose activation.
        widths: of "by_width".
    """

    path: str
    action: str
    channels: int = 0
    dim: int = 1
    method: str = ""
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockPlan:
    """One block whose code changes.

    Attributes:
        path: module path of the block ("" is the network itself).
        edits: what changes, by step of its trace.
        varying: names of the arguments that the generated code takes.
        constants: arguments that it was specialised to.
        modules: new children by name: (channels, dim, method) of an activation each.
        notes: what the edits do, in words.
    """

    path: str
    edits: tuple[BlockEdit, ...]
    varying: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, tuple[int, int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


_T = TypeVar("_T")


def _differing(item: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(item)}
    return {name: value for name, value in dataclasses.asdict(item).items() if value != defaults[name]}


def _load(cls: type[_T], data: Mapping[str, Any]) -> _T:
    known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlanError(
            f"the plan's {cls.__name__} has unknown keys {', '.join(unknown)}; it may be of a newer release"
        )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise PlanError(f"the plan's {cls.__name__} is not whole: {error}") from error


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

    model_class: str
    config: BidensifyConfig
    layers: list[LayerPlan]
    activations: list[ActivationPlan] = field(default_factory=list)
    blocks: list[BlockPlan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rule_matches: dict[str, int] = field(default_factory=dict)
    inputs: str = ""
    fingerprint: str = ""

    @property
    def binary(self) -> list[LayerPlan]:
        """The layers that become binary."""
        return [layer for layer in self.layers if layer.action == "binary"]

    @property
    def kept(self) -> list[LayerPlan]:
        """The layers that stay in full precision, each with its reason."""
        return [layer for layer in self.layers if layer.action != "binary"]

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
            "blocks": [
                {
                    "path": block.path,
                    "edits": [data(edit) for edit in block.edits],
                    "varying": list(block.varying),
                    "constants": dict(block.constants),
                    "modules": {name: list(value) for name, value in block.modules.items()},
                    "notes": list(block.notes),
                }
                for block in self.blocks
            ],
            "notes": list(self.notes),
            "rule_matches": dict(self.rule_matches),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The reverse of ``to_dict``.

        Raises:
            PlanError: an unknown version or key, or a part missing.
        """
        if data.get("version") != PLAN_VERSION:
            raise PlanError(
                f"the plan has version {data.get('version')!r}; this release reads {PLAN_VERSION}: update bidensify"
            )
        try:
            blocks = [
                BlockPlan(
                    path=block["path"],
                    edits=tuple(_load(BlockEdit, edit) for edit in block["edits"]),
                    varying=tuple(str(name) for name in block["varying"]),
                    constants=dict(block["constants"]),
                    modules={name: (int(v[0]), int(v[1]), str(v[2])) for name, v in block["modules"].items()},
                    notes=tuple(block.get("notes", ())),
                )
                for block in data["blocks"]
            ]
            return cls(
                model_class=data["model_class"],
                config=BidensifyConfig.from_dict(data["config"]),
                layers=[_load(LayerPlan, layer) for layer in data["layers"]],
                activations=[_load(ActivationPlan, item) for item in data["activations"]],
                blocks=blocks,
                notes=list(data.get("notes", ())),
                rule_matches=dict(data.get("rule_matches", {})),
                inputs=str(data.get("inputs", "")),
                fingerprint=str(data.get("fingerprint", "")),
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise PlanError(f"the plan is not whole ({type(error).__name__}: {error}); plan again") from error

    def table(self) -> Table:
        """A rich table: layer, kind (where there are several), shape, millions of MACs per sample, action, reason, way."""
        from rich.table import Table

        share = 100 * self.binary_mac_share()
        rules = "".join(
            f"\nrule {match!r} matches {count} layer{'s' * (count != 1)}" for match, count in self.rule_matches.items()
        )
        table = Table(
            title=f"{self.model_class}: {len(self.binary)} of {len(self.layers)} layers binary, {share:.1f} % of MACs",
            caption=f"recorded on {self.inputs}{rules}" + "".join(f"\n{note}" for note in self.notes),
        )
        kinds = len({layer.kind for layer in self.layers}) > 1
        for column in ("layer", "kind", "shape") if kinds else ("layer", "shape"):
            table.add_column(column, overflow="fold")
        table.add_column("MMACs", justify="right")
        for column in ("action", "reason", "way"):
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            style = None if layer.action == "binary" else "yellow"
            what = (layer.kind, layer.shape) if kinds else (layer.shape,)
            action = layer.method or "keep"
            table.add_row(layer.path, *what, f"{layer.macs / 1e6:.1f}", action, layer.reason, layer.way, style=style)
        return table

    def __str__(self) -> str:
        return as_text(self.table())
