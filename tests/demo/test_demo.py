"""The demo end to end at its quick size: files, figures, a page that stands alone, and going on after a stop."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import bidensify as bd
from bidensify.demo.job import CHECKS, METHODS, run_demo
from bidensify.errors import ConfigError


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    with open(folder.with_name("printed.txt"), "w", encoding="utf-8") as printed:
        # As on the terminal, where names are no markup.
        run_demo(folder, quick=True, console=Console(file=printed, markup=False, width=200))
    return folder


def test_what_it_prints_is_plain_text(out: Path) -> None:
    lines = out.with_name("printed.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line in ("teacher", *METHODS)] == ["teacher", *METHODS]
    checks = json.loads((out / "results.json").read_text())["checks"]
    for check in checks:
        mark = "passed" if check["passed"] else "failed" if check["enforced"] else "not reached"
        assert any(line.startswith(f"{mark}  {check['text']}: ") for line in lines), check
    assert not any("[/" in line for line in lines)


def test_results(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert {check["name"] for check in results["checks"]} == set(CHECKS)
    assert results["agreement"] >= 0.999
    assert results["size_over_bound"] <= 1.05
    assert results["passed"] is True
    assert set(results["miou"]) == {"teacher", *METHODS}
    assert results["student_over_teacher"] == results["miou"]["bidense"] / results["miou"]["teacher"]
    for method in METHODS:
        figures = results["students"][method]
        assert figures["packed_bytes"] == (out / f"{method}_packed" / "model.safetensors").stat().st_size
        assert figures["bound_bytes"] == figures["binary_weights"] / 8 + 4 * figures["other_parameters"]


def test_quality_is_not_enforced_in_seconds_but_shown(out: Path) -> None:
    checks = {check["name"]: check for check in json.loads((out / "results.json").read_text())["checks"]}
    assert not checks["student_over_teacher"]["enforced"]
    assert not checks["points_above_bnn"]["enforced"]
    assert checks["agreement"]["enforced"]


def test_page_stands_alone(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "http://" not in page
    assert page.count("data:image/png;base64,") >= 5 * 5
    for word in ("ground truth", "bidense", "bnn", "teacher", "mIoU"):
        assert word in page


def test_packed_networks_reload_by_name(out: Path) -> None:
    for method in METHODS:
        model = bd.from_pretrained(out / f"{method}_packed")
        assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 8, 64, 96)


def test_goes_on_where_it_stopped(out: Path) -> None:
    before = (out / "bnn" / "model.safetensors").stat().st_mtime_ns
    (out / "results.json").unlink()
    run_demo(out, quick=True, console=Console(quiet=True))
    assert (out / "results.json").is_file()
    assert (out / "bnn" / "model.safetensors").stat().st_mtime_ns == before


def test_another_demo_in_the_same_folder_is_refused(out: Path) -> None:
    with pytest.raises(ConfigError, match="another folder"):
        run_demo(out, seed=7, quick=True, console=Console(quiet=True))


def test_a_damaged_marker_is_no_demo_to_go_on_with(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(ConfigError, match="holds a demo with {, this one has .*--out"):
        run_demo(tmp_path, quick=True, console=Console(quiet=True))
