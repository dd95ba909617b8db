"""A table as Markdown, LaTeX and CSV: cells come back as they went in, whatever is in them."""

from __future__ import annotations

import csv
import io

from bidensify.compare.report import Table
from bidensify.compare.tables import to_csv, to_latex, to_markdown

TABLE = Table(
    "Results",
    ["method", "mIoU %", "note"],
    [["bnn", "8.68 ± 0.12", "a|b"], ["bi_dense & co", "18.75 ± 0.30", "<b>"]],
    note="Three seeds.",
    strong=frozenset({(1, 1)}),
)


def test_markdown() -> None:
    assert to_markdown(TABLE).splitlines() == [
        "| method | mIoU % | note |",
        "| --- | ---: | ---: |",
        r"| bnn | 8.68 ± 0.12 | a\|b |",
        "| bi_dense & co | **18.75 ± 0.30** | &lt;b> |",
        "",
        "Three seeds.",
    ]


def test_latex() -> None:
    text = to_latex(TABLE)
    assert r"\begin{tabular}{lrr}" in text
    assert r"bi\_dense \& co & \textbf{18.75 $\pm$ 0.30} & <b> \\" in text
    assert r"method & mIoU \% & note \\" in text


def test_csv_comes_back_and_runs_no_formula() -> None:
    assert list(csv.reader(io.StringIO(to_csv(TABLE)))) == [list(TABLE.columns), *map(list, TABLE.rows)]
    odd = Table("t", ["=1+1"], [["@SUM(A1)"], ["a,b"], ["-1.5"]])
    assert list(csv.reader(io.StringIO(to_csv(odd)))) == [["'=1+1"], ["'@SUM(A1)"], ["a,b"], ["-1.5"]]
