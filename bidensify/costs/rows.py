"""What ``summary`` counted, and how it is shown: a table, Markdown, JSON."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bidensify._util.terminal import as_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerSummary", "Summary"]


@dataclass(frozen=True)
class LayerSummary:
    """One layer.

    Attributes:
        path, kind: module path, class name.
        binary_params: weights of one bit.
        float_params: parameters of 32 bits.
        binary_macs, float_macs: multiply-accumulates per sample.
        elementwise: other operations per sample (norms, activations, binarizers, bypasses, additions).
        output: shape of one sample's output, the largest of several; empty where nothing was called.
        act_bits: bits of an activation that binary weights meet.
        kept: why the layer stays in full precision, as the plan says; empty where it does not, or there is no plan.
        int8_params, int8_macs: weights of 8 bits, and multiply-accumulates with them.
        product_macs: those of ``float_macs`` that multiply two activations, as attention does; no method binarizes them here.
    """

    path: str
    kind: str
    binary_params: int
    float_params: int
    binary_macs: int
    float_macs: int
    elementwise: int
    output: tuple[int, ...] = ()
    kept: str = ""
    act_bits: int = 1
    product_macs: int = 0
    int8_params: int = 0
    int8_macs: int = 0

    @property
    def params(self) -> float:
        """Full-precision parameters plus int8 ones / 4 and binary ones / 32."""
        return self.float_params + self.int8_params / 4 + self.binary_params / 32

    @property
    def bits(self) -> int:
        """Bits that the layer's parameters need."""
        return 32 * self.float_params + 8 * self.int8_params + self.binary_params

    @property
    def bytes(self) -> int:
        """Bytes that the layer's parameters need."""
        return 4 * self.float_params + self.int8_params + -(-self.binary_params // 8)

    @property
    def ops(self) -> float:
        """Full-precision MACs · 2 + int8 MACs · 2 / 4 + binary MACs · 2 / 64 · bits of an activation + elementwise work."""
        binary = 2 * self.binary_macs * self.act_bits / 64
        return 2 * self.float_macs + self.int8_macs / 2 + binary + self.elementwise


# Title, field, power of ten: the columns of larq's summary, and the literature's OPs.
_COLUMNS = (
    ("1-bit\nparams", "binary_params", 0),
    ("8-bit\nparams", "int8_params", 0),
    ("32-bit\nparams", "float_params", 0),
    ("memory\nbytes", "bytes", 0),
    ("1-bit\nMMACs", "binary_macs", 6),
    ("8-bit\nMMACs", "int8_macs", 6),
    ("32-bit\nMMACs", "float_macs", 6),
    ("MOPs", "ops", 6),
)
_NARROW = 110


@dataclass(frozen=True)
class Summary:
    """All layers and their totals.

    Attributes:
        layers: a row per layer, and per block whose own code computes (attention, additions).
        state: "LATENT" (float computes the bits), "PACKED" or "FLOAT".
        input_size: one sample's (C, H, W).
        uncounted: functions whose multiply-accumulates could not be counted, with the reason.
        file_bytes: what the network's file will weigh, packed where there are binary layers.
    """

    layers: tuple[LayerSummary, ...]
    state: str
    input_size: tuple[int, ...]
    uncounted: tuple[str, ...] = ()
    file_bytes: int = 0

    def total(self, name: str) -> float:
        """The sum of one of ``LayerSummary``'s fields or properties over all layers."""
        return float(sum(getattr(layer, name) for layer in self.layers))

    @property
    def float_bytes(self) -> int:
        """What the same parameters weigh in float32."""
        return 4 * int(self.total("binary_params") + self.total("int8_params") + self.total("float_params"))

    def weight(self) -> str:
        """A line that says what the file will weigh."""
        if not self.total("binary_params"):
            return f"file: about {self.file_bytes:,} bytes"
        return (
            f"packed file: about {self.file_bytes:,} bytes, 1/{self.float_bytes / self.file_bytes:.1f} of the "
            f"{self.float_bytes:,} in float32"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able totals and ``layers``, a row each."""
        names = ("binary_params", "int8_params", "float_params", "binary_macs", "int8_macs", "float_macs")
        totals: dict[str, Any] = {name: int(self.total(name)) for name in (*names, "product_macs", "elementwise")}
        totals.update(params=self.total("params"), bytes=int(self.total("bytes")), ops=self.total("ops"))
        totals.update(file_bytes=self.file_bytes, float_bytes=self.float_bytes, uncounted=list(self.uncounted))
        rows = [
            {**asdict(layer), "output": list(layer.output), "bytes": layer.bytes, "ops": layer.ops}
            for layer in self.layers
        ]
        return {"state": self.state, "input_size": list(self.input_size), **totals, "layers": rows}

    def _shown(self, wide: bool) -> tuple[list[str], list[list[str]]]:
        """(titles, rows) of text, the total last; ``wide`` adds output shapes and reasons."""
        whole = self.total("ops") or 1.0
        # A network without int8 layers has no columns for them.
        columns = [each for each in _COLUMNS if not each[1].startswith("int8") or self.total("int8_params")]

        def cells(path: str, kind: str, output: str, value: Callable[[str], float], kept: str) -> list[str]:
            figures = [f"{value(name) / 10**power:,.{power // 3}f}" for _, name, power in columns]
            figures.append(f"{100 * value('ops') / whole:.1f}")
            return [path, kind, output, *figures, kept] if wide else [path, kind, *figures]

        titles = ["layer", "kind", "output", *(title for title, _, _ in columns), "% of\nOPs", "kept because"]
        if not wide:
            titles = [title for title in titles if title not in ("output", "kept because")]
        rows = [
            cells(row.path, row.kind, "×".join(map(str, row.output)), partial(getattr, row), row.kept)
            for row in self.layers
        ]
        return titles, [*rows, cells("total", "", "", self.total, "")]

    @property
    def title(self) -> str:
        """State and input size."""
        return f"{self.state}, input {'×'.join(str(n) for n in self.input_size)}"

    def notes(self) -> list[str]:
        """What the figures do not say by themselves."""
        lines = [self.weight()]
        products = self.total("product_macs")
        if products and self.state != "FLOAT":
            lines.append(
                f"attention: its products of two activations stay in full precision, {products / 1e6:,.2f} of the "
                f"{self.total('float_macs') / 1e6:,.2f} 32-bit MMACs"
            )
        return [*lines, *([f"not counted: {'; '.join(self.uncounted)}"] if self.uncounted else [])]

    def table(self, width: int | None = None) -> Table:
        """A rich table with a row per layer and a total; MACs and OPs in millions per sample.

        Args:
            width: of the terminal, by default of this one; below 110 output shapes and reasons are left out.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        width = shutil.get_terminal_size((_NARROW, 24)).columns if width is None else width
        titles, rows = self._shown(width >= _NARROW)
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=self.title,
            caption=Text("\n".join(self.notes())),
            caption_justify="left",
        )
        for title in titles:
            # Words alone give way in a narrow terminal: a figure that is cut would be another figure.
            words = title in ("layer", "kind", "output", "kept because")
            table.add_column(title, overflow="fold", justify="left" if words else "right", no_wrap=not words)
        for row in rows[:-1]:
            table.add_row(*map(Text, row))
        table.add_section()
        table.add_row(*rows[-1], style="bold")
        return table

    def to_markdown(self) -> str:
        """The table as Markdown, for a README or an issue."""
        titles, rows = self._shown(wide=True)
        lines = [
            [title.replace("\n", " ") for title in titles],
            ["---" if title in ("layer", "kind", "output", "kept because") else "---:" for title in titles],
            *([cell.replace("|", "\\|") for cell in row] for row in rows),
        ]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"**{self.title}**", body, *self.notes()])

    def __str__(self) -> str:
        return as_text(self.table())
