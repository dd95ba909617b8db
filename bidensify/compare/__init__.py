"""The comparison of methods: what run folders hold, as tables, plots and one self-contained report page."""

from __future__ import annotations

from bidensify.compare.report import Card, Check, Facts, Figure, ImageGrid, Report, Table, render, write_report
from bidensify.compare.runs import RunRecord, comparison, read_run

__all__ = [
    "Card",
    "Check",
    "Facts",
    "Figure",
    "ImageGrid",
    "Report",
    "RunRecord",
    "Table",
    "comparison",
    "read_run",
    "render",
    "write_report",
]
