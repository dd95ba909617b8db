from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from bidensify.data import Seeded
from bidensify.deploy import pack
from bidensify.errors import ConfigError, DataError, FormatError, TrainingError
from bidensify.train import evaluate, finetune
from bidensify.train.distributed import GlobalBatches
from bidensify.train.loaders import training_loader


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def train(tiny: ModuleType, run_dir: Path, model: nn.Module | None = None, **options: Any) -> Any:
    changes = options.pop("changes", {})
    data = options.pop("train", None) or tiny.Colours()
    return finetune(
        model or tiny.network(),
        recipe=tiny.recipe(**changes),
        train=data,
        val=tiny.Colours(16, seed=1),
        run_dir=run_dir,
        task=tiny.TASK,
        quiet=True,
        **options,
    )


def test_a_teacher_learns_and_leaves_its_files(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.network()
    stages = [{"name": "only", "binarize": "none", "epochs": 6, "lr": 0.02}]
    result = train(tiny, tmp_path / "run", model, changes={"stages": stages, "log": {"every": 2}})
    assert result.metrics["miou"] > 0.6
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    assert not model.training
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.yaml", "versions.json", "log.jsonl", "tensorboard", "checkpoints", "result.json"} <= files
    assert "model.safetensors" in files
    assert "plan.json" not in files
    state = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert evaluate(model, tiny.TASK, tiny.Colours(16, seed=1)) == result.metrics
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["optimizer"]["betas"] == [0.9, 0.999]
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] in torch.__version__
    assert set(versions["git"]) == {"revision", "modified"}
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["metrics"] == result.metrics
    assert stored["best_epoch"] == max(range(6), key=lambda e: result.history[e]["metrics"]["miou"])
    steps = [line for line in lines(tmp_path / "run") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(2, 31, 2))
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_a_student_learns_in_stages_and_the_teacher_is_left_alone(tiny: ModuleType, tmp_path: Path) -> None:
    teacher, student = tiny.network(), tiny.network(binary=True)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    modes: list[tuple[bool, bool, bool]] = []
    student[1].register_forward_hook(
        lambda m, *_: modes.append((m.training, m.binarizer.enabled, m.binarize_weights))  # type: ignore[func-returns-value]
    )
    result = train(tiny, tmp_path / "run", student, teacher=teacher, changes=tiny.STUDENT)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert teacher.training
    training = [mode[1:] for mode in modes if mode[0]]
    # The look before the start, once per stage, then five steps an epoch.
    assert training == [(True, False), (True, True)] + [(True, False)] * 10 + [(True, True)] * 10
    assert [record["stage"] for record in result.history] == ["activations"] * 2 + ["all"] * 2
    assert result.best_epoch >= 2
    assert set(result.history[3]["losses"]) == {"task", "kl", "features"}
    terms = result.history[3]["losses"]
    assert result.history[3]["loss"] == pytest.approx(terms["task"] + 0.5 * terms["kl"] + terms["features"])
    assert sum(len(m._forward_hooks) for m in [*teacher.modules(), *student.modules()]) == 1
    assert result.teacher_metrics == evaluate(teacher, tiny.TASK, tiny.Colours(16, seed=1))
    assert evaluate(student, tiny.TASK, tiny.Colours(16, seed=1)) == result.metrics
    assert all(parameter.grad is None for parameter in student.parameters())


def test_calibration_comes_first(tiny: ModuleType, tmp_path: Path) -> None:
    thresholds = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if module.training and len(args[0]) == 8 and not thresholds:  # a whole batch, not the look before the start
            thresholds.append(module.binarizer.b.detach().clone())

    student = tiny.network(binary=True)
    student[1].register_forward_hook(look)
    train(tiny, tmp_path / "run", student, teacher=tiny.network(), changes=tiny.STUDENT)
    assert thresholds[0].abs().sum() > 0


def test_last_epoch_may_be_selected(tiny: ModuleType, tmp_path: Path) -> None:
    stages = [{"name": "only", "binarize": "none", "epochs": 4, "lr": 0.01}]
    changes = {"stages": stages, "evaluate": {"every": 3, "select": "last"}}
    result = train(tiny, tmp_path / "run", changes=changes)
    assert result.best_epoch == 3
    assert [record["metrics"] is not None for record in result.history] == [False, False, True, True]


def test_accumulation_is_the_same_batch(tiny: ModuleType, tmp_path: Path) -> None:
    """Without norms, four micro-batches of two make the step of one batch of eight, however pixels are ignored."""
    curves = []
    for count in (1, 4):
        data = {**tiny.recipe()["data"], "accumulate": count}
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 1))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        run = tmp_path / str(count)
        train(tiny, run, model, changes={"data": data})
        curves.append([line["loss"] for line in lines(run) if line["kind"] == "step"])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_samples_depend_on_seed_and_epoch_alone(tiny: ModuleType) -> None:
    from bidensify.data import Seeded
    from bidensify.recipe import load_recipe

    recipe = load_recipe(tiny.recipe())
    data = Seeded(tiny.Colours(), 0)

    def read(epoch: int, skip: int = 0) -> list[torch.Tensor]:
        torch.rand(3)  # other draws in between make no difference
        return [batch["image"] for batch in training_loader(data, recipe, epoch, skip=skip)]

    first, again, skipped, other = read(0), read(0), read(0, skip=2), read(1)
    assert len(first) == 5
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first[2:], skipped))
    assert not torch.equal(first[0], other[0])


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(tiny: ModuleType, tmp_path: Path) -> None:
    class Poisoned(tiny.Colours):  # type: ignore[name-defined]
        def load(self, index: int) -> Any:
            sample = super().load(index)
            if train_set.epoch == 1 and index in third:
                sample["image"][0, 0, 0] = float("nan")
            return sample

    third = list(GlobalBatches(40, 8, seed=0, epoch=1))[2]
    train_set = Seeded(Poisoned(), 0)
    with pytest.raises(TrainingError, match=r"stopped at step 8: the loss is nan \(task nan\).*last\.pt"):
        train(tiny, tmp_path / "run", train=train_set, changes={"checkpoint": {"steps": 6}})
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert state["state"]["step"] == 6
    assert all(torch.isfinite(value).all() for value in state["student"].values())
    result = train(tiny, tmp_path / "run", resume=True, changes={"checkpoint": {"steps": 6}})
    assert len(result.history) == 2


def test_infinite_gradient_stops(tiny: ModuleType, tmp_path: Path) -> None:
    class Wild(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(x)
            return y + (y - y.detach()).abs().sqrt()  # zero, with an infinite slope

    model = Wild()
    before = model.head.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"step 1: the gradient's norm is (nan|inf)"):
        train(tiny, tmp_path / "run", model, changes={"optimizer": {"clip": 1.0}})
    assert torch.equal(model.head.weight, before)


def test_existing_folder(tiny: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty; choose another"):
        train(tiny, tmp_path)
    with pytest.raises(ConfigError, match="not a run folder"):
        train(tiny, tmp_path, resume=True)
    with pytest.raises(ConfigError, match="is a file"):
        train(tiny, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_another_model_or_recipe_cannot_resume(tiny: ModuleType, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run")
    with pytest.raises(
        FormatError, match=r"of another model: '0.weight' is \(8, 3, 3, 3\), the model's is \(4, 3, 3, 3\)"
    ):
        train(tiny, tmp_path / "run", tiny.network(channels=4), resume=True)
    with pytest.raises(FormatError, match=r"of another model: .* missing"):
        train(tiny, tmp_path / "run", nn.Sequential(tiny.network()), resume=True)
    with pytest.raises(ConfigError, match=r"differs in optimizer\.eps, seed"):
        train(tiny, tmp_path / "run", resume=True, changes={"seed": 5, "optimizer": {"eps": 1e-6}})


def test_finished_run_is_read_again(tiny: ModuleType, tmp_path: Path) -> None:
    first, model = train(tiny, tmp_path / "run"), tiny.network(seed=5)
    again = train(tiny, tmp_path / "run", model, resume=True)
    assert again == first
    assert evaluate(model, tiny.TASK, tiny.Colours(16, seed=1)) == first.metrics


def test_recipe_that_does_not_fit_the_models(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'activations' binarizes activations, but the model has no binary layers"):
        train(tiny, tmp_path / "a", teacher=tiny.network(), changes=tiny.STUDENT)
    with pytest.raises(ConfigError, match="distils, but no teacher"):
        train(tiny, tmp_path / "b", tiny.network(binary=True), changes=tiny.STUDENT)
    with pytest.raises(ConfigError, match="would not be 1-bit"):
        train(tiny, tmp_path / "c", tiny.network(binary=True))
    with pytest.raises(ConfigError, match="training set has 4 samples"):
        train(tiny, tmp_path / "d", train=tiny.Colours(4))
    losses = {"features": {"layers": ["1.cnv"]}}
    stages = [{"name": "only", "binarize": "all", "epochs": 1, "lr": 0.01, "losses": losses}]
    with pytest.raises(ConfigError, match=r"'1\.cnv' matches nothing in the student"):
        train(tiny, tmp_path / "e", tiny.network(binary=True), teacher=tiny.network(), changes={"stages": stages})
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "d").exists()


def test_bf16_and_channels_last(tiny: ModuleType, tmp_path: Path) -> None:
    plain = train(tiny, tmp_path / "a")
    model = tiny.network()
    other = train(tiny, tmp_path / "b", model, changes={"precision": "bf16", "channels_last": True})
    assert other.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=0.05)
    assert model[0].weight.is_contiguous()
    assert model[0].weight.dtype == torch.float32


def test_fp64_is_for_the_run_alone(tiny: ModuleType, tmp_path: Path) -> None:
    plain = train(tiny, tmp_path / "a")
    model = tiny.network()
    other = train(tiny, tmp_path / "b", model, changes={"precision": "fp64"})
    assert other.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=1e-3)
    assert model[0].weight.dtype == torch.float32
    state = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_average_is_what_is_measured_and_kept(tiny: ModuleType, tmp_path: Path) -> None:
    changes = {"ema": {"decay": 0.9}, "calibrate": {"at_end": False}}
    model, without = tiny.network(), tiny.network()
    result = train(tiny, tmp_path / "run", model, changes=changes)
    train(tiny, tmp_path / "without", without)
    assert evaluate(model, tiny.TASK, tiny.Colours(16, seed=1)) == result.metrics
    assert not torch.equal(model[0].weight, without[0].weight)


class Plain(torch.utils.data.Dataset[Any]):
    """A data set that knows nothing of bidensify."""

    def __init__(self, sample: Any = None) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if self.sample is not None:
            return self.sample
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"image": image, "mask": image.argmax(0)}


def own_data(tiny: ModuleType, run_dir: Path, data: Plain) -> Any:
    recipe = tiny.recipe(task={"name": "segmentation", "num_classes": 3})
    return finetune(tiny.network(), recipe=recipe, train=data, val=data, run_dir=run_dir, quiet=True)


def test_a_data_set_of_the_users_own(tiny: ModuleType, tmp_path: Path) -> None:
    assert 0 <= own_data(tiny, tmp_path / "run", Plain()).metrics["miou"] <= 1


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((torch.zeros(3, 4, 4), torch.zeros(4, 4)), r"train\[0\] is a tuple; a sample is a dict"),
        ({"pixels": torch.zeros(3, 4, 4)}, r"train\[0\] is a dict of {'pixels': 'Tensor'}"),
        ({"image": torch.zeros(3, 4, 4).numpy()}, r"train\[0\] is a dict of {'image': 'ndarray'}"),
        ({"image": torch.zeros(3, 4, 4, dtype=torch.uint8)}, r"torch.uint8 of shape \(3, 4, 4\).*float32"),
    ],
)
def test_samples_of_another_form(tiny: ModuleType, tmp_path: Path, sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        own_data(tiny, tmp_path / "run", Plain(sample))
    assert not (tmp_path / "run").exists()


class Unequal(Plain):
    def __getitem__(self, index: int) -> Any:
        return {"image": torch.zeros(3, 16 + index, 16), "mask": torch.zeros(16 + index, 16).long()}


class NoLength(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "train is a NoneType; give a data set with a length"),
        (NoLength(), "train is a NoLength; give a data set with a length"),
        ([], "train is empty"),
        (Unequal(), r"samples of one training batch differ: .*\(3, 16, 16\).*\(3, 17, 16\).* data.batch_size: 1"),
    ],
)
def test_what_is_no_data_set(tiny: ModuleType, tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        own_data(tiny, tmp_path / "run", data)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (lambda net: net.half(), None, "student's parameters are torch.float16.*precision: bf16"),
        (lambda net: net, lambda net: net, "the teacher is the student itself"),
        (lambda net: net, lambda net: copy.deepcopy(net).bfloat16(), "teacher's parameters are torch.bfloat16"),
        (lambda net: pack(net), None, "the student is packed.*give the latent network"),
    ],
)
def test_models_that_do_not_train(tiny: ModuleType, tmp_path: Path, student: Any, teacher: Any, message: str) -> None:
    net = tiny.network(binary=True)
    given = student(net)
    with pytest.raises(ConfigError, match=message):
        train(tiny, tmp_path / "run", given, teacher=None if teacher is None else teacher(net))
    assert not (tmp_path / "run").exists()
