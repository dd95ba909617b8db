"""Plots of runs and methods, drawn for light and for dark pages, and as SVG for papers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bidensify.compare.report import Figure

__all__ = ["Bars", "Mark", "Panel", "Scatter", "bars", "colour_of", "curves", "scatters"]

# Okabe and Ito's palette: told apart by colour-blind readers, and legible on both backgrounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8F98")
REFERENCE_COLOUR = "#8A8F98"
_MARKERS = "osD^vPX<>*hp"
_LINES = ("-", "--", ":")
_NAMES_INSIDE = 6


@dataclass(frozen=True)
class Panel:
    """One set of axes: named series of (x, y) points, and named horizontal reference lines."""

    title: str
    xlabel: str
    ylabel: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    references: Mapping[str, float] = field(default_factory=dict)
    log: bool = False


@dataclass(frozen=True)
class Mark:
    """One network on a scatter plot; ``error`` is the standard deviation of ``y``. Hollow: a full-precision form."""

    name: str
    x: float
    y: float
    error: float = 0.0
    hollow: bool = False


@dataclass(frozen=True)
class Scatter:
    """One set of axes with a mark per network; x is logarithmic."""

    title: str
    xlabel: str
    ylabel: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Bars:
    """Groups of bars: ``values[name][i]`` belongs to group ``i``; None leaves a gap."""

    title: str
    ylabel: str
    groups: Sequence[str]
    values: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class _Ink:
    text: str
    soft: str
    line: str


_LIGHT, _DARK = _Ink("#1b1f27", "#5b6472", "#e1e4ea"), _Ink("#e7eaf0", "#9aa4b2", "#2a303a")


def colour_of(name: str, names: Sequence[str]) -> str:
    """Returns the colour of series ``name``: its place among ``names`` decides, so that every plot agrees."""
    return COLOURS[list(names).index(name) % len(COLOURS)]


def curves(title: str, panels: Sequence[Panel], *, note: str = "", names: Sequence[str] = ()) -> Figure:
    """Draws lines, ``panels`` side by side; ``names`` fixes the colours (default: the order in which series come)."""
    order = list(dict.fromkeys([*names, *(name for panel in panels for name in panel.series)]))

    def draw(axes: Any, panel: Panel, ink: _Ink) -> None:
        for name, points in panel.series.items():
            xs, ys = [x for x, _ in points], [y for _, y in points]
            # Where colours come round again, dashes tell the lines apart.
            dashes = _LINES[order.index(name) // len(COLOURS) % len(_LINES)]
            axes.plot(
                xs,
                ys,
                color=colour_of(name, order),
                linestyle=dashes,
                linewidth=2,
                label=name,
                marker="o",
                markersize=2.5,
            )
        for name, value in panel.references.items():
            axes.axhline(value, color=REFERENCE_COLOUR, linewidth=1.5, linestyle="--", label=name)
        if panel.xlabel == "epoch":
            axes.xaxis.get_major_locator().set_params(integer=True)
        if panel.log:
            axes.set_yscale("log")

    alt = "; ".join(f"{panel.ylabel} over {panel.xlabel} of {', '.join(panel.series)}" for panel in panels)
    return _figure(title, panels, draw, alt, note)


def scatters(title: str, panels: Sequence[Scatter], names: Sequence[str], *, note: str = "") -> Figure:
    """Draws networks as marks, ``panels`` side by side; ``names`` are all networks, in the order of their colours."""

    def draw(axes: Any, panel: Scatter, ink: _Ink) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        for mark in panel.marks:
            colour, place = colour_of(mark.name, names), list(names).index(mark.name)
            axes.errorbar(
                mark.x, mark.y, yerr=mark.error or None, color=colour, marker=_MARKERS[place % len(_MARKERS)], markersize=9,
                markerfacecolor="none" if mark.hollow else colour, markeredgewidth=1.8, capsize=3, linestyle="none",
                label=mark.name,
            )  # fmt: skip
        axes.margins(x=0.25, y=0.15)

    alt = "; ".join(
        f"{panel.ylabel} over {panel.xlabel} of {', '.join(mark.name for mark in panel.marks)}" for panel in panels
    )
    return _figure(title, panels, draw, alt, note)


def bars(title: str, panels: Sequence[Bars], names: Sequence[str], *, note: str = "") -> Figure:
    """Draws groups of bars, ``panels`` side by side; ``names`` are all networks, in the order of their colours."""

    def draw(axes: Any, panel: Bars, ink: _Ink) -> None:
        width = 0.8 / max(1, len(panel.values))
        for place, (name, values) in enumerate(panel.values.items()):
            xs = [group + (place + 0.5) * width - 0.4 for group in range(len(values))]
            heights = [0.0 if value is None else value for value in values]
            axes.bar(xs, heights, width * 0.92, color=colour_of(name, names), label=name)
        turned = len(panel.groups) > 6
        axes.set_xticks(
            range(len(panel.groups)),
            [_plain(group) for group in panel.groups],
            rotation=40 if turned else 0,
            ha="right" if turned else "center",
        )
        axes.grid(False, axis="x")

    alt = "; ".join(f"{panel.ylabel} of {', '.join(panel.values)} for {', '.join(panel.groups)}" for panel in panels)
    return _figure(title, panels, draw, alt, note)


def _figure(title: str, panels: Sequence[Any], draw: Callable[[Any, Any, _Ink], None], alt: str, note: str) -> Figure:
    light, dark, svg = (
        _draw(panels, draw, ink, kind) for ink, kind in ((_LIGHT, "png"), (_DARK, "png"), (_LIGHT, "svg"))
    )
    return Figure(title, light, dark, alt, note, svg)


def _draw(panels: Sequence[Any], draw: Callable[[Any, Any, _Ink], None], ink: _Ink, kind: str) -> bytes:
    # The object interface on the Agg canvas: pyplot would keep state and may look for a display.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(max(10.4, 5.2 * len(panels)), 3.5), layout="constrained")
    FigureCanvasAgg(canvas)
    for number, panel in enumerate(panels):
        axes: Any = canvas.add_subplot(1, len(panels), number + 1)
        axes.set_facecolor("none")
        axes.set_title(_plain(panel.title), color=ink.text, fontsize=11, loc="left", fontweight="bold")
        axes.set_xlabel(_plain(getattr(panel, "xlabel", "")), color=ink.soft)
        axes.set_ylabel(_plain(panel.ylabel), color=ink.soft)
        axes.tick_params(which="both", colors=ink.soft, labelsize=9)
        axes.grid(True, color=ink.line, linewidth=0.8)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(ink.line)
        draw(axes, panel, ink)
    shown = _legends(canvas, ink)
    for text in (text for legend in shown for text in legend.get_texts()):
        text.set_parse_math(False)
    buffer = io.BytesIO()
    # Metadata would make two equal plots differ between days and versions of matplotlib.
    drop = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "bidensify", "svg.fonttype": "path"}):
        canvas.savefig(buffer, format=kind, dpi=160, transparent=True, metadata=drop)
    return buffer.getvalue()


def _legends(canvas: Any, ink: _Ink) -> list[Any]:
    """A legend in each set of axes, or, of many names, one for all beside them, where it hides nothing."""
    every = {label: mark for axes in canvas.axes for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    options = {"frameon": False, "labelcolor": ink.text, "fontsize": 9}
    if len(every) <= _NAMES_INSIDE:
        return [axes.legend(**options) for axes in canvas.axes]
    return [canvas.legend(every.values(), every.keys(), loc="outside right center", **options)]


def _plain(text: str) -> str:
    """A dollar sign means itself, no formula."""
    return text.replace("$", r"\$")
