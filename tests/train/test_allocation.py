"""A recipe's budget: spent before the run begins, kept in its folder, held by the student that is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.nn import binary_layers, int8_layers
from bidensify.precisions import Sensitivity
from bidensify.recipe import load_recipe
from bidensify.train import build_student, evaluate, load_run, recipe_sensitivity, run_recipe
from bidensify.train.loop import Loop


def recipe(budget: Any, **changes: Any) -> dict[str, Any]:
    scenes = {"name": "scenes", "length": 8, "cache": True}
    stage = {"epochs": 1, "lr": 0.001}
    return {
        "name": "budgeted",
        "model": {"source": "demo:unet", "options": {"width": 8, "levels": 2, "num_classes": 8}},
        "data": {
            "train": {**scenes, "split": "train"},
            "val": {**scenes, "split": "val"},
            "size": [32, 32],
            "batch_size": 4,
        },
        "task": {"name": "segmentation"},
        "teacher": {"stages": [{"name": "float", "binarize": "none", **stage}]},
        "binarize": {"budget": budget},
        "stages": [{"name": "all", "binarize": "all", **stage, "losses": {"task": 1, "kl": 1}}],
        "calibrate": {"batches": 1},
        "log": {"tensorboard": False},
        "device": "cpu",
        **changes,
    }


def test_a_run_spends_its_budget(tmp_path: Path) -> None:
    data = recipe({"bytes": 0.3, "images": 3})
    run_recipe(data, tmp_path / "run", train_teacher=True, quiet=True)
    student, own = load_run(tmp_path / "run")
    assert own.to_dict()["binarize"]["budget"] == {"bytes": 0.3, "images": 3}
    full = bd.summary(load_recipe(data).build_model(), (3, 32, 32)).total("bytes")
    share = bd.summary(student, (3, 32, 32)).total("bytes") / full
    whole = bd.bidensify(load_recipe(data).build_model())
    assert bd.summary(whole, (3, 32, 32)).total("bytes") / full < share <= 0.3
    found = Sensitivity.load(tmp_path / "run" / "sensitivity.json")
    assert (found.samples, found.around, found.input_size) == (3, "teacher", (3, 32, 32))
    kept = json.loads((tmp_path / "run" / "allocation.json").read_text())["chosen"]
    assert {path for path, name in kept.items() if name == "int8"} == {path for path, _ in int8_layers(student)}
    assert {path for path, name in kept.items() if name not in ("int8", "float")} == {
        path for path, _ in binary_layers(student)
    }
    two = {path for path, layer in binary_layers(student) if layer.binarizer.planes == 2}
    assert two == {path for path, name in kept.items() if name == "act_bits 2"}

    # A finished run is read; a longer one goes on with the student that it began with, and nothing is measured again.
    before = (tmp_path / "run" / "sensitivity.json").stat().st_mtime_ns
    data["stages"][0]["epochs"] = 2
    teacher = tmp_path / "run_teacher"
    result = run_recipe(data, tmp_path / "run", teacher_weights=teacher, resume=True, quiet=True)
    assert len(result.history) == 2
    assert (tmp_path / "run" / "sensitivity.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="has another recipe; it differs in binarize.budget.bytes"):
        other = recipe({"bytes": 0.4, "images": 3})
        run_recipe(other, tmp_path / "run", teacher_weights=teacher, resume=True, quiet=True)

    # A run that was stopped before it began has nothing but its forecast; it begins.
    (tmp_path / "killed").mkdir()
    (tmp_path / "run" / "sensitivity.json").rename(tmp_path / "killed" / "sensitivity.json")
    run_recipe(recipe({"bytes": 0.3, "images": 3}), tmp_path / "killed", teacher_weights=teacher, quiet=True)
    assert (tmp_path / "killed" / "sensitivity.json").stat().st_mtime_ns == before


def test_an_allocated_student_trains_resumes_packs_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Float is too large for the budget, so that what gains over one bit gains by int8.
    data = recipe({"bytes": 0.35, "images": 3, "precisions": ["int8"]})
    data["stages"][0]["epochs"] = 3
    run_recipe(data, tmp_path / "whole", train_teacher=True, quiet=True)
    whole, own = load_run(tmp_path / "whole")
    rounded = dict(int8_layers(whole))
    assert rounded
    assert all(float(layer.int8.high) > float(layer.int8.low) for layer in rounded.values() if layer.int8)
    chosen = json.loads((tmp_path / "whole" / "allocation.json").read_text())["chosen"]
    assert set(rounded) == {path for path, name in chosen.items() if name == "int8"}
    teacher = tmp_path / "whole_teacher"
    assert not torch.equal(
        next(iter(rounded.values())).weight, load_run(teacher)[0].get_submodule(next(iter(rounded))).weight
    )

    # Stopped before its last epoch and gone on with, it ends with the same weights.
    epoch = Loop._epoch

    def stops(loop: Loop, step: Any, at: Any) -> None:
        if at.index == 2:
            raise KeyboardInterrupt
        epoch(loop, step, at)

    monkeypatch.setattr(Loop, "_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(data, tmp_path / "cut", teacher_weights=teacher, quiet=True)
    monkeypatch.setattr(Loop, "_epoch", epoch)
    result = run_recipe(data, tmp_path / "cut", teacher_weights=teacher, resume=True, quiet=True)
    cut = load_run(tmp_path / "cut")[0]
    assert len(result.history) == 3
    assert all(torch.equal(value, cut.state_dict()[key]) for key, value in whole.state_dict().items())

    packed, val = bd.pack(cut), own.build_datasets()[1]
    x = torch.stack([val[index]["image"] for index in range(2)])
    with torch.no_grad():
        assert torch.equal(packed(x), cut.to(memory_format=torch.channels_last)(x))  # type: ignore[call-overload]
    metrics = evaluate(packed, own.build_task(), val)
    assert metrics["miou"] == pytest.approx(result.metrics["miou"], abs=1e-6)


def test_that_images_are_looked_at_whole_is_told() -> None:
    data = load_recipe(recipe({"bytes": 0.3}, evaluate={"flip": True}))
    train, val = data.build_datasets()
    teacher = data.build_model().eval()
    student = build_student(data, teacher, config=data.config())
    with pytest.warns(
        UserWarning, match="looks at every image once, whole, not with evaluate's window, flip and scales"
    ):
        found = recipe_sensitivity(data, student, teacher, train, val, images=1, quiet=True)
    assert found.samples == 1


def test_mistakes_in_a_budget_are_told(tmp_path: Path) -> None:
    for budget, message in (
        ({"opps": 0.3}, "binarize.budget.opps: unknown key.*ops"),
        ({}, "a budget needs a bound"),
        ({"ops": "much"}, "binarize.budget.ops='much': "),
        (0.3, "budget=0.3 must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe(recipe(budget))
    loaded = load_recipe(recipe({"ops": 0.5}, teacher=None))
    with pytest.raises(ConfigError, match=r"has binarize.budget.*at the start of its run"):
        build_student(loaded)
    with pytest.raises(ConfigError, match="what each layer costs a trained teacher"):
        run_recipe(loaded, tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="no table of milliseconds 'none.json'"):
        untrained = {"ms": 3, "table": "none.json"}
        run_recipe(recipe(untrained), tmp_path / "ms", train_teacher=True, quiet=True)


def test_the_options_that_are_gone_may_hold_what_is_left_of_them() -> None:
    data = recipe({"ops": 0.5})
    data["binarize"] |= {"fusion_grouping": "interleaved", "weights": "pretrained"}
    assert load_recipe(data).config() == bd.BidensifyConfig()
    data["binarize"]["weights"] = "random"
    with pytest.raises(ConfigError, match="the option 'weights' is gone"):
        load_recipe(data)


def test_a_run_may_start_from_least_squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[int] = []

    def noted(student: Any, teacher: Any, batches: list[Any]) -> None:
        fitted.append(len(batches))
        bd.fit_scales(student, teacher, batches)

    monkeypatch.setattr("bidensify.train.stages.fit_scales", noted)
    data = recipe(None, binarize={}, calibrate={"batches": 1, "least_squares": True})
    result = run_recipe(data, tmp_path / "run", train_teacher=True, quiet=True)
    assert fitted == [1]
    assert len(result.history) == 1
    data = recipe(None, binarize={}, calibrate=data["calibrate"], teacher=None)
    data["stages"][0]["losses"] = {"task": 1}
    with pytest.raises(ConfigError, match="has calibrate.least_squares, which fits to a teacher's activations"):
        run_recipe(data, tmp_path / "alone", quiet=True)
