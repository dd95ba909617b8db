"""What decides a run is in its folder; another teacher, other data or another recipe are not the same run."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from bidensify.compare.runs import read_run
from bidensify.errors import ConfigError, FormatError
from bidensify.models import build_model
from bidensify.recipe import load_recipe
from bidensify.train import finetune, load_run, run_recipe
from bidensify.train.optim import lr_factor


def recipe(epochs: int = 1, *overrides: str) -> Any:
    data = {"name": "scenes", "split": "train", "length": 8}
    return load_recipe(
        {
            "name": "x",
            "model": {"source": "demo:unet", "options": {"num_classes": 8, "width": 8}},
            "data": {
                "train": data, "val": {**data, "split": "val", "length": 4}, "size": [32, 32], "batch_size": 4
            },
            "task": {"name": "segmentation"},
            "teacher": {"stages": [{"name": "t", "binarize": "none", "epochs": 1, "lr": 1e-3}]},
            "stages": [{"name": "s", "binarize": "all", "epochs": epochs, "lr": 1e-3, "losses": {"task": 1, "kl": 1}}],
            "calibrate": {"batches": 1},
            "log": {"tensorboard": False},
            "device": "cpu",
        },
        overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher ``t``, another one ``u``, and a student of the first, ``s``."""
    folder = tmp_path_factory.mktemp("runs")
    run_recipe(recipe(), folder / "t", role="teacher", quiet=True)
    run_recipe(recipe(1, "seed=5"), folder / "u", role="teacher", quiet=True)
    run_recipe(recipe(), folder / "s", teacher_weights=folder / "t", quiet=True)
    return folder


def test_the_teacher_is_in_the_folder(runs: Path) -> None:
    inputs = json.loads((runs / "s" / "inputs.json").read_text())
    assert inputs["teacher"]["weights"] == str(runs / "t")
    assert len(inputs["teacher"]["fingerprint"]) == 64
    assert inputs["train"]["samples"] == 8
    assert yaml.safe_load((runs / "s" / "recipe.yaml").read_text())["teacher"]["weights"] == str(runs / "t")
    # Resumed without saying which teacher, the run takes its own, and is told to be finished.
    assert run_recipe(recipe(), runs / "s", resume=True, train_teacher=True, quiet=True).steps == 2
    assert not (runs / "s_teacher").exists()


def test_another_teacher_is_refused(runs: Path) -> None:
    before = (runs / "s" / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"distilled from the teacher .*/t .*cannot go on with the teacher .*/u .*-t"):
        run_recipe(recipe(2), runs / "s", teacher_weights=runs / "u", resume=True, quiet=True)
    assert (runs / "s" / "checkpoints" / "last.pt").read_bytes() == before
    with pytest.raises(ConfigError, match=r"began with other data: train\.samples was 8 and is 12|data\.train\.length"):
        run_recipe(recipe(1, "data.train.length=12"), runs / "s", resume=True, quiet=True)


def test_a_teacher_of_other_weights_is_another_teacher(tiny: ModuleType, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "recipe": tiny.recipe(**tiny.STUDENT), "val": tiny.Colours(17, seed=1), "task": tiny.TASK, "quiet": True
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        tiny.student_run(tmp_path / "run", fail_at=100)
    other = tiny.network()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    student, data = tiny.network(binary=True), tiny.Colours()
    with pytest.raises(ConfigError, match="distilled from the teacher given"):
        finetune(student, teacher=other, train=data, run_dir=tmp_path / "run", resume=True, **given)
    with pytest.raises(ConfigError, match=r"other data: train\.samples was 40 and is 48"):
        finetune(
            student, teacher=tiny.network(), train=tiny.Colours(48), run_dir=tmp_path / "run", resume=True, **given
        )  # fmt: skip
    # The same weights in another object are the same teacher.
    finetune(student, teacher=tiny.network(), train=data, run_dir=tmp_path / "run", resume=True, **given)


def test_the_teacher_comes_first_where_none_is_given(tmp_path: Path) -> None:
    result = run_recipe(recipe(), tmp_path / "s", train_teacher=True, quiet=True)
    assert (tmp_path / "s_teacher" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "s" / "inputs.json").read_text())["teacher"]["weights"] == str(tmp_path / "s_teacher")
    assert result.teacher_metrics is not None


def test_what_stops_the_student_is_told_before_its_teacher_is_trained(tmp_path: Path) -> None:
    wrong = recipe(1, "stages[0].losses={kl: null, kd_l1: 1}")
    with pytest.raises(ConfigError, match=r"losses\.kd_l1: it compares depths"):
        run_recipe(wrong, tmp_path / "s", train_teacher=True, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_more_epochs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(recipe(), tmp_path / "s", teacher_weights=runs / "t", quiet=True)
    result = run_recipe(recipe(3), tmp_path / "s", resume=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert [record["epoch"] for record in result.history] == [0, 1, 2]
    assert result.steps == 6
    # The longer schedule from there on: the last step of each epoch, as one run of three epochs would have it.
    expected = [1e-3 * lr_factor("onecycle", step, 6, 0.1) for step in (3, 5)]
    assert [record["lr"] for record in result.history[1:]] == pytest.approx(expected)
    first = 1e-3 * lr_factor("onecycle", 2, 6, 0.1)
    assert f"stage 's' goes on as one of 3 epochs: the learning rate, {result.history[0]['lr']:.3g}" in shown
    assert f"is {first:.3g} from here" in shown
    assert yaml.safe_load((tmp_path / "s" / "recipe.yaml").read_text())["stages"][0]["epochs"] == 3
    assert run_recipe(recipe(3), tmp_path / "s", resume=True, quiet=True).metrics == result.metrics
    with pytest.raises(ConfigError, match=r"differs in stages\[0\]\.epochs; a stage may have more epochs"):
        run_recipe(recipe(2), tmp_path / "s", resume=True, quiet=True)
    with pytest.raises(ConfigError, match=r"differs in data\.batch_size"):
        run_recipe(recipe(4, "data.batch_size=2"), tmp_path / "s", resume=True, quiet=True)


def test_a_run_that_goes_on_for_more_epochs_is_not_finished(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "s"
    ended = run_recipe(recipe(), run, teacher_weights=runs / "t", quiet=True)
    weights = (run / "model.safetensors").read_bytes()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bidensify.train.loop.Loop._epoch", stop)
        run_recipe(recipe(3), run, resume=True, quiet=True)
    for read in (load_run, read_run):
        with pytest.raises(ConfigError, match="is not finished"):
            read(run)
    assert (run / "model-1.safetensors").read_bytes() == weights
    assert json.loads((run / "result-1.json").read_text())["metrics"] == ended.metrics
    assert len(run_recipe(recipe(3), run, resume=True, quiet=True).history) == 3
    assert len(read_run(run).history) == 3


def test_more_epochs_before_the_run_ended_are_those_of_one_run(tiny: ModuleType, tmp_path: Path) -> None:
    """In the last stage, whose schedule has not begun, so that nothing differs but the number."""
    stages = [dict(stage) for stage in tiny.STUDENT["stages"]]
    longer = [stages[0], {**stages[1], "epochs": 3}]
    with pytest.raises(KeyboardInterrupt):
        tiny.student_run(tmp_path / "a", fail_at=65)
    resumed = tiny.student_run(tmp_path / "a", resume=True, changes={"stages": longer})
    whole = tiny.student_run(tmp_path / "b", changes={"stages": longer})
    assert [record["loss"] for record in resumed.history] == [record["loss"] for record in whole.history]
    assert resumed.metrics == whole.metrics


def test_a_stage_that_is_over_stays_as_long_as_it_was(tiny: ModuleType, tmp_path: Path) -> None:
    stages = [dict(stage) for stage in tiny.STUDENT["stages"]]
    with pytest.raises(KeyboardInterrupt):
        tiny.student_run(tmp_path / "run", fail_at=140)
    with pytest.raises(
        ConfigError, match=r"stages\[0\]\.epochs; a stage may have more epochs .* no later one has begun"
    ):
        tiny.student_run(tmp_path / "run", resume=True, changes={"stages": [{**stages[0], "epochs": 4}, stages[1]]})


@pytest.mark.parametrize("name", ["recipe.yaml", "model.safetensors", "plan.json", "checkpoints", "log.jsonl"])
def test_links_out_of_the_folder(runs: Path, tmp_path: Path, name: str) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    folder.mkdir()
    for path in (runs / "s").iterdir():
        (outside / path.name).symlink_to(path) if path.name != name else None
        (folder / path.name).symlink_to(path) if path.name == name else None
    real = folder / name
    target = real.resolve()
    for path in (runs / "s").iterdir():
        if path.name != name and path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FormatError, match=f"the run's {name}.* is a link: .*leads out of"):
        load_run(folder)
    with pytest.raises(FormatError, match="is a link"):
        run_recipe(recipe(3), folder, teacher_weights=runs / "t", resume=True, quiet=True)
    assert target.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", "[1]", "holds a list, not an object"),
        ("result.json", '{"metrics": 3}', "is not a run's result"),
        ("result.json", "{" * 5, "not whole JSON"),
        ("result.json", "[" * 100_000, "not whole JSON"),
        ("inputs.json", "{", "not whole JSON"),
    ],
)
def test_edited_files(runs: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    import shutil

    shutil.copytree(runs / "s", tmp_path / "s")
    (tmp_path / "s" / name).write_text(content)
    with pytest.raises(FormatError, match=message):
        run_recipe(recipe(), tmp_path / "s", teacher_weights=runs / "t", resume=True, quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("rng"), "has no rng"),
        (lambda state: state.update(format=9), "has format 9"),
        (lambda state: state["state"].update(epoch="many"), "not what a run writes"),
        (lambda state: state["state"].update(history=[3]), "not what a run writes"),
    ],
)
def test_edited_checkpoints(runs: Path, tmp_path: Path, change: Any, message: str) -> None:
    import shutil

    shutil.copytree(runs / "s", tmp_path / "s")
    last = tmp_path / "s" / "checkpoints" / "last.pt"
    state = torch.load(last, weights_only=True)
    change(state)
    torch.save(state, last)
    with pytest.raises(FormatError, match=message):
        run_recipe(recipe(), tmp_path / "s", teacher_weights=runs / "t", resume=True, quiet=True)


def test_a_run_is_read_into_a_wrapped_network(runs: Path) -> None:
    base = build_model("demo:unet", num_classes=8, width=8)
    model, _ = load_run(runs / "t", nn.DataParallel(base))
    assert type(model) is type(base)
