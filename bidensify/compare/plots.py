"""Plots for the report page, drawn twice: for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bidensify.compare.report import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, and legible on both backgrounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8F98")
REFERENCE_COLOUR = "#8A8F98"

_INK = {"light": ("#1b1f27", "#5b6472", "#e1e4ea"), "dark": ("#e7eaf0", "#9aa4b2", "#2a303a")}


@dataclass(frozen=True)
class Panel:
    """One set of axes: named series of (x, y) points, and named horizontal reference lines."""

    title: str
    xlabel: str
    ylabel: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    references: Mapping[str, float]
    log: bool = False


def colour_of(name: str, names: Sequence[str]) -> str:
    """Returns the colour of series ``name``: its place among ``names`` decides, so that every plot agrees."""
    return COLOURS[list(names).index(name) % len(COLOURS)]


def curves(title: str, panels: Sequence[Panel], *, note: str = "") -> Figure:
    """Draws ``panels`` side by side and returns them as a :class:`Figure` for both kinds of page."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    alt = "; ".join(f"{panel.ylabel} over {panel.xlabel} of {', '.join(panel.series)}" for panel in panels)
    return Figure(title, _draw(panels, names, "light"), _draw(panels, names, "dark"), alt, note)


def _draw(panels: Sequence[Panel], names: Sequence[str], page: str) -> bytes:
    # The object interface on the Agg canvas: pyplot would keep state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    text, soft, line = _INK[page]
    canvas = Canvas(figsize=(5.2 * len(panels), 3.3), layout="constrained")
    FigureCanvasAgg(canvas)
    for number, panel in enumerate(panels):
        axes: Any = canvas.add_subplot(1, len(panels), number + 1)
        axes.set_facecolor("none")
        axes.set_title(panel.title, color=text, fontsize=11, loc="left", fontweight="bold")
        axes.set_xlabel(panel.xlabel, color=soft)
        axes.set_ylabel(panel.ylabel, color=soft)
        axes.tick_params(colors=soft, labelsize=9)
        axes.grid(True, color=line, linewidth=0.8)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(line)
        for name, points in panel.series.items():
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, color=colour_of(name, names), linewidth=2, label=name, marker="o", markersize=2.5)
        for name, value in panel.references.items():
            axes.axhline(value, color=REFERENCE_COLOUR, linewidth=1.5, linestyle="--", label=name)
        if panel.xlabel == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.log:
            axes.set_yscale("log")
        axes.legend(frameon=False, labelcolor=text, fontsize=9)
    buffer = io.BytesIO()
    # Software metadata would make two equal plots differ between versions of matplotlib.
    canvas.savefig(buffer, format="png", dpi=160, transparent=True, metadata={"Software": None})
    return buffer.getvalue()
