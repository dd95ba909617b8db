"""Recipes on a GPU: two epochs of the demo's network, resumed, measured and shown from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from bidensify.cli.app import app
from bidensify.errors import ConfigError
from bidensify.recipe import load_recipe
from bidensify.train import finetune, load_run, run_recipe
from bidensify.train.evaluation import evaluate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

DISTILLED = {"task": 1.0, "kl": {"weight": 1.0, "temperature": 2.0}}


def recipe(**changes: Any) -> dict[str, Any]:
    """Two epochs of generated scenes, with what a GPU run uses."""
    scenes = {"name": "scenes", "length": 32, "cache": True}
    return {
        "name": "cuda",
        "model": {"source": "demo:unet", "options": {"width": 8}},
        "data": {
            "train": {**scenes, "split": "train"},
            "val": {**scenes, "split": "val", "length": 8},
            "size": [64, 96],
            "batch_size": 8,
            "workers": 1,
        },
        "task": {"name": "segmentation"},
        "teacher": {"stages": [{"name": "float", "binarize": "none", "epochs": 1, "lr": 4e-3}]},
        "stages": [
            {"name": "activations", "binarize": "activations", "epochs": 1, "lr": 1e-2, "losses": DISTILLED},
            {"name": "all", "binarize": "all", "epochs": 1, "lr": 1e-2, "losses": DISTILLED},
        ],
        "optimizer": {"clip": 5.0},
        "ema": {"decay": 0.9},
        "calibrate": {"batches": 2},
        "log": {"every": 1, "tensorboard": False},
        "precision": "bf16",
        "channels_last": True,
        **changes,
    }


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "step"]


@pytest.mark.parametrize(("precision", "channels_last"), [("bf16", True), ("fp32", False)])
def test_teacher_student_and_command_line(precision: str, channels_last: bool, tmp_path: Path) -> None:
    loaded = load_recipe(recipe(precision=precision, channels_last=channels_last))
    run_recipe(loaded, tmp_path / "teacher", role="teacher", quiet=True)
    result = run_recipe(loaded, tmp_path / "student", teacher_weights=tmp_path / "teacher", quiet=True)
    assert json.loads((tmp_path / "student" / "versions.json").read_text())["device"].startswith("cuda")
    assert result.steps == 8
    assert all(map(math.isfinite, losses(tmp_path / "student")))
    assert {value.device.type for value in load_file(tmp_path / "student" / "model.safetensors").values()} == {"cpu"}
    model, chosen = load_run(tmp_path / "student")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    val = chosen.build_datasets()[1]
    task = chosen.build_task(val.info)
    again = evaluate(
        model.cuda(), task, val, precision=chosen.precision, channels_last=chosen.channels_last, batch_size=8
    )
    # The run measured the weights on the device that they were trained on; here the batches are the same.
    assert again[task.primary] == pytest.approx(result.metrics[task.primary], abs=0.02)

    def run(*arguments: str | Path) -> str:
        called = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert called.exit_code == 0, called.output
        return called.stdout

    run("pack", tmp_path / "student", tmp_path / "packed")
    picture = Path(__file__).parents[2] / "docs" / "demo.png"
    for source, more in (("student", []), ("packed", ["--recipe", tmp_path / "student" / "recipe.yaml"])):
        found = json.loads(run("evaluate", tmp_path / source, *more, "--device", "cuda", "--json"))
        assert found[task.primary] == pytest.approx(result.metrics[task.primary], abs=0.03)
        out = tmp_path / f"predicted_{source}"
        run("predict", tmp_path / source, picture, *more, "--out", out, "--device", "cuda")
        assert (out / "demo.labels.png").is_file()


def test_a_stopped_run_goes_on(tiny: ModuleType, tmp_path: Path) -> None:
    changes = {"device": "auto"}
    with pytest.raises(KeyboardInterrupt):
        tiny.student_run(tmp_path / "run", fail_at=65, changes=changes)
    assert not (tmp_path / "run" / "result.json").exists()
    done = len(losses(tmp_path / "run"))
    result = tiny.student_run(tmp_path / "run", resume=True, changes=changes)
    tiny.student_run(tmp_path / "whole", changes=changes)
    assert done > 0
    assert result.steps == 20
    # Sums of gradients are taken in any order there: equal to rounding, which a flipped sign enlarges.
    broken, whole = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert len(broken) == len(whole) == 20
    assert broken[: done - 1] == pytest.approx(whole[: done - 1], rel=0.25)
    assert broken == pytest.approx(whole, rel=0.5)


def test_a_run_may_move_between_devices(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny.student_run(tmp_path / "run", fail_at=65, changes={"device": "auto"})
    assert tiny.student_run(tmp_path / "run", resume=True, changes={"device": "cpu"}).steps == 20


def test_models_come_back_to_where_they_were(tiny: ModuleType, tmp_path: Path) -> None:
    changes = {**tiny.STUDENT, "device": "auto"}
    for device in ("cpu", "cuda"):
        student, teacher = tiny.network(binary=True).to(device), tiny.network().to(device)
        finetune(
            student,
            teacher=teacher,
            recipe=tiny.recipe(**changes),
            train=tiny.Colours(),
            val=tiny.Colours(16, seed=1),
            run_dir=tmp_path / device,
            task=tiny.TASK,
            quiet=True,
        )
        assert {p.device.type for p in [*student.parameters(), *teacher.parameters()]} == {device}


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    from bidensify.cli.arguments import parse_device

    with pytest.raises(ConfigError, match="cuda:97"):
        parse_device("cuda:97")
