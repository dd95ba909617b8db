"""A report page that is one file: HTML with its style, pictures and plots inside, for light and dark screens.

The page is described by plain dataclasses and rendered by ``templates/report.html.j2``; what to say is the caller's.
Nothing is loaded from elsewhere, so the page can be mailed, kept beside the results or opened without a network.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bidensify._util.files import atomic_write
from bidensify._util.version import __version__


@dataclass(frozen=True)
class Card:
    """One headline figure: ``value`` in large type between ``label`` and ``note``."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Check:
    """One requirement with what was measured. ``enforced`` False: shown, but it does not decide."""

    name: str
    measured: str
    target: str
    passed: bool
    enforced: bool = True


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first column is the row's name; the others are aligned as figures.

    ``strong`` lists (row, column) positions set in bold, for example the best of a column.
    ``swatches`` gives a row a colour (a CSS colour), shown before its name.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    strong: frozenset[tuple[int, int]] = frozenset()
    swatches: Mapping[int, str] = field(default_factory=dict)
    collapsed: bool = False

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: row {number} has {len(row)} cells, but there are {len(self.columns)} "
                    f"columns; give one cell per column"
                )


@dataclass(frozen=True)
class Figure:
    """A plot as two PNG files, one for light and one for dark pages."""

    title: str
    light: bytes
    dark: bytes
    alt: str
    note: str = ""


@dataclass(frozen=True)
class ImageGrid:
    """Pictures (PNG bytes) in rows under column titles, with a colour legend of (name, CSS colour)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[bytes]]
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    captions: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Facts:
    """Name-value pairs: machine, versions, settings."""

    title: str
    pairs: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """Everything that one page shows, in reading order."""

    title: str
    lead: str
    cards: Sequence[Card] = ()
    checks: Sequence[Check] = ()
    sections: Sequence[Table | Figure | ImageGrid | Facts] = ()
    status: Literal["passed", "failed", ""] = ""


_KINDS = {Table: "table", Figure: "figure", ImageGrid: "grid", Facts: "facts"}


def data_uri(png: bytes) -> str:
    """Returns ``png`` as a ``data:`` address, so that a page needs no second file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def render(report: Report) -> str:
    """Returns the page as HTML text. All texts are escaped; pictures are inlined as base64 PNG."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bidensify.compare"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    sections = [(_KINDS[type(section)], section) for section in report.sections]
    return environment.get_template("report.html.j2").render(report=report, sections=sections, version=__version__)


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Renders ``report`` and writes it to ``path`` at once (a killed run leaves the former page or none)."""
    html = render(report)
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return Path(path)
