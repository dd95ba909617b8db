"""A whole comparison, small: its files, going on, a cell that fails, several processes, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from bidensify.cli.app import app
from bidensify.compare.matrix import Matrix
from bidensify.compare.measure import float_networks
from bidensify.compare.results import Results
from bidensify.errors import ConfigError, TrainingError
from bidensify.recipe import load_recipe
from bidensify.tasks import Views


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, recipe_text: str) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(recipe_text)
    return path


@pytest.fixture(scope="module")
def out(recipe: Path) -> Path:
    """A finished comparison of two methods under two seeds."""
    folder = recipe.parent / "out [1]"
    result = compare(recipe, folder, "--seeds", "0,1")
    assert result[0] == 0, result[1]
    return folder


def compare(recipe: Path, out: Path, *more: str) -> tuple[int, str]:
    words = ["compare", str(recipe), "--methods", "bidense,bnn", "--out", str(out), "--quiet", "--seconds", "0.1"]
    result = CliRunner().invoke(app, [*words, "--pictures", "2", *more])
    return result.exit_code, result.output


def test_everything_is_there(out: Path) -> None:
    results = Results.read(out / "results.json")
    assert [(cell.method, cell.seed, cell.state) for cell in results.cells] == [
        ("bidense", 0, "done"), ("bidense", 1, "done"), ("bnn", 0, "done"), ("bnn", 1, "done"),
    ]  # fmt: skip
    for cell in results.cells:
        own = json.loads((out / cell.folder / "result.json").read_text())
        assert cell.metrics == own["metrics"]
        assert [entry["epoch"] for entry in cell.history] == [1]
    names = {point.name for point in results.points}
    assert {"float", "bf16", "bidense", "bnn"} <= names
    for point in results.points:
        assert point.milliseconds is not None
        assert point.milliseconds > 0
    by_name = {point.name: point for point in results.points}
    assert by_name["float"].metrics == json.loads((out / "teacher" / "result.json").read_text())["metrics"]
    assert (by_name["bidense"].bytes or 0) < (by_name["float"].bytes or 0) / 4
    assert set(results.entropy) == {"bidense", "bnn"}
    for file in ("results.md", "results.tex", "results.csv", "classes.md"):
        assert "bidense" in (out / "tables" / file).read_text()
    for name in ("cost", "time", "curves", "classes", "entropy"):
        assert (out / "plots" / f"{name}.png").stat().st_size > 5000
        assert (out / "plots" / f"{name}.svg").stat().st_size > 5000
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2 * (2 + 4)
    assert str(out.parent) not in page


def test_finished_runs_are_not_trained_again(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("bidensify.train.run_recipe", train, raising=False)
    before = Results.read(out / "results.json")
    (out / "results.json").unlink()
    code, text = compare(recipe, out, "--seeds", "0,1")
    assert code == 0, text
    assert Results.read(out / "results.json").cells == before.cells


def test_what_is_finished_is_measured_and_nothing_trained(
    recipe: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("bidensify.train.run_recipe", train, raising=False)
    own = tmp_path / "out"
    shutil.copytree(out, own)
    shutil.rmtree(own / "runs" / "bnn" / "seed1")
    code, text = compare(recipe, own, "--seeds", "0,1,2", "--jobs", "0")
    assert code == 0, text
    found = {(cell.method, cell.seed): cell.state for cell in Results.read(own / "results.json").cells}
    assert found == {
        ("bidense", 0): "done", ("bidense", 1): "done", ("bidense", 2): "open",
        ("bnn", 0): "done", ("bnn", 1): "open", ("bnn", 2): "open",
    }  # fmt: skip
    table = (own / "tables" / "results.csv").read_text()
    assert "2 of 3" in table
    assert "1 of 3" in table
    # A run of fewer epochs than its recipe is not finished, one under another recipe is no run of it.
    code, text = compare(recipe, own, "--jobs", "0", "--own", "bnn:stages[0].epochs=2")
    assert code == 0, text
    assert {cell.method: cell.state for cell in Results.read(own / "results.json").cells} == {
        "bidense": "done",
        "bnn": "open",
    }
    code, text = compare(recipe, own, "--jobs", "0", "--own", "bnn:stages[0].lr=2.0e-3")
    assert code == 1
    assert "bnn, seed 0: failed" in text
    code, text = compare(recipe, own, "--jobs", "0", "--set", "stages[0].epochs=2")
    assert code == 2
    code, text = compare(recipe, tmp_path / "empty", "--jobs", "0")
    assert code == 2
    assert "jobs=0 trains nothing" in text


def test_a_cell_that_fails_does_not_lose_the_others(
    recipe: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bidensify.train import run_recipe as real

    def train(loaded: object, folder: Path, **options: object) -> object:
        if loaded.config().method == "bidense":  # type: ignore[attr-defined]
            raise TrainingError("the loss is not finite")
        return real(loaded, folder, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("bidensify.train.run_recipe", train, raising=False)
    code, text = compare(recipe, tmp_path / "out", "--teacher", str(out / "teacher"))
    assert code == 1
    assert "bidense, seed 0: failed. TrainingError: the loss is not finite" in text
    results = Results.read(tmp_path / "out" / "results.json")
    assert [(cell.method, cell.state) for cell in results.cells] == [("bidense", "failed"), ("bnn", "done")]
    assert not (tmp_path / "out" / "teacher").exists()
    monkeypatch.undo()
    code, text = compare(recipe, tmp_path / "out", "--teacher", str(out / "teacher"))
    assert code == 0, text
    assert {cell.state for cell in Results.read(tmp_path / "out" / "results.json").cells} == {"done"}


def test_cells_in_processes_of_their_own(recipe: Path, out: Path, tmp_path: Path) -> None:
    code, text = compare(
        recipe, tmp_path / "out", "--jobs", "2", "-t", str(out / "teacher"), "--own", "bnn:stages[0].lr=2.0e-3"
    )
    assert code == 0, text
    cells = {cell.method: cell for cell in Results.read(tmp_path / "out" / "results.json").cells}
    before = {cell.method: cell for cell in Results.read(out / "results.json").cells if cell.seed == 0}
    assert cells["bidense"].metrics == before["bidense"].metrics
    assert cells["bnn"].history != before["bnn"].history
    code, text = compare(recipe, tmp_path / "out", "-t", str(out / "teacher"))
    assert code == 1
    assert "bnn, seed 0: failed" in text
    assert "stages[0].lr" in text


def test_a_finished_cell_under_other_changes_or_another_teacher(recipe: Path, out: Path, tmp_path: Path) -> None:
    own = tmp_path / "out"
    shutil.copytree(out, own)
    code, text = compare(recipe, own, "--own", "bnn:stages[0].epochs=2")
    assert code == 0, text
    epochs = {cell.method: len(cell.history) for cell in Results.read(own / "results.json").cells}
    assert epochs == {"bidense": 1, "bnn": 2}
    other = tmp_path / "teacher"
    shutil.copytree(out / "teacher", other)
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: value + 1 if name == "head.bias" else value for name, value in weights.items()},
        other / "model.safetensors",
    )
    code, text = compare(recipe, own, "-t", str(other))
    assert code == 1
    assert "bidense, seed 0: failed" in text
    assert "it cannot go on with the teacher" in " ".join(text.split())
    assert {cell.state for cell in Results.read(own / "results.json").cells} == {"failed"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "bidense,nonsense"], "nonsense"),
        (["--methods", "bnn,bnn"], "each once"),
        (["--methods", "bnn,"], "with commas between"),
        (["--seeds", "0,x"], "give whole numbers"),
        (["--own", "bnn"], "is not METHOD:PATH=VALUE"),
        (["--own", "bnn:stages[0].lrr=1"], "lrr"),
        (["--methods", "bnn", "--own", "bidense:stages[0].lr=1"], "which is not compared"),
    ],
)
def test_wrong_use(recipe: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["compare", str(recipe), "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else(recipe: Path, out: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not a comparison's folder"):
        Matrix(loaded, ["bnn"], [0], tmp_path).claim()
    with pytest.raises(ConfigError, match=r"under another recipe; it differs in data.batch_size"):
        Matrix(load_recipe(recipe, ["data.batch_size=2"]), ["bnn"], [0], out).claim()
    result = CliRunner().invoke(app, ["compare", str(recipe)])
    assert result.exit_code == 2
    assert "give --out FOLDER" in result.output
    result = CliRunner().invoke(app, ["compare", str(out / "teacher"), "--methods", "bnn"])
    assert result.exit_code == 2
    assert "--methods is for comparing methods under a recipe" in result.output


def test_the_full_precision_forms_are_evaluated_as_the_recipe_says(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def evaluate(model: nn.Module, **options: Any) -> dict[str, float]:
        seen.append(options)
        return {"miou": 0.5}

    monkeypatch.setattr("bidensify.train.evaluate", evaluate)
    monkeypatch.setattr("bidensify.compare.measure.installed_runtimes", list)
    changes = ["evaluate.flip=true", "evaluate.window=[16,16]", "precision=bf16", "channels_last=true"]
    loaded = load_recipe(recipe, changes)
    matrix = Matrix(loaded, ["bnn"], [0], out)
    val = loaded.build_dataset("val")
    found = float_networks(matrix, loaded.build_task(val.info), val, 1, print)
    assert [network.point.name for network in found] == ["float", "bf16"]
    for options in seen:
        assert options["views"] == loaded.views() == Views(window=(16, 16), flip=True)
        assert (options["precision"], options["channels_last"]) == ("bf16", True)


def test_a_network_of_ones_own(out: Path, tmp_path: Path, recipe_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ownnet.py").write_text(
        "from bidensify.models import build_model\ndef make():\n"
        "    return build_model('demo:unet', num_classes=8, width=8, levels=2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = yaml.safe_load(recipe_text)
    own["model"] = {"source": "ownnet:make"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    words = ["compare", str(tmp_path / "own.yaml"), "--methods", "bnn", "--out", str(tmp_path / "out"), "--quiet"]
    for _ in range(2):  # the second time, finished cells are read
        result = CliRunner().invoke(app, [*words, "--seconds", "0", "--pictures", "1"])
        assert result.exit_code == 0, result.output
    names = [point.name for point in Results.read(tmp_path / "out" / "results.json").points]
    assert names[0] == "float"
    assert names[-1] == "bnn"
