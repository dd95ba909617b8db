"""A sensitivity as a table, as Markdown, and as a plot over depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bidensify._util.files import atomic_write
from bidensify._util.names import near
from bidensify.errors import ConfigError
from bidensify.precisions.findings import COSTS, By, Findings, Row
from bidensify.precisions.precision import BINARY, FLOAT

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["plot", "table", "to_markdown"]

_NAMES = {"macs": "float MACs", "ops": "OPs", "bytes": "bytes", "ms": "ms"}
_FORMATS = (".png", ".svg", ".pdf")


def _best_by(found: Findings) -> By:
    """What rows are sorted by: the distance, which hears more than the metric, where it is known."""
    return "metric" if found.distance is None else "distance"


def _lines(found: Findings, cost: str, groups: bool) -> tuple[list[str], list[list[str]]]:
    """(titles, rows of text), by what float gains per cost, most first."""
    if cost not in COSTS:
        raise ConfigError(f"cost={cost!r} is none of {', '.join(COSTS)}{near(cost, COSTS)}")
    by, others = _best_by(found), [name for name in found.precisions if name != BINARY]
    if found.around == "student":
        others = [FLOAT]
    unit = 1.0 if cost == "ms" else getattr(found.full, cost) / 100

    def worth(row: Row) -> float:
        added = found.added(row, FLOAT, cost) / unit
        return found.gain(row, FLOAT, by) / added if added > 0 else float("inf")

    titles = ["group" if groups else "layer", "MMACs"]
    for name in others:
        titles += [f"{name}: {found.metric}", *([f"{name}: {found.distance}"] if found.distance else [])]
    shown = "ms" if cost == "ms" else f"% of {_NAMES[cost]}"
    titles += [f"float costs, {shown}", f"{found.distance or found.metric} per {'ms' if cost == 'ms' else '%'}"]
    rows = []
    for row in sorted(found.groups if groups else found.layers, key=worth, reverse=True):
        cells = [row.name, f"{row.macs / 1e6:.1f}"]
        for name in others:
            kinds: list[By] = ["metric", "distance"] if found.distance else ["metric"]
            cells += [f"{found.gain(row, name, kind):+.4f}" if found.has(row, name) else "–" for kind in kinds]
        rows.append([*cells, f"{found.added(row, FLOAT, cost) / unit:.2f}", f"{worth(row):+.4f}"])
    return titles, rows


def _title(found: Findings) -> str:
    where = "the full-precision network" if found.around == "teacher" else "the student"
    return f"{found.network}: gains over binary, each unit alone in {where}, {found.samples} images"


def _notes(found: Findings) -> list[str]:
    notes = []
    for name, value in (("full precision", found.teacher), ("student", found.student)):
        if value is not None:
            far = f", {found.distance} {value.distance:.4f}" if value.distance is not None and name == "student" else ""
            notes.append(f"{name}: {found.metric} {value.metric:.4f}{far}")
    if found.around == "student" and found.layers:
        worse = sum(found.gain(row, FLOAT, _best_by(found)) < 0 for row in found.layers)
        if worse:
            notes.append(
                f"{worse} of {len(found.layers)} layers lose by float: what follows has learned from the signs. For a budget, "
                "measure around the teacher"
            )
    return notes


def table(found: Findings, cost: str = "ops", *, groups: bool = False) -> Table:
    """A rich table sorted by what float gains per cost.

    Args:
        found: the analysis.
        cost: "macs", "ops" or "bytes" (in hundredths of the full-precision network's), or "ms".
        groups: blocks and stages instead of layers.

    Raises:
        ConfigError: another cost, or milliseconds that are not known.
    """
    from rich.table import Table
    from rich.text import Text

    titles, rows = _lines(found, cost, groups)
    result = Table(title=Text(_title(found)), caption=Text("\n".join(_notes(found))), caption_justify="left")
    for title in titles:
        result.add_column(title, justify="left" if title in ("layer", "group") else "right", overflow="fold")
    for row in rows:
        result.add_row(*map(Text, row))
    return result


def to_markdown(found: Findings, cost: str = "ops", *, groups: bool = False) -> str:
    """``table`` as Markdown."""
    titles, rows = _lines(found, cost, groups)
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *rows]
    body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return "\n\n".join([f"**{_title(found)}**", body, *_notes(found)]) + "\n"


def plot(found: Findings, path: Path) -> None:
    """Draws what each layer's float gains over depth, metric above and distance below, as bars as wide as a layer.

    Raises:
        ConfigError: the file's name does not end in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    if path.suffix not in _FORMATS:
        raise ConfigError(f"the plot {str(path)!r} must end in one of {', '.join(_FORMATS)}")
    rows = found.layers
    kinds: list[tuple[By, str]] = [("metric", found.metric)]
    if found.distance is not None:
        kinds.append(("distance", f"{found.distance} to the teacher"))
    figure = Figure(figsize=(max(6.0, 0.24 * len(rows) + 2), 2.4 * len(kinds) + 1.4), layout="constrained")
    axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    names = [FLOAT] if found.around == "student" else [name for name in found.precisions if name != BINARY]
    for axis, (by, title) in zip(axes, kinds):
        for number, name in enumerate(names):
            width = 0.8 / len(names)
            known = [place for place, row in enumerate(rows) if found.has(row, name)]
            places = [place - 0.4 + (number + 0.5) * width for place in known]
            axis.bar(places, [found.gain(rows[place], name, by) for place in known], width, label=name)
        axis.set_ylabel(f"gain, {title}")
        axis.axhline(0, color="black", linewidth=0.6)
        if len(names) > 1:
            axis.legend(frameon=False)
    axes[0].set_title(_title(found), fontsize="medium")
    axes[-1].set_xticks(
        range(len(rows)), [row.name.replace("$", r"\$") for row in rows], rotation=90, fontsize="x-small"
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
