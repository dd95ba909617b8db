"""A report page that is one file: HTML with its style, pictures and plots inside, for light and dark screens.

The page is described by plain dataclasses and rendered by ``templates/report.html.j2``; what to say is the caller's.
Nothing is loaded from elsewhere, so the page can be mailed, kept beside the results or opened without a network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
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
    ``sortable``: a click on a column's title sorts by it (by the number that a cell begins with, where it does).
    ``swatches`` gives a row a colour (a CSS colour), shown before its name.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    strong: frozenset[tuple[int, int]] = frozenset()
    swatches: Mapping[int, str] = field(default_factory=dict)
    collapsed: bool = False
    sortable: bool = False

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: row {number} has {len(row)} cells, but there are {len(self.columns)} "
                    f"columns; give one cell per column"
                )


@dataclass(frozen=True)
class Figure:
    """A plot as two PNG files, one for light and one for dark pages, and as SVG for use elsewhere."""

    title: str
    light: bytes
    dark: bytes
    alt: str
    note: str = ""
    svg: bytes = b""


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
class Shot:
    """One image as every network sees it: pictures (PNG bytes) and, where there is a ground truth, error maps, by name."""

    caption: str
    pictures: Mapping[str, bytes]
    errors: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Viewer:
    """Two pictures of one image under a slider, on the same pixels. Every shot has a picture of each of ``names``."""

    title: str
    names: Sequence[str]
    shots: Sequence[Shot]
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    first: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        for number, shot in enumerate(self.shots):
            lacking = [name for name in self.names if name not in shot.pictures]
            if lacking:
                raise ValueError(
                    f"viewer {self.title!r}: shot {number} has no picture of {lacking}; give one of each name"
                )


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
    sections: Sequence[Table | Figure | ImageGrid | Viewer | Facts] = ()
    status: Literal["passed", "failed", ""] = ""


_KINDS = {Table: "table", Figure: "figure", ImageGrid: "grid", Viewer: "viewer", Facts: "facts"}


def data_uri(png: bytes) -> str:
    """Returns ``png`` as a ``data:`` address, so that a page needs no second file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def viewer_data(viewer: Viewer) -> str:
    """Returns what the page's script reads, as JSON that cannot end the element that it stands in."""
    shots = [
        {
            "caption": shot.caption,
            "pictures": {name: data_uri(shot.pictures[name]) for name in viewer.names},
            "errors": {name: data_uri(png) for name, png in shot.errors.items()},
        }
        for shot in viewer.shots
    ]
    return json.dumps({"names": list(viewer.names), "shots": shots}).replace("<", "\\u003c")


def render(report: Report) -> str:
    """Returns the page as HTML text. All texts are escaped; pictures are inlined as base64 PNG.

    The page's policy lets the script that it was written with run, no other, and loads nothing from elsewhere.
    """
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bidensify.compare"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["viewer_data"] = lambda viewer: markupsafe.Markup(viewer_data(viewer))
    sections = [(_KINDS[type(section)], section) for section in report.sections]
    files = resources.files("bidensify.compare").joinpath("templates")
    style, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("report.html.j2").render(
        report=report,
        sections=sections,
        version=__version__,
        style=markupsafe.Markup(style),
        script=markupsafe.Markup(script),
        digest=digest,
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Renders ``report`` and writes it to ``path`` at once (a killed run leaves the former page or none)."""
    html = render(report)
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return Path(path)
