"""What ``bench`` measured, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bidensify.bench.profile import table as profile_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["Row", "render"]


@dataclass
class Row:
    """Medians in milliseconds of one case on one number of threads."""

    case: str
    threads: int
    milliseconds: dict[str, float]
    rounds: int
    others: float | None = None
    target: float | None = None
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    profile: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def ratio(self, variant: str, base: str = "float") -> float:
        """How many times faster than ``base``."""
        return self.milliseconds[base] / self.milliseconds[variant]

    def line(self) -> str:
        """The row in words."""
        parts = [f"{key} {value:.3f} ms" for key, value in self.milliseconds.items()]
        busy = "" if self.others is None else f" (other programs: {self.others:.2f} cores)"
        return f"{self.case}, {self.threads} thread(s): " + ", ".join(parts) + busy


def render(result: dict[str, Any]) -> RenderableType:
    """Rich tables: a line per case, threads and variant with its time and how many times faster than float; memory; profiles."""
    from rich.console import Group
    from rich.table import Table

    rows = [Row(**row) for row in result["rows"]]
    table = Table(title=f"{result['machine']['processor']}, torch {result['machine']['torch']}")
    for column in ("case", "threads", "variant", "ms", "faster than float"):
        table.add_column(column, justify="left" if column in ("case", "variant") else "right")
    for row in rows:
        for number, (variant, milliseconds) in enumerate(row.milliseconds.items()):
            known = variant != "float" and "float" in row.milliseconds
            case = (row.case, str(row.threads)) if number == 0 else ("", "")
            table.add_row(
                *case, variant, f"{milliseconds:.3f}", f"{row.ratio(variant):.2f}x" if known else "",
                end_section=number == len(row.milliseconds) - 1,
            )  # fmt: skip
    tables = [table]
    if any(row.memory for row in rows):
        tables.append(_peaks(rows))
    for row in rows:
        tables += [profile_table(row.case, row.threads, variant, shares) for variant, shares in row.profile.items()]
    return Group(*tables)


def _peaks(rows: Sequence[Row]) -> Table:
    from rich.table import Table

    peaks = Table(
        title="Peak resident memory of inference (MiB); libraries are the same process without a network; faults: of pages"
    )
    for column in ("case", "threads", "variant", "peak", "libraries", "above them", "of float", "faults/run"):
        peaks.add_column(column, justify="left" if column in ("case", "variant") else "right")
    for row in rows:
        above = {key: value["peak"] - value["libraries"] for key, value in row.memory.items()}
        for key, value in row.memory.items():
            share = f"{above[key] / above['float']:.2f}" if above.get("float") else ""
            cells = [
                f"{value['peak']:.0f}",
                f"{value['libraries']:.0f}",
                f"{above[key]:.0f}",
                share,
                f"{value['faults']:.0f}",
            ]
            peaks.add_row(row.case, str(row.threads), key, *cells)
    return peaks
