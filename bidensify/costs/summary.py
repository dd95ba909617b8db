"""Parameters, bits, bytes and operations of a network, per layer and in total, as the literature counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bidensify._util.tables import as_text
from bidensify.costs import work
from bidensify.errors import ConfigError, PlanError
from bidensify.nn import BinaryLayer, FrozenLayer
from bidensify.rewrite.plan.kinds import macs_of
from bidensify.rewrite.record.recorder import record

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerSummary", "Summary", "summary"]


@dataclass(frozen=True)
class LayerSummary:
    """One layer.

    Attributes:
        path, kind: module path, class name.
        binary_params: weights of one bit.
        float_params: parameters of 32 bits.
        binary_macs, float_macs: multiply-accumulates per sample.
        elementwise: other operations per sample (norms, activations, binarizers, bypasses, additions).
    """

    path: str
    kind: str
    binary_params: int
    float_params: int
    binary_macs: int
    float_macs: int
    elementwise: int

    @property
    def params(self) -> float:
        """Full-precision parameters plus binary ones / 32."""
        return self.float_params + self.binary_params / 32

    @property
    def bits(self) -> int:
        """Bits that the layer's parameters need."""
        return 32 * self.float_params + self.binary_params

    @property
    def bytes(self) -> int:
        """Bytes that the layer's parameters need."""
        return 4 * self.float_params + -(-self.binary_params // 8)

    @property
    def ops(self) -> float:
        """Full-precision MACs · 2 + binary MACs · 2 / 64 + elementwise work."""
        return 2 * self.float_macs + 2 * self.binary_macs / 64 + self.elementwise


# Title, field, power of ten.
_COLUMNS = (
    ("1-bit\nparams", "binary_params", 0),
    ("float\nparams", "float_params", 0),
    ("bytes", "bytes", 0),
    ("1-bit\nMMACs", "binary_macs", 6),
    ("float\nMMACs", "float_macs", 6),
    ("MOPs", "ops", 6),
)


@dataclass(frozen=True)
class Summary:
    """All layers and their totals.

    Attributes:
        layers: a row per layer, and per block whose own code computes (attention, additions).
        state: "LATENT" (float computes the bits), "PACKED" or "FLOAT".
        input_size: one sample's (C, H, W).
        uncounted: functions whose multiply-accumulates could not be counted, with the reason.
    """

    layers: tuple[LayerSummary, ...]
    state: str
    input_size: tuple[int, ...]
    uncounted: tuple[str, ...] = ()

    def total(self, name: str) -> float:
        """The sum of one of ``LayerSummary``'s fields or properties over all layers."""
        return float(sum(getattr(layer, name) for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able totals."""
        names = ("binary_params", "float_params", "binary_macs", "float_macs", "elementwise")
        totals: dict[str, Any] = {name: int(self.total(name)) for name in names}
        totals.update(params=self.total("params"), bytes=int(self.total("bytes")), ops=self.total("ops"))
        totals["uncounted"] = list(self.uncounted)
        return {"state": self.state, "input_size": list(self.input_size), **totals}

    def table(self) -> Table:
        """A rich table with a row per layer and a total; MACs and OPs in millions per sample."""
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"{self.state}, input {'×'.join(str(n) for n in self.input_size)}",
        )
        if self.uncounted:
            table.caption = "not counted: " + "; ".join(self.uncounted)
        # These two alone give way in a narrow terminal: a figure that is cut would be another figure.
        table.add_column("layer", overflow="fold")
        table.add_column("kind", overflow="fold")
        for title, _, _ in _COLUMNS:
            table.add_column(title, justify="right", no_wrap=True)

        def cells(value: Callable[[str], float]) -> list[str]:
            return [f"{value(name) / 10**power:,.{power // 3}f}" for _, name, power in _COLUMNS]

        for layer in self.layers:
            table.add_row(layer.path, layer.kind, *cells(partial(getattr, layer)))
        table.add_section()
        table.add_row("total", "", *cells(self.total), style="bold")
        return table

    def __str__(self) -> str:
        return as_text(self.table())


def summary(model: nn.Module, input_size: Sequence[int]) -> Summary:
    """Counts parameters and operations of a float, latent or packed network.

    OPs = full-precision MACs · 2 + binary MACs · 2 / 64 + elementwise work; Params = full-precision + binary / 32.
    Elementwise work per element: a binarizer 4 with statistics and 1 without, scale and bias 2, a norm 2, a bypass 1,
    RPReLU 3, every other function or module 1, what only moves data 0.

    Args:
        model: the network; it is left as it was.
        input_size: (C, H, W) of one sample or (N, C, H, W); counts are per sample.

    Raises:
        ConfigError: ``input_size`` is no such size.
        PlanError: ``model`` is no network, or does not run on such an input.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"summary: {type(model).__name__} is no nn.Module; give the network")
    size = tuple(input_size) if isinstance(input_size, Sequence) else ()
    if len(size) not in (3, 4) or not all(isinstance(n, int) and n > 0 for n in size):
        raise ConfigError(
            f"summary: input_size={input_size!r} must be positive integers, (C, H, W) of one sample or (N, C, H, W)"
        )
    if len(size) == 3:
        size = (2, *size)
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    run = record(model, torch.zeros(size, dtype=reference.dtype, device=reference.device))
    calls = work.calls_of(run)
    functions, uncounted = work.functions_of(run)
    rows: list[LayerSummary] = []
    inside: tuple[str, ...] = ()
    states = {"FLOAT"}
    for path, module in run.modules.items():
        if path.startswith(inside):
            continue
        frozen = isinstance(module, FrozenLayer)
        kind = type(module).__name__
        if isinstance(module, BinaryLayer) or frozen:
            inside = (*inside, path + ".")
            row = _latent(module, calls[path]) if isinstance(module, BinaryLayer) else _packed(module, calls[path])
            states.add("LATENT" if isinstance(module, BinaryLayer) else "PACKED")
            rows.append(LayerSummary(path, kind, *row))
            continue
        own = sum(p.numel() for p in module._parameters.values() if p is not None)
        macs, elements = functions.get(path, (0, 0))
        for call in calls[path]:
            more, other = work.layer_work(module, call)
            macs, elements = macs + more, elements + other
        if own or macs or elements or (calls[path] and not isinstance(module, nn.Identity)):
            rows.append(LayerSummary(path or "(model)", kind, 0, own, 0, macs, elements))
    state = "PACKED" if "PACKED" in states else "LATENT" if "LATENT" in states else "FLOAT"
    return Summary(tuple(rows), state, size[1:], uncounted)


def _latent(layer: BinaryLayer, calls: Sequence[work.LayerCall]) -> tuple[int, int, int, int, int]:
    """(binary parameters, float parameters, binary MACs, float MACs, elementwise) as the packed layer will have them."""
    weights = layer.latent_weight.numel()
    floats = sum(p.numel() for p in layer.parameters()) - weights
    if layer.weight_binarizer.scaled:
        floats += len(layer.weight_binarizer.rows(layer.latent_weight))
    macs = elements = 0
    for call in calls:
        macs += macs_of(layer, call.output)
        elements += work.numel(call.input) * layer.binarizer.work
        after = 2 + (layer.bypass is not None) + work.per_element(layer.activation)
        elements += work.numel(call.output) * after
    return weights, floats, macs, 0, elements


def _packed(layer: Any, calls: Sequence[work.LayerCall]) -> tuple[int, int, int, int, int]:
    facts = layer.counts()
    floats = facts.float_params + sum(p.numel() for p in layer.parameters())
    macs = sum(round(facts.macs_per_output * work.numel(call.output)) for call in calls)
    elements = sum(
        work.numel(call.input) * facts.work_per_input + work.numel(call.output) * facts.work_per_output
        for call in calls
    )
    return facts.binary_params, floats, macs, 0, elements
