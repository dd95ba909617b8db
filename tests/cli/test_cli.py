"""The command line as its users meet it: help, exit codes, files written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import bidensify as bd
from bidensify.bench.int8 import installed_runtimes
from bidensify.cli.app import COMMANDS, app
from bidensify.errors import ConfigError
from bidensify.models import build_model


def text_of(result: object) -> str:
    """Output and errors without the colour, frames and line breaks of typer's own messages."""
    return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", result.output))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [command.__name__ for command in COMMANDS])
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
        (["plan", "demo:vnet"], 2, "demo:unet"),
        (["plan", "demo:unet", "--method", "nonsense"], 2, "bidense"),
        (["plan", "demo:unet", "--method", "xnor", "--act-bits", "2"], 2, "has activations of 1 bit"),
        (["plan", "demo:unet", "--act-bits", "3"], 2, "--act-bits"),
        (["plan", "demo:unet", "-o", "width"], 2, "is not NAME=VALUE"),
        (["plan", "demo:unet", "--input", "3x0x8"], 2, "--input '3x0x8' is no shape"),
        (["plan", "demo:unet", "--config", "no-such.yaml"], 2, "no-such.yaml"),
        (["evaluate", "no-such-folder"], 2, "no-such-folder"),
        (["evaluate", "."], 2, "neither a run folder"),
        (["predict", ".", "no-such.png", "--out", "x"], 2, "no-such.png"),
        (["compare", "."], 2, "is not a run folder"),
        (["bench", "demo:unet", "--kernel", "sse9"], 2, "sse9"),
        (["export", ".", "pyproject.toml"], 2, "exists; give another name"),
        (["export", ".", "net.onnx", "--int8-rest"], 2, "--int8-rest is for *.pte and *.xml"),
        (["export", ".", "net.xml", "--sizes", "64:128:32"], 2, "--sizes is for *.pte"),
        (["export", ".", "net.pte", "--dynamic"], 2, "give --sizes LEAST:MOST:STEP"),
        (["runtime", "sources", "--runtime", "tvm"], 2, "openvino"),
        (["plan", "unet"], 2, "must be SOURCE:NAME"),
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


@pytest.mark.parametrize("bits", [1, 2])
def test_convert_writes_a_latent_network(cli: CliRunner, tmp_path: Path, bits: int) -> None:
    result = cli.invoke(app, ["convert", "demo:unet", str(tmp_path / "out"), "--act-bits", str(bits)])
    assert result.exit_code == 0, text_of(result)
    model = bd.from_pretrained(tmp_path / "out")
    assert {layer.binarizer.planes for _, layer in bd.nn.binary_layers(model)} == {bits}
    assert model(torch.zeros(1, 3, 32, 32)).shape[-2:] == (32, 32)


def test_the_whole_way(cli: CliRunner, work: Path, tmp_path: Path) -> None:
    run = work / "run"
    assert (work / "run_teacher" / "model.safetensors").is_file()
    again = cli.invoke(app, ["finetune", str(work / "tiny.yaml"), "--run-dir", str(run), "--quiet"])
    assert again.exit_code == 2
    assert "resume" in text_of(again)

    measured = cli.invoke(app, ["evaluate", str(run), "--json"])
    assert measured.exit_code == 0, text_of(measured)
    assert 0 <= json.loads(measured.output)["miou"] <= 1
    bits = load_file(work / "packed" / "model.safetensors")
    assert any(value.dtype == torch.uint8 for value in bits.values())

    compared = cli.invoke(app, ["compare", str(work / "run_teacher"), str(run), "--out", str(tmp_path / "c.html")])
    assert compared.exit_code == 0, text_of(compared)
    assert "<html" in (tmp_path / "c.html").read_text()


def test_a_packed_folder_knows_what_it_is_for(cli: CliRunner, work: Path, tmp_path: Path) -> None:
    """Evaluate, predict, bench, summary and export take it alone, and give what the run gives."""
    packed = str(work / "packed")
    own = cli.invoke(app, ["evaluate", packed, "--json"])
    assert own.exit_code == 0, text_of(own)
    given = cli.invoke(app, ["evaluate", packed, "--recipe", str(work / "run" / "recipe.yaml"), "--json"])
    assert json.loads(own.output) == json.loads(given.output)
    latent = cli.invoke(app, ["evaluate", str(work / "run"), "--json"])
    assert abs(json.loads(own.output)["pixel_accuracy"] - json.loads(latent.output)["pixel_accuracy"]) < 0.01
    for folder in ("run", "packed"):
        timed = cli.invoke(app, ["bench", str(work / folder), "--seconds", "0.02", "--json"])
        assert timed.exit_code == 0, text_of(timed)
        assert "float" in json.loads(timed.output)["rows"][0]["milliseconds"]
        counted = cli.invoke(app, ["summary", str(work / folder), "--json"])
        assert json.loads(counted.output)["input_size"] == [3, 32, 32]
        done = cli.invoke(app, ["export", str(work / folder), str(tmp_path / f"{folder}.pt2")])
        assert done.exit_code == 0, text_of(done)
    assert "LATENT" in text_of(cli.invoke(app, ["summary", str(work / "run")]))
    header = json.loads((work / "packed" / "bidensify.json").read_text())
    assert header["extra"]["recipe"]["task"]["num_classes"] == 8
    assert str(work) not in json.dumps(header)
    refused = cli.invoke(app, ["evaluate", packed, "--set", "model.options.width=16"])
    assert refused.exit_code == 2
    assert "has no effect" in text_of(refused)


def test_check_says_what_a_run_would_be_refused_for(cli: CliRunner, work: Path, tmp_path: Path) -> None:
    result = cli.invoke(app, ["check", str(work / "tiny.yaml"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["problems"] == []
    assert {"recipe", "data.train", "network"} <= {what for what, _ in found["rows"]}
    recipe = tmp_path / "none.yaml"
    folder = "{name: image_mask_folder, split: train, classes: 2}"
    recipe.write_text((work / "tiny.yaml").read_text().replace("{name: scenes, split: train, length: 8}", folder))
    result = cli.invoke(app, ["check", str(recipe), "-s", f"data.root={tmp_path}"])
    assert result.exit_code == 1
    assert "problem: data: " in result.output


def test_code_that_only_a_folder_names_is_not_run(cli: CliRunner, work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(work / "run", run)
    module = tmp_path / "evil_module.py"
    module.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("imports: []", f"imports: [{module}]"))
    for name in ("evaluate", "summary", "bench"):
        result = cli.invoke(app, [name, str(run)])
        assert result.exit_code == 2
        assert "--trust" in result.output
        assert not (tmp_path / "ran").exists()
    assert cli.invoke(app, ["summary", str(run), "--trust"]).exit_code == 0
    assert (tmp_path / "ran").exists()


def test_summary_in_three_forms(cli: CliRunner) -> None:
    arguments = ["summary", "demo:unet", "-o", "width=8", "--method", "bidense", "--input", "3x64x64"]
    data = json.loads(cli.invoke(app, [*arguments, "--json"]).output)
    assert data["state"] == "LATENT"
    assert data["file_bytes"] < data["float_bytes"] / 4
    markdown = cli.invoke(app, [*arguments, "--format", "markdown"]).output
    assert "| stem.0 | Conv2d | 8×32×32 |" in markdown
    assert "first layer on the image" in markdown
    assert "packed file: about" in text_of(cli.invoke(app, arguments))


def test_a_report_is_a_page(cli: CliRunner, work: Path, tmp_path: Path) -> None:
    result = cli.invoke(app, ["compare", str(work / "run"), "--out", str(tmp_path / "c.pdf")])
    assert result.exit_code == 2
    assert "must end in .html" in text_of(result)
    assert not (tmp_path / "c.pdf").exists()


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


def test_bench_on_what_does_not_run(cli: CliRunner, tmp_path: Path) -> None:
    result = cli.invoke(app, ["bench", "demo:unet", "--size", "0", "8"])
    assert result.exit_code == 2
    assert "--size 0 8: height and width are at least 1" in text_of(result)
    network = tmp_path / "network.py"
    network.write_text("from torch import nn\ndef wide():\n    return nn.Sequential(nn.Conv2d(2, 4, 9))\n")
    result = cli.invoke(app, ["bench", f"{network}:wide", "--size", "8", "8"])
    assert result.exit_code == 2
    assert "does not run on an image 1×2×8×8" in text_of(result)


def test_a_misspelt_key_is_quoted_with_its_path(cli: CliRunner, tmp_path: Path, recipe_text: str) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(recipe_text.replace("epochs: 1, lr: 1.0e-3, losses", "epoch: 1, lr: 1.0e-3, losses"))
    result = cli.invoke(app, ["finetune", str(recipe), "--run-dir", str(tmp_path / "run")])
    assert result.exit_code == 2
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


def test_ctrl_c_says_how_to_go_on(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe_text: str
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe_text)

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bidensify.train.run_recipe", stop, raising=False)
    result = cli.invoke(app, ["finetune", str(recipe), "--run-dir", str(tmp_path / "run")])
    assert result.exit_code == 130
    assert text_of(result).count("Stopped") == 1
    assert "with --resume goes on from the last checkpoint" in text_of(result)


def test_a_students_folder_is_looked_at_before_its_teacher_is_trained(
    cli: CliRunner, tmp_path: Path, recipe_text: str
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe_text)
    result = cli.invoke(app, ["finetune", str(recipe), "--run-dir", str(recipe)])
    assert result.exit_code == 2
    assert "is a file; choose another" in text_of(result)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_devices_that_are_not_here(cli: CliRunner, tmp_path: Path, device: str) -> None:
    result = cli.invoke(app, ["evaluate", str(tmp_path), "--device", device])
    assert result.exit_code == 2
    assert f"--device '{device}'" in text_of(result)


def test_a_trained_network_takes_no_other_options(cli: CliRunner, tmp_path: Path, recipe_text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_text)
    result = cli.invoke(app, ["evaluate", str(tmp_path), "--set", "model.options.width=16"])
    assert result.exit_code == 2
    assert "--set model.options.width=16 has no effect" in text_of(result)


def test_a_run_is_compared_once(cli: CliRunner, tmp_path: Path) -> None:
    result = cli.invoke(app, ["compare", str(tmp_path), f"{tmp_path}/."])
    assert result.exit_code == 2
    assert "is given twice" in text_of(result)


def test_int8_networks_that_a_folder_keeps_are_taken_again(cli: CliRunner, tmp_path: Path) -> None:
    if not installed_runtimes():
        pytest.skip("no runtime for int8 is installed: pip install onnxruntime")
    command = [
        "bench",
        "demo:unet",
        "-o",
        "width=4",
        "--size",
        "32",
        "32",
        "--threads",
        "1",
        "--seconds",
        "0.01",
        "--int8",
    ]
    command += ["--int8-folder", str(tmp_path)]
    assert cli.invoke(app, command).exit_code == 0
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*int8*") if file.is_file()}
    assert kept
    assert cli.invoke(app, command).exit_code == 0
    assert kept == {file: file.stat().st_mtime_ns for file in kept}


def test_images_of_one_channel_that_the_data_set_says(cli: CliRunner, tmp_path: Path, recipe_text: str) -> None:
    """Neither the recipe's mean nor ``data.in_channels`` says so: the data set and the network do."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("images", "labels"):
            (tmp_path / "grey" / split / kind).mkdir(parents=True)
        for number in range(count):
            image = generator.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "grey" / split / "images" / f"{number}.png")
            Image.fromarray(image // 128).save(tmp_path / "grey" / split / "labels" / f"{number}.png")
    recipe = yaml.safe_load(recipe_text)
    recipe["model"]["options"] |= {"num_classes": 2, "in_channels": 1}
    for split in ("train", "val"):
        recipe["data"][split] = {"name": "image_mask_folder", "split": split, "classes": 2, "channels": 1}
    recipe["data"]["root"] = str(tmp_path / "grey")
    file, run = tmp_path / "grey.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(recipe))
    for words in (
        ["finetune", str(file), "-d", str(run), "--dry-run"],
        ["finetune", str(file), "-d", str(run), "--quiet"],
        ["calibrate", str(file), "-t", f"{run}_teacher"],
        ["sensitivity", str(file), "-t", f"{run}_teacher", "--out", str(tmp_path / "found.json")],
    ):
        result = cli.invoke(app, words)
        assert result.exit_code == 0, result.output


def test_what_was_asked_for_and_cannot_be_is_wrong_use(cli: CliRunner, tmp_path: Path, recipe_text: str) -> None:
    recipe = yaml.safe_load(recipe_text)
    recipe["data"]["train"] = recipe["data"]["val"] = {"name": "image_mask_folder", "split": "train", "classes": 8}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    for words, message in (
        (["plan", "demo:unet", "--keep", "nothing"], "rule 'nothing' matches no"),
        (["plan", "demo:unet", "--keep", "re:("], "not a regular expression"),
        (
            ["finetune", str(tmp_path / "tiny.yaml"), "-d", str(tmp_path / "run"), "--set", "data.root=none"],
            "root='none'",
        ),
    ):
        result = cli.invoke(app, words)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
