from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import bidensify as bd
from bidensify.errors import ConfigError, FormatError
from bidensify.nn import binary_layers
from bidensify.recipe import load_recipe
from bidensify.train import build_student, build_teacher, evaluate, finetune, load_run, run_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
DATA = [Path(os.environ["BIDENSIFY_DATA"])] if "BIDENSIFY_DATA" in os.environ else []
DATA += [parent / "shared" / "data" for parent in RECIPES.parents]
SMALL = [
    "model.options.width=8",
    "data.train={length: 12, cache: false}",
    "data.val={length: 4, cache: false}",
    "data.train.name=scenes",
    "data.train.split=train",
    "data.val.name=scenes",
    "data.val.split=val",
    "data.size=[32, 32]",
    "data.batch_size=4",
    "teacher.stages[0].epochs=2",
    "stages[0].epochs=1",
    "stages[1].epochs=1",
    "calibrate.batches=1",
    "log.tensorboard=false",
    "device=cpu",
]


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert recipe.for_teacher().stages[0].binarize == "none"
    assert recipe.stages[-1].binarize == "all"
    assert load_recipe(recipe.to_dict()) == load_recipe(recipe.to_dict())


@pytest.mark.parametrize("name", ["scenes_segmentation", "scenes_depth"])
def test_teacher_then_student_from_the_recipe_alone(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml", SMALL)
    trained = run_recipe(recipe, tmp_path / "teacher", role="teacher", quiet=True)
    assert trained.teacher_metrics is None
    result = run_recipe(recipe, tmp_path / "student", teacher_weights=tmp_path / "teacher", quiet=True)
    assert result.teacher_metrics == trained.metrics
    assert set(result.metrics) >= {result.primary}
    for folder, expected, binary in (("teacher", trained, False), ("student", result, True)):
        model, own = load_run(tmp_path / folder)
        assert any(True for _ in binary_layers(model)) == binary
        assert (tmp_path / folder / "plan.json").exists() == binary
        val = own.build_dataset("val")
        measured = evaluate(model, own.build_task(val.info), val)
        assert measured == pytest.approx(expected.metrics, rel=1e-3)
    again = run_recipe(recipe, tmp_path / "student", teacher_weights=tmp_path / "teacher", resume=True, quiet=True)
    assert again == result


def test_the_recipe_may_name_the_teacher(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "scenes_segmentation.yaml", SMALL)
    with pytest.raises(ConfigError, match="role='pupil' must be 'student' or 'teacher'"):
        run_recipe(recipe, tmp_path / "student", role="pupil", quiet=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"names no teacher\.weights; train the teacher first"):
        run_recipe(recipe, tmp_path / "student", quiet=True)
    run_recipe(recipe, tmp_path / "teacher", role="teacher", quiet=True)
    named = load_recipe(recipe, [f"teacher.weights={tmp_path / 'teacher' / 'model.safetensors'}"])
    teacher = build_teacher(named)
    student = build_student(named, teacher)
    latent = dict(student.named_parameters())
    kept = [key for key, value in teacher.named_parameters() if key in latent and torch.equal(latent[key], value)]
    assert "encoder.1.0.conv2.weight" in kept  # the student starts from the teacher's weights
    with pytest.raises(FormatError, match=r"do not exist; give a \.safetensors, \.pth or \.ckpt file"):
        build_teacher(named, tmp_path / "nothing")


def test_weights_of_another_model_or_truncated(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "scenes_segmentation.yaml", SMALL)
    run_recipe(recipe, tmp_path / "teacher", role="teacher", quiet=True)
    other = load_recipe(recipe, ["model.options.width=16"])
    with pytest.raises(FormatError, match="are of another model"):
        build_teacher(other, tmp_path / "teacher")
    (tmp_path / "teacher" / "plan.json").write_text("{")
    with pytest.raises(FormatError, match=r"plan\.json' is not whole JSON.*train the run again"):
        load_run(tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FormatError, match="truncated or not safetensors"):
        build_teacher(recipe, tmp_path / "teacher")


def test_load_run_of_what_is_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run folder: it has no recipe\.yaml"):
        load_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(load_recipe(RECIPES / "scenes_segmentation.yaml").to_dict()))
    with pytest.raises(ConfigError, match="is not finished"):
        load_run(tmp_path)


def test_a_network_and_data_of_ones_own_need_no_sections(tiny: ModuleType, tmp_path: Path) -> None:
    recipe = {
        "name": "own",
        "data": {"batch_size": 8},
        "task": {"name": "segmentation", "num_classes": 3},
        "stages": [{"name": "all", "binarize": "all", "epochs": 1, "lr": 0.01, "losses": {"kl": 1}}],
        "calibrate": {"batches": 1},
        "log": {"tensorboard": False},
        "device": "cpu",
    }
    model = tiny.network()
    student = bd.bidensify(model)
    data = torch.utils.data.Subset(tiny.Colours(), range(16))
    finetune(student, teacher=model, recipe=recipe, train=data, val=data, run_dir=tmp_path / "run", quiet=True)
    again, loaded = load_run(tmp_path / "run", model)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(x), student(x))
    assert not any(True for _ in binary_layers(model))
    with pytest.raises(ConfigError, match=r"a network of your own.*load_run\(run_dir, model\)"):
        load_run(tmp_path / "run")
    for build, key in (
        (loaded.build_model, "model.source"),
        (loaded.build_datasets, "data.train"),
        (lambda: loaded.image_size, "data.size"),
        (load_recipe({**recipe, "task": {"name": "segmentation"}}).build_task, "task.num_classes"),
    ):
        with pytest.raises(ConfigError, match=f"recipe 'own' has no {key}.*bidensify.finetune"):
            build()


def test_model_weights_depend_on_the_seed_alone() -> None:
    recipe = load_recipe(RECIPES / "scenes_segmentation.yaml", SMALL)
    torch.manual_seed(1)
    first = recipe.build_model().state_dict()
    torch.manual_seed(2)
    second = recipe.build_model().state_dict()
    third = load_recipe(recipe, ["seed=3"]).build_model().state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first["head.weight"], third["head.weight"])


def test_folder_data_needs_its_root() -> None:
    recipe = load_recipe(RECIPES / "camvid_unet_resnet34.yaml")
    with pytest.raises(ConfigError, match=r"data\.root is not set; give the folder, e\.g\. --set data\.root=FOLDER"):
        recipe.build_datasets()


@pytest.mark.parametrize("name", ["camvid_unet_resnet34", "nyuv2_depth_unet_efficientnet_lite0"])
def test_recipes_fit_the_real_images(name: str) -> None:
    folder = next((path / name.split("_")[0] for path in DATA if (path / name.split("_")[0]).is_dir()), None)
    if folder is None:
        pytest.skip(f"no {name.split('_')[0]} images: set BIDENSIFY_DATA to a folder that holds them")
    pytest.importorskip("segmentation_models_pytorch")
    overrides = [f"data.root={folder}", "data.train.cache=false", "data.val.cache=false", "data.size=[64, 96]"]
    overrides += ["model.options={classes: 11}" if "camvid" in name else "model.options={classes: 1}"]
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides)
    val = recipe.build_dataset("val")
    task, model = recipe.build_task(val.info), recipe.build_model()
    batch: dict[str, Any] = {key: value[None] for key, value in val[0].items()}
    assert torch.isfinite(task.loss(model.eval()(batch["image"]), batch))
    subset = torch.utils.data.Subset(val, range(2))
    metrics = evaluate(model, task, subset, batch_size=2)
    assert json.loads(json.dumps(metrics))[task.primary] >= 0
