"""Parameters, bits, bytes and operations of a network, per layer and in total, as the literature counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bidensify.nn import BinaryLayer
from bidensify.rewrite.kinds import macs_of
from bidensify.rewrite.record import record
from bidensify.rewrite.recorded import TensorSpec

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
        elementwise: other operations per sample (norms, activations, binarizers, bypasses).
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


@dataclass(frozen=True)
class Summary:
    """All layers and their totals. ``state`` is "LATENT" (float computes the bits), "PACKED" or "FLOAT"."""

    layers: tuple[LayerSummary, ...]
    state: str
    input_size: tuple[int, ...]

    def total(self, name: str) -> float:
        """The sum of one of ``LayerSummary``'s fields or properties over all layers."""
        return float(sum(getattr(layer, name) for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able totals."""
        names = ("binary_params", "float_params", "binary_macs", "float_macs", "elementwise")
        totals: dict[str, Any] = {name: int(self.total(name)) for name in names}
        totals.update(params=self.total("params"), bytes=int(self.total("bytes")), ops=self.total("ops"))
        return {"state": self.state, "input_size": list(self.input_size), **totals}

    def table(self) -> Table:
        """A rich table with a row per layer and a total."""
        from rich.table import Table

        table = Table(title=f"{self.state}, input {'×'.join(str(n) for n in self.input_size)}")
        for column in ("layer", "kind"):
            table.add_column(column, overflow="fold")
        columns = ("binary_params", "float_params", "bytes", "binary_macs", "float_macs", "ops")
        for column in columns:
            table.add_column(column, justify="right")
        for layer in self.layers:
            table.add_row(layer.path, layer.kind, *(f"{getattr(layer, name):,.0f}" for name in columns))
        table.add_section()
        table.add_row("total", "", *(f"{self.total(name):,.0f}" for name in columns), style="bold")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _own_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module._parameters.values() if p is not None)


def summary(model: nn.Module, input_size: Sequence[int]) -> Summary:
    """Counts parameters and operations of a float, latent or packed network.

    OPs = full-precision MACs · 2 + binary MACs · 2 / 64 + elementwise work; Params = full-precision + binary / 32.

    Args:
        model: the network.
        input_size: (C, H, W) of one sample or (N, C, H, W); counts are per sample.
    """
    size = tuple(int(n) for n in input_size)
    if len(size) == 3:
        size = (2, *size)
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    run = record(model, torch.zeros(size, dtype=reference.dtype, device=reference.device))
    outputs: dict[str, list[tuple[int, ...]]] = {}
    for node in run.graph.nodes:
        spec = node.meta.get("spec")
        if node.op == "call_module" and isinstance(spec, TensorSpec):
            outputs.setdefault(str(node.target), []).append(spec.shape)
    rows: list[LayerSummary] = []
    states = {"FLOAT"}
    for path, module in run.modules.items():
        packed = getattr(module, "packed_facts", None)
        shapes = outputs.get(path, [])
        numel = sum(_numel(shape) for shape in shapes)
        if isinstance(module, BinaryLayer):
            states.add("LATENT")
            weights = module.latent_weight.numel()
            macs = sum(macs_of(module, shape) for shape in shapes)
            parts = sum(p.numel() for p in module.parameters()) - weights
            # Per output: the scale and BatchNorm, the bypass's add, the activation's three steps; the binarizer's
            # two statistics and the comparison are counted on the output's size too.
            scale = module.weight_binarizer.channel_scale(module.latent_weight)
            parts += 0 if scale is None else scale.numel()
            rows.append(LayerSummary(path, type(module).__name__, weights, parts, macs, 0, 6 * numel))
        elif packed is not None:
            states.add("PACKED")
            facts = packed()
            macs = facts["macs_per_output"] * numel
            rows.append(
                LayerSummary(path, type(module).__name__, facts["binary"], facts["float"], int(macs), 0, 6 * numel)
            )
        elif any(path.startswith(row.path + ".") for row in rows if row.binary_params):
            continue
        elif _own_parameters(module) or (shapes and path in outputs):
            is_layer = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
            macs = sum(macs_of(module, shape) for shape in shapes) if is_layer else 0
            work = 0 if is_layer else numel
            rows.append(LayerSummary(path, type(module).__name__, 0, _own_parameters(module), 0, macs, work))
    state = "PACKED" if "PACKED" in states else "LATENT" if "LATENT" in states else "FLOAT"
    return Summary(tuple(rows), state, size[1:])


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape[1:]:
        count *= size
    return count
