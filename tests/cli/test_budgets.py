"""``sensitivity`` and ``allocate`` as their users meet them."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bidensify as bd
from bidensify.cli.app import app
from bidensify.precisions import Sensitivity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, recipe_text: str) -> Path:
    folder = tmp_path_factory.mktemp("precisions")
    (folder / "tiny.yaml").write_text(recipe_text)
    result = CliRunner().invoke(app, ["finetune", str(folder / "tiny.yaml"), "-d", str(folder / "run"), "--quiet"])
    assert result.exit_code == 0, result.output
    return folder


def test_of_a_run_then_a_budget(cli: CliRunner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = cli.invoke(
        app, ["sensitivity", "run", "--plot", "gains.svg", "--images", "3", "--precision", "act_bits 2"]
    )
    assert result.exit_code == 0, result.output
    found = Sensitivity.load(folder / "run" / "sensitivity_teacher.json")
    assert found.student is not None
    assert found.samples == 3
    assert all(row.name in result.output for row in found.layers)
    assert "Next: bidensify allocate run/sensitivity_teacher.json" in result.output
    assert (folder / "gains.svg").is_file()
    bounds = ["--bytes", "0.4", "--precision", "float"]
    result = cli.invoke(app, ["allocate", "run/sensitivity_teacher.json", *bounds, "--out", "config.json"])
    assert result.exit_code == 0, result.output
    assert "expected miou" in result.output
    config = bd.BidensifyConfig.from_json((folder / "config.json").read_text())
    assert {rule.action for rule in config.rules} == {"keep"}  # type: ignore[comparison-overlap]
    model = ["demo:unet", "-o", "width=8", "-o", "levels=2", "-o", "num_classes=8"]
    result = cli.invoke(app, ["plan", *model, "--config", "config.json", "--input", "3x32x32", "--json"])
    kept = {layer["path"] for layer in json.loads(result.output)["layers"] if layer["reason"].startswith("rule")}
    assert kept == {rule.match for rule in config.rules}
    result = cli.invoke(app, ["allocate", "run/sensitivity_teacher.json", *bounds, "--json"])
    assert json.loads(result.output)["config"] == config.to_dict()


def test_around_the_student(cli: CliRunner, folder: Path) -> None:
    arguments = ["sensitivity", str(folder / "run"), "--around", "student", "--json"]
    result = cli.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert Sensitivity.model_validate_json(result.stdout).around == "student"
    result = cli.invoke(app, ["allocate", str(folder / "run" / "sensitivity_student.json"), "--ops", "0.5"])
    assert result.exit_code == 2
    assert "measure around the teacher" in result.output


def test_of_a_recipe(cli: CliRunner, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "tiny.yaml", "tiny.yaml")
    result = cli.invoke(app, ["sensitivity", "tiny.yaml"])
    assert result.exit_code == 2
    assert "teacher" in result.output
    options = ["-t", str(folder / "run_teacher"), "--format", "markdown", "--group", "decoder"]
    result = cli.invoke(app, ["sensitivity", "tiny.yaml", *options])
    assert result.exit_code == 0, result.output
    assert "| group |" in result.output
    found = Sensitivity.load("tiny_sensitivity.json")
    assert (found.student, [row.name for row in found.groups]) == (None, ["decoder"])


def test_wrong_budgets_are_wrong_use(cli: CliRunner, folder: Path) -> None:
    file = str(folder / "run" / "sensitivity_teacher.json")
    for options, message in (
        ([], "a budget needs a bound"),
        (["--ops", "2"], "budget.ops=2"),
        (["--ms", "3"], "needs the measured"),
    ):
        result = cli.invoke(app, ["allocate", file, *options])
        assert (result.exit_code, message in " ".join(result.output.split())) == (2, True), result.output
