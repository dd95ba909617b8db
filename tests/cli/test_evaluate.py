"""``evaluate``: papers' columns, ways of looking at an image, and predictions as files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import bidensify as bd
from bidensify.cli.app import app
from bidensify.cli.predict import write_values
from bidensify.tasks import DepthTask
from bidensify.train import evaluate, load_run


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


def test_the_columns_are_those_of_metrics_and_summary(work: Path) -> None:
    found = json.loads(run("evaluate", work / "run", "--json"))
    cost = bd.summary(load_run(work / "run")[0], (3, 32, 32))
    assert found["columns"] == {
        "Params (K)": round(cost.total("params") / 1e3, 1),
        "OPs (G)": round(cost.total("ops") / 1e9, 2),
        "pixAcc (%)": round(100 * found["pixel_accuracy"], 2),
        "mIoU (%)": round(100 * found["miou"], 2),
    }
    assert "mIoU (%)" in run("evaluate", work / "packed")


def test_windows_and_mirror_from_the_command_line_and_the_recipe(work: Path) -> None:
    plain = json.loads(run("evaluate", work / "run", "--json"))
    covered = json.loads(run("evaluate", work / "run", "--json", "--window", 32, 32))
    assert covered == plain
    typed = json.loads(run("evaluate", work / "run", "--json", "--window", 16, 16, "--stride", 8, 16, "--flip"))
    model, recipe = load_run(work / "run")
    from bidensify.recipe import load_recipe

    changed = load_recipe(recipe, ["evaluate.window=[16,16]", "evaluate.stride=[8,16]", "evaluate.flip=true"])
    val = changed.build_dataset("val")
    assert evaluate(model, changed.build_task(), val, views=changed.views())["miou"] == pytest.approx(typed["miou"])
    assert typed["miou"] != plain["miou"]
    refused = CliRunner().invoke(app, ["evaluate", str(work / "run"), "--stride", "8", "8"])
    assert refused.exit_code == 2
    assert "without evaluate.window" in refused.stderr


def test_saved_predictions_are_indexed_and_give_the_metric_again(work: Path, tmp_path: Path) -> None:
    found = json.loads(run("evaluate", work / "run", "--json", "--save", tmp_path / "out"))
    recipe = load_run(work / "run")[1]
    val = recipe.build_dataset("val")
    right = total = 0
    for index in range(len(val)):
        picture = Image.open(tmp_path / "out" / f"{val.name_of(index)}.labels.png")
        assert picture.mode == "P"
        assert tuple(picture.getpalette()[:3]) == val.info.palette[0]  # type: ignore[index]
        mask = val.load(index)["mask"].numpy()
        right += int((np.asarray(picture) == mask)[mask != 255].sum())
        total += int((mask != 255).sum())
    assert right / total == pytest.approx(found["pixel_accuracy"], abs=1e-6)
    again = CliRunner().invoke(app, ["evaluate", str(work / "run"), "--save", str(tmp_path / "out")])
    assert again.exit_code == 2
    assert "is not empty" in again.stderr


def test_predict_looks_as_evaluate_does(work: Path, tmp_path: Path) -> None:
    for name, size in (("a", (50, 30)), ("b", (31, 64))):
        (tmp_path / "photos").mkdir(exist_ok=True)
        values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "photos" / f"{name}.png")
    run("predict", work / "run", tmp_path / "photos", "--out", tmp_path / "one")
    run("predict", work / "run", tmp_path / "photos", "--out", tmp_path / "two", "--window", 16, 16, "--flip")
    for name, size in (("a", (30, 50)), ("b", (64, 31))):
        one, two = (Image.open(tmp_path / kind / f"{name}.labels.png") for kind in ("one", "two"))
        assert one.size == two.size == size
        assert not np.array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize(("far", "steps"), [(10.0, 1000), (80.0, 256)])
def test_depth_in_sixteen_bits(far: float, steps: int, tmp_path: Path) -> None:
    depth = torch.linspace(0.5, far, 12).view(3, 4)
    write_values(tmp_path, "a", depth, DepthTask(max_depth=far))
    picture = Image.open(tmp_path / "a.depth.png")
    assert float(picture.text["depth_scale"]) == 1 / steps  # type: ignore[attr-defined]
    assert np.abs(np.asarray(picture) / steps - depth.numpy()).max() <= 0.5 / steps + 1e-6
