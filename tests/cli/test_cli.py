"""The command line as its users meet it: help, exit codes, files written."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import bidensify as bd
from bidensify.cli import bench, deploy, models, runs, study  # noqa: F401  (they register the commands)
from bidensify.cli.app import app
from bidensify.errors import ConfigError
from bidensify.models import build_model

COMMANDS = ("plan", "convert", "finetune", "evaluate", "predict", "compare", "pack", "bench", "demo")
RECIPE = """
name: tiny
model: {source: "demo:unet", options: {num_classes: 8, width: 8, levels: 2}}
data:
  train: {name: scenes, split: train, length: 8}
  val: {name: scenes, split: val, length: 4}
  size: [32, 32]
  batch_size: 4
task: {name: segmentation}
teacher: {stages: [{name: float, binarize: none, epochs: 1, lr: 1.0e-3}]}
stages: [{name: all, binarize: all, epochs: 1, lr: 1.0e-3, losses: {task: 1.0, kl: 1.0}}]
calibrate: {batches: 1}
device: cpu
log: {tensorboard: false}
"""


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner()


def text_of(result: object) -> str:
    """Output and errors without colour and line breaks of panels."""
    out = result.output + (result.stderr if result.stderr_bytes is not None else "")  # type: ignore[attr-defined]
    return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", out))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(cli: CliRunner, name: str) -> None:
    result = cli.invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert f"bidensify {name}" in text_of(result)
    assert "Examples" in text_of(result)


def test_version(cli: CliRunner) -> None:
    assert bd.__version__ in cli.invoke(app, ["--version"]).output


def test_plan_prints_json(cli: CliRunner) -> None:
    result = cli.invoke(app, ["plan", "demo:unet", "--json"])
    assert result.exit_code == 0
    data = json.loads(result.output)
    assert {layer["action"] for layer in data["layers"]} == {"binary", "keep"}
    assert data == json.loads(json.dumps(bd.plan(build_model("demo:unet")).to_dict()))


def test_plan_prints_a_table(cli: CliRunner) -> None:
    result = cli.invoke(app, ["plan", "demo:unet"])
    assert result.exit_code == 0
    assert "of MACs" in text_of(result)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "demo:vnet"], 1, "demo:unet"),
        (["plan", "unet"], 1, "must be SOURCE:NAME"),
        (["plan"], 2, "Missing argument"),
        (["plan", "demo:unet", "--jsn"], 2, "No such option"),
        (["finetune", "no-such-file.yaml", "--run-dir", "x"], 2, "no-such-file.yaml"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_exit_codes(cli: CliRunner, arguments: list[str], code: int, message: str) -> None:
    result = cli.invoke(app, arguments)
    assert result.exit_code == code
    assert message in text_of(result)


def test_an_error_is_one_panel_and_debug_shows_the_traceback(cli: CliRunner) -> None:
    quiet = cli.invoke(app, ["plan", "demo:vnet"])
    assert "Traceback" not in text_of(quiet)
    loud = cli.invoke(app, ["plan", "demo:vnet", "--debug"])
    assert isinstance(loud.exception, ConfigError)


def test_convert_writes_a_latent_network(cli: CliRunner, tmp_path: Path) -> None:
    result = cli.invoke(app, ["convert", "demo:unet", str(tmp_path / "out")])
    assert result.exit_code == 0, text_of(result)
    model = bd.from_pretrained(tmp_path / "out")
    assert model(torch.zeros(1, 3, 32, 32)).shape[-2:] == (32, 32)


def test_the_whole_way(cli: CliRunner, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    run = tmp_path / "run"
    result = cli.invoke(app, ["finetune", str(recipe), "--run-dir", str(run), "--quiet"])
    assert result.exit_code == 0, text_of(result)
    assert (tmp_path / "run_teacher" / "model.safetensors").is_file()

    again = cli.invoke(app, ["finetune", str(recipe), "--run-dir", str(run), "--quiet"])
    assert again.exit_code == 1
    assert "resume" in text_of(again)

    measured = cli.invoke(app, ["evaluate", str(run), "--json"])
    assert measured.exit_code == 0, text_of(measured)
    assert 0 <= json.loads(measured.output)["miou"] <= 1

    packed = cli.invoke(app, ["pack", str(run), str(tmp_path / "packed")])
    assert packed.exit_code == 0, text_of(packed)
    bits = load_file(tmp_path / "packed" / "model.safetensors")
    assert any(value.dtype == torch.uint8 for value in bits.values())
    same = cli.invoke(app, ["evaluate", str(tmp_path / "packed"), "--recipe", str(run / "recipe.yaml"), "--json"])
    assert same.exit_code == 0, text_of(same)
    first, second = json.loads(measured.output), json.loads(same.output)
    assert abs(first["pixel_accuracy"] - second["pixel_accuracy"]) < 0.01

    image = tmp_path / "photo.png"
    Image.fromarray(np.zeros((33, 47, 3), np.uint8)).save(image)
    predicted = cli.invoke(app, ["predict", str(run), str(image), "--out", str(tmp_path / "predictions")])
    assert predicted.exit_code == 0, text_of(predicted)
    assert Image.open(tmp_path / "predictions" / "photo.labels.png").size == (47, 33)
    before = image.read_bytes()
    refused = cli.invoke(app, ["predict", str(run), str(image), "--out", str(tmp_path)])
    assert refused.exit_code == 1
    assert "is an image that was given; write to another folder" in text_of(refused)
    assert image.read_bytes() == before
    image.write_bytes(before[:40])
    deep = cli.invoke(app, ["predict", str(run), str(image), "--out", str(tmp_path / "predictions")])
    assert deep.exit_code == 1
    assert "is not an image that can be read" in text_of(deep)

    compared = cli.invoke(app, ["compare", str(tmp_path / "run_teacher"), str(run), "--out", str(tmp_path / "c.html")])
    assert compared.exit_code == 0, text_of(compared)
    assert "<html" in (tmp_path / "c.html").read_text()


def test_bench_times_a_network_against_float(cli: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arguments = ["bench", "demo:unet", "-o", "width=8", "--size", "32", "32", "--seconds", "0.05", "--out", str(file)]
    result = cli.invoke(app, [*arguments, "--profile"])
    assert result.exit_code == 0, text_of(result)
    assert "packed layers" in text_of(result)
    row = json.loads(file.read_text())["rows"][0]
    assert set(row["profile"]) == set(row["milliseconds"])
    assert "float" in row["milliseconds"]
    assert len(row["milliseconds"]) >= 2
    assert cli.invoke(app, ["bench", "demo:unet", "--kernel", "sse9"]).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0", "8"], "--size 0 8: height and width are at least 1"),
        (["-o", "in_channels=1", "--size", "8", "8"], "does not run on an image 1×3×8×8"),
    ],
)
def test_bench_on_what_does_not_run(cli: CliRunner, arguments: list[str], message: str) -> None:
    result = cli.invoke(app, ["bench", "demo:unet", "-o", "width=8", *arguments])
    assert result.exit_code == 1
    assert message in text_of(result)


def test_a_misspelt_key_is_quoted_with_its_path(cli: CliRunner, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(RECIPE.replace("epochs: 1, lr: 1.0e-3, losses", "epoch: 1, lr: 1.0e-3, losses"))
    result = cli.invoke(app, ["finetune", str(recipe), "--run-dir", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "stages[0].epoch" in text_of(result)
    assert "epochs" in text_of(result)


def test_errors_of_the_file_system_are_panels(cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    result = cli.invoke(app, ["convert", "demo:unet", "-o", "width=8", str(tmp_path / "file" / "out")])
    assert result.exit_code == 1
    assert "NotADirectoryError" in text_of(result)
    assert "Traceback" not in text_of(result)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.safetensors")

    monkeypatch.setattr("safetensors.torch.save_model", full)
    result = cli.invoke(app, ["convert", "demo:unet", "-o", "width=8", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "'out/model.safetensors': No space left on device; make room and try again" in text_of(result)


def test_ctrl_c_says_how_to_go_on(cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bidensify.train.run_recipe", stop, raising=False)
    result = cli.invoke(app, ["finetune", str(recipe), "--run-dir", str(tmp_path / "run")])
    assert result.exit_code == 130
    assert text_of(result).count("Stopped") == 1
    assert "with --resume goes on from the last checkpoint" in text_of(result)


def test_a_students_folder_is_looked_at_before_its_teacher_is_trained(cli: CliRunner, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    result = cli.invoke(app, ["finetune", str(recipe), "--run-dir", str(recipe)])
    assert result.exit_code == 1
    assert "is a file; choose another" in text_of(result)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_devices_that_are_not_here(cli: CliRunner, tmp_path: Path, device: str) -> None:
    result = cli.invoke(app, ["evaluate", str(tmp_path), "--device", device])
    assert result.exit_code == 1
    assert f"--device '{device}'" in text_of(result)


def test_a_trained_network_takes_no_other_options(cli: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = cli.invoke(app, ["evaluate", str(tmp_path), "--set", "model.options.width=16"])
    assert result.exit_code == 1
    assert "--set model.options.width=16 has no effect" in text_of(result)


def test_a_run_is_compared_once(cli: CliRunner, tmp_path: Path) -> None:
    result = cli.invoke(app, ["compare", str(tmp_path), f"{tmp_path}/."])
    assert result.exit_code == 1
    assert "is given twice" in text_of(result)
