"""The zoo's script on a few networks, and its page against its list."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("timm")

from zoo.checks import CHECKS
from zoo.networks import DECODERS, ENCODERS, SHORT, networks
from zoo.page import failures, render

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "models.py"
SAMPLE = ("smp:PSPNet/resnet18", "smp:DPT/resnet18", "torchvision:lraspp_mobilenet_v3_large")


def script() -> Any:
    spec = importlib.util.spec_from_file_location("zoo_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("zoo")
    files = ["--results", str(folder / "models.jsonl"), "--page", str(folder / "models.md")]
    only = [word for name in SAMPLE for word in ("--only", name)]
    done = run(*only, *files)
    rows = [json.loads(line) for line in (folder / "models.jsonl").read_text().splitlines()]
    page = (folder / "models.md").read_text()
    return {"done": done, "rows": rows, "page": page, "again": lambda: run(*only, *files, "--resume"), "folder": folder}


def test_sample_passes_every_check(sample: dict[str, Any]) -> None:
    assert sample["done"].returncode == 0, sample["done"].stdout + sample["done"].stderr
    rows = {row["name"]: row for row in sample["rows"]}
    assert list(rows) == list(SAMPLE)
    for name in (SAMPLE[0], SAMPLE[2]):
        row = rows[name]
        assert row["convert"] == "pass"
        assert set(row["checks"]) == set(CHECKS)
        assert failures(row) == []
        plan = row["plan"]
        assert plan["binary"] == plan["way_path"] + plan["way_block"] == plan["binary_modules"]
        assert plan["layers"] == plan["binary"] + sum(plan["kept"].values())
        assert 0.5 < plan["mac_share"] <= plan["eligible_mac_share"] <= 1
    assert "Only Timm encoders" in rows[SAMPLE[1]]["refused"]
    # smp's own networks can be saved; torchvision's have no such method.
    assert rows[SAMPLE[0]]["checks"]["save_pretrained"]["status"] == "pass"
    assert rows[SAMPLE[2]]["checks"]["save_pretrained"]["status"] == "not in the original"


def test_a_sweep_resumes(sample: dict[str, Any]) -> None:
    before = (sample["folder"] / "models.jsonl").read_text()
    again = sample["again"]()
    assert again.returncode == 0
    assert again.stdout == ""
    assert (sample["folder"] / "models.jsonl").read_text() == before
    assert (sample["folder"] / "models.md").read_text() == sample["page"]


def test_page_of_the_sample(sample: dict[str, Any]) -> None:
    page = sample["page"]
    assert "2 networks, of which 2 convert" in page
    assert "## Failures" not in page
    assert "| PSPNet/resnet18 |" in page
    # It says what was not run.
    assert "Not run: " in page
    assert "smp:Unet/resnet18" in page


def test_a_name_that_fits_nothing_is_refused() -> None:
    done = run("--only", "smp:Nothing/*")
    assert done.returncode == 2
    assert "smp:Nothing/*" in done.stderr


def test_a_failure_is_written_out() -> None:
    row = json.loads((ROOT / "benchmarks" / "results" / "models.jsonl").read_text().splitlines()[0])
    row["checks"]["export"]["status"] = "the output differs | somewhere"
    page = render({row["name"]: row}, [row["name"]])
    assert failures(row) == ["export: the output differs | somewhere"]
    assert "## Failures" in page
    assert "the output differs / somewhere" in page


def test_the_column_of_exported_networks() -> None:
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "models.jsonl").read_text().splitlines()]
    first, second, third = [row for row in rows if "plan" in row and row["name"].startswith("smp:Unet/")][:3]
    for row in (first, second, third):
        row["checks"].pop("pte", None)
    order = [first["name"], second["name"], third["name"]]
    assert ".pte" not in render({row["name"]: row for row in (first, second, third)}, order)
    first["checks"]["pte"] = {"status": "pass", "difference": 1e-7}
    second["checks"]["pte"] = {"status": "PlanError: no | such operator"}
    page = render({row["name"]: row for row in (first, second, third)}, order)
    assert "1 of 2 do" in page
    lines = {
        row["name"]: line
        for row in (first, second, third)
        for line in page.splitlines()
        if line.startswith(f"| {row['name'][4:]} |")
    }
    assert [lines[row["name"]].split("|")[-2].strip() for row in (first, second, third)] == ["+", "FAIL", "?"]
    assert f"| {second['name']} | PlanError: no / such operator |" in page
    assert failures(second) == failures(third) == []


def test_one_network_takes_no_more_than_its_time() -> None:
    row = script().run_one(SAMPLE[0], 0.2)
    assert row["convert"].startswith("not done after 0 s")
    assert failures(row)


def test_published_page_is_of_the_list_and_of_its_results() -> None:
    pytest.importorskip("transformers")
    module = script()
    order = list(networks())
    assert {f"smp:{decoder}/{encoder}" for decoder in DECODERS for encoder in ENCODERS} <= set(order)
    rows = module.read(module.RESULTS)
    assert list(rows) == order, "run: python benchmarks/models.py --resume"
    assert module.PAGE.read_text() == render(rows, order), "run: python benchmarks/models.py --render"
    wrong = {name: [text.partition(":")[0] for text in failures(row)] for name, row in rows.items() if failures(row)}
    assert wrong == {name: list(checks) for name, checks in SHORT.items()}
