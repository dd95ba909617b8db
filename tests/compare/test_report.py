"""The report page: one file, escaped, complete."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from bidensify.compare import RunRecord, comparison
from bidensify.compare.images import png
from bidensify.compare.plots import Panel, colour_of, curves
from bidensify.compare.report import Card, Check, Facts, ImageGrid, Report, Shot, Table, Viewer, render, write_report
from bidensify.errors import ConfigError

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Balance(HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.stack.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href"):
                self.images.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def picture(red: int) -> bytes:
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    image[0] = red
    return png(image)


def example() -> Report:
    figure = curves("Learning curves", [Panel("mIoU", "epoch", "mIoU", {"a": [(1, 0.1), (2, 0.3)]}, {"float": 0.5})])
    return Report(
        title="Report <of> tests",
        lead="Leads & follows.",
        cards=[Card("mIoU", "71.3", "of 74.0")],
        checks=[
            Check("good", "1", "≥ 0", True),
            Check("bad", "1", "≥ 2", False),
            Check("shown", "1", "≥ 2", False, enforced=False),
        ],
        sections=[
            Table("Methods", ["method", "mIoU"], [["bnn", "1"], ["bidense", "2"]], strong=frozenset({(1, 1)})),
            Table("Plan", ["layer"], [["<script>alert(1)</script>"]], collapsed=True),
            figure,
            ImageGrid("Scenes", ["image", "truth"], [[picture(1), picture(2)]], legend=[("sky", "rgb(1, 2, 3)")]),
            Facts("Machine", {"cpu": "a & b"}),
        ],
        status="failed",
    )


def test_page_is_one_file_that_loads_nothing() -> None:
    html = render(example())
    parser = Balance()
    parser.feed(html)
    assert parser.stack == []
    assert len(parser.images) == 4
    assert all(address.startswith("data:image/png;base64,") for address in parser.images)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|<script [^t]|<link", html)
    # The policy lets one script run, the page's own.
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def test_pictures_come_back_as_they_went_in() -> None:
    parser = Balance()
    parser.feed(render(example()))
    image = Image.open(io.BytesIO(base64.b64decode(parser.images[-1].split(",", 1)[1])))
    assert image.size == (6, 4)
    assert image.getpixel((0, 0)) == (2, 0, 0)


def test_texts_are_escaped_and_every_part_is_shown() -> None:
    html = render(example())
    assert "Report &lt;of&gt; tests" in html
    assert "Leads &amp; follows." in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count('class="badge passed"') == 1
    assert html.count('class="badge failed"') == 2  # the status beside the title, and the failed check
    assert html.count('class="badge open"') == 1
    assert '<td class="strong">2</td>' in html
    assert "rgb(1, 2, 3)" in html
    assert "prefers-color-scheme: dark" in html


def test_light_and_dark_plots_differ() -> None:
    figure = curves("t", [Panel("a", "x", "y", {"s": [(0, 1), (1, 2)]}, {})])
    assert figure.light != figure.dark
    for data in (figure.light, figure.dark):
        assert Image.open(io.BytesIO(data)).format == "PNG"


def test_colour_follows_the_name_not_the_panel() -> None:
    assert colour_of("b", ["a", "b"]) != colour_of("a", ["a", "b"])


def test_written_at_once(tmp_path: Path) -> None:
    path = write_report(example(), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == render(example())
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells, but there are 2 columns"):
        Table("t", ["a", "b"], [["1", "2"], ["3"]])


def test_a_picture_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 4\).*uint8 \(3, H, W\)"):
        png(torch.zeros(1, 4, 4, dtype=torch.uint8))


def test_status_claims_no_more_than_the_checks_say() -> None:
    met = Check("met", "1", "≥ 0", True)
    shown = Check("shown", "1", "≥ 2", False, enforced=False)
    assert "all checks passed" in render(Report("t", "l", checks=[met], status="passed"))
    partly = render(Report("t", "l", checks=[met, shown], status="passed"))
    assert "all checks passed" not in partly
    assert "enforced checks passed" in partly


def test_a_shot_without_a_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shot 0 has no picture of \['b'\]"):
        Viewer("v", ["a", "b"], [Shot("s", {"a": b""})])


def test_what_runs_do_not_share_is_said(tmp_path: Path) -> None:
    def run(name: str, epochs: int = 1, **data: object) -> RunRecord:
        recipe = {
            "model": {"source": "demo:unet"},
            "data": {"size": [32, 48], **data},
            "task": {"name": "segmentation"},
        }
        history = [{"epoch": e, "step": 3, "seconds": 1.5, "loss": 0.5} for e in range(epochs)]
        return RunRecord(tmp_path / name, name, name, 0, "miou", {"miou": 0.25}, history, recipe)

    assert "share network, data, labels, input size" in render(comparison([run("a"), run("b")]))
    lead = comparison([run("a"), run("b", epochs=3, size=[64, 96]), run("c")]).lead
    assert "differ in more than their method" in lead
    assert "input size: 32×48 (a, c); 64×96 (b)" in lead
    assert "epochs: 1 (a, c); 3 (b)" in lead
    assert "footing" not in lead
    flipped = run("b", root="/elsewhere")
    flipped.recipe["evaluate"] = {"flip": True, "scales": [0.5, 1.0]}
    lead = comparison([run("a"), flipped]).lead
    assert all(said in lead for said in ("folder of data: ", "mirrored views: ", "scales of views: "))


def test_runs_of_one_task_are_compared(tmp_path: Path) -> None:
    def run(name: str, primary: str) -> RunRecord:
        epoch = {"epoch": 0, "step": 3, "seconds": 1.5, "loss": 0.5, "metrics": {primary: 0.25}}
        return RunRecord(tmp_path / name, name, name, 0, primary, {primary: 0.25}, [epoch])

    page = render(comparison([run("a", "miou"), run("b", "miou")]))
    assert page.count("0.2500") == 2
    assert page.count("0.500") == 2  # seconds per step
    with pytest.raises(ConfigError, match=r"different tasks \(miou, rmse chose"):
        comparison([run("a", "miou"), run("b", "rmse")])
    with pytest.raises(ConfigError, match="no run was given"):
        comparison([])
