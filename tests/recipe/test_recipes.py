"""Every recipe in recipes/ rehearses and takes two steps a stage, on data in its owner's layout, with a small network."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bidensify.cli.app import app
from bidensify.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))

# By the network's source: what makes it small.
SMALL = {
    "demo:unet": {"width": 8, "levels": 2},
    "paper:upernet_convnext_tiny": {"depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "features": 16},
    "paper:dpt_dinov2_small": {
        "hidden": 16, "layers": 4, "heads": 2, "image": 56, "levels": [8, 8, 8, 8], "features": 16,
    },
    "smp:Unet/resnet34": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]},
    "smp:Unet/tu-tf_efficientnet_lite0": {
        "encoder_depth": 3, "decoder_channels": [16, 8, 8], "encoder_imagenet": None,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory, trees: ModuleType) -> Any:
    """Gives the root of a recipe's data, made the first time it is asked for."""
    made: dict[str, Path] = {}

    def root(recipe: Recipe) -> Path | None:
        section = recipe.data.train
        assert section is not None
        name = section.name
        kind = f"{name}/{recipe.task.name}"
        if name == "scenes" or kind in made:
            return made.get(kind)
        made[kind] = folder = tmp_path_factory.mktemp("data")
        if name == "image_mask_folder":
            values = trees.labels([*range(12)], (36, 48)) if recipe.task.name == "segmentation" else None
            if values is None:
                trees.folders(folder, "depth", np.tile(np.linspace(20, 255, 48).astype(np.uint8), (36, 1)))
            else:
                trees.folders(folder, "labels", values)
        else:
            trees.TREES[name][0](folder)
            if name == "voc2012":
                trees.sbd(folder)
        return folder

    return root


def changes(recipe: Recipe, root: Path | None) -> list[str]:
    """The settings that make a recipe small and quick: nothing of its losses, rewrite or task."""
    assert recipe.model is not None
    assert recipe.data.train is not None
    options = recipe.model.options | SMALL[recipe.model.source]
    found = {
        "model.options": options, "data.size": [56, 56], "data.batch_size": 2, "data.workers": 0,
        "log.tensorboard": False, "device": "cpu", "evaluate.teacher": False, "calibrate.at_end": False,
        "data.root": str(root) if root is not None else None,
    }  # fmt: skip
    if recipe.data.train.name == "scenes":
        found |= {"data.train.length": 4, "data.val.length": 2}
    if recipe.data.train.name == "voc2012":
        found["data.train.sbd"] = str(root)
    if recipe.evaluate.window is not None:
        found |= {"evaluate.window": [56, 56], "evaluate.stride": [32, 32]}
    if recipe.evaluate.resize == "native":  # images of 480x640 and more
        found["evaluate.resize"] = "letterbox"
    if recipe.calibrate.batches:
        found["calibrate.batches"] = 1
    found |= {f"stages[{number}].epochs": 1 for number in range(len(recipe.stages))}
    found |= {
        f"teacher.stages[{n}].epochs": 1 for n in range(len(recipe.teacher.stages) if recipe.teacher is not None else 0)
    }
    return [f"{path}={json.dumps(value)}" for path, value in found.items()]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_rehearses_and_trains(name: str, roots: Any, tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("transformers")
    path = str(FOLDER / name)
    recipe = load_recipe(path)
    settings = [part for change in changes(recipe, roots(recipe)) for part in ("--set", change)]
    text = run("finetune", path, "--dry-run", *settings)
    for what in ("data.train", "data.val", "rewrite", "disk", "time", "cost", "first layer on the image"):
        assert what in text, what
    assert not (tmp_path / "run").exists()
    student, teacher = str(tmp_path / "run"), str(tmp_path / "teacher")
    given = []
    if recipe.teacher is not None:
        run("finetune", path, "--role", "teacher", "--run-dir", teacher, "--quiet", *settings)
        given = ["-t", teacher]
    run("finetune", path, "--run-dir", student, "--quiet", *given, *settings)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [record["stage"] for record in result["history"]] == [stage.name for stage in recipe.stages]
    assert result["steps"] == 2 * len(recipe.stages)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("paper/")])
def test_the_paper_s_settings(name: str) -> None:
    """What the paper says, from the table in the issue of the reproduction and section 4 of the paper."""
    recipe = load_recipe(FOLDER / name)
    data, net = name.removeprefix("paper/").removesuffix(".yaml").split("_")[:2]
    assert recipe.data.batch_size == (64 if data == "kitti" else 32)
    rates = {"upernet": {"nyuv2": 6e-5}, "dpt": {"ade20k": 2e-4, "voc2012": 2e-4, "nyuv2": 3e-5, "kitti": 3e-5}}
    stages = recipe.stages if name.endswith("_paper.yaml") else recipe.for_teacher().stages
    assert [(stage.epochs, stage.lr, stage.schedule) for stage in stages] == [
        (200 if data == "voc2012" else 50, rates[net].get(data, 1e-4), "onecycle")
    ]
    if data in ("nyuv2", "kitti"):
        assert recipe.task.options["focus"] == 0.85
        assert recipe.data.augment.rotate == {"nyuv2": 2.5, "kitti": 1.0}[data]
        assert recipe.image_size == {"nyuv2": (416, 544), "kitti": (352, 704)}[data]
    else:
        assert recipe.image_size == (480, 480)
    if name.endswith("_paper.yaml"):
        assert recipe.teacher is None
        assert recipe.ema is None
        assert recipe.config().frame == "paper"
    else:
        assert [stage.binarize for stage in recipe.stages] == ["activations", "all"]
        assert all(stage.distils for stage in recipe.stages)
