"""What a run would trip over is refused before its folder is made."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import bidensify as bd
from bidensify.errors import BidensifyError, ConfigError, DataError
from bidensify.recipe import load_recipe
from bidensify.tasks import DepthTask, SegmentationTask
from bidensify.train import check_run, evaluate, finetune, load_run
from bidensify.train.check import check_disk
from bidensify.train.loaders import training_loader


class Own(Dataset[Any]):
    """A data set of somebody's own: noise, and the parts of a sample that ``make`` gives for (index, image)."""

    def __init__(self, make: Any, channels: int = 3, length: int = 8) -> None:
        self.make, self.channels, self.length = make, channels, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        image = torch.rand(self.channels, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"image": image, **self.make(index, image)}


def mask(index: int, image: Tensor) -> dict[str, Tensor]:
    return {"mask": (image[0] > 0.5).long()}


def depth(index: int, image: Tensor) -> dict[str, Tensor]:
    return {"depth": image[0] + 0.5}


@pytest.mark.parametrize("name", ["depth", "segmentation", "binary"])
def test_first_images_may_have_nothing_to_measure(name: str, tmp_path: Path) -> None:
    """An image without a valid depth, a label or foreground that anybody sees, among others that have them."""
    empty = {
        "depth": {"depth": torch.zeros(16, 16)},
        "segmentation": {"mask": torch.full((16, 16), 255)},
        "binary": {"mask": torch.zeros(16, 16, dtype=torch.int64)},
    }[name]
    full = depth if name == "depth" else mask
    val = Own(lambda index, image: empty if index < 2 else full(index, image))
    options = {"num_classes": 2} if name == "segmentation" else {}
    recipe = load_recipe(
        {
            "name": "x",
            "task": {"name": name, **options},
            "data": {"batch_size": 4},
            "device": "cpu",
            "log": {"tensorboard": False},
            "stages": [{"name": "a", "binarize": "none", "epochs": 1, "lr": 1e-3}],
        }
    )
    network = nn.Conv2d(3, options.get("num_classes", 1), 3, padding=1)
    with torch.no_grad():
        assert network.bias is not None
        network.bias.fill_(-9.0 if name == "binary" else 0.0)
    if name == "binary":  # some foreground is in the data, or nothing could be measured at all
        assert any(val[index]["mask"].any() for index in range(8))
    result = finetune(network, recipe=recipe, train=Own(full), val=val, run_dir=tmp_path / "run", quiet=True)
    assert result.primary in result.metrics


def test_what_else_is_wrong_with_the_first_images_is_still_told(tmp_path: Path) -> None:
    recipe = load_recipe(
        {
            "name": "x",
            "task": {"name": "segmentation", "num_classes": 2},
            "data": {"batch_size": 4},
            "device": "cpu",
            "stages": [{"name": "a", "binarize": "none", "epochs": 1, "lr": 1e-3}],
        }
    )
    val = Own(lambda index, image: {"mask": torch.full((16, 16), 7)})
    with pytest.raises(DataError, match="evaluation of the student: .*label 7"):
        finetune(nn.Conv2d(3, 2, 1), recipe=recipe, train=Own(mask), val=val, run_dir=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


class OneLogit(SegmentationTask):
    """Binary segmentation with one channel, as somebody may write it."""

    outputs = "labels"

    def __init__(self) -> None:
        super().__init__(2)

    def logits(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        return output  # type: ignore[no-any-return]

    def loss(self, output: Any, target: Any) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(output[:, 0], target["mask"].float())

    def loss_weight(self, target: Any) -> Tensor:
        return torch.tensor(float(len(target["image"])))

    def metrics(self) -> Any:
        class Metrics:
            def __init__(self) -> None:
                self.right: list[float] = []

            def to(self, device: Any) -> Any:
                return self

            def update(self, output: Any, target: Any) -> None:
                self.right.append(float(((output[:, 0] > 0) == target["mask"].bool()).float().mean()))

            def compute(self) -> dict[str, float]:
                return {"miou": sum(self.right) / len(self.right)}

        return Metrics()


def net(out: int = 2, channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, out, 1),
    )  # fmt: skip


def run(
    folder: Path, losses: dict[str, Any], make: Any, task: Any, out: int, *, channels: int = 3, **changes: Any
) -> Any:
    recipe = {
        "name": "own",
        "data": {"batch_size": 4, **changes.pop("data", {})},
        "task": {"name": "segmentation", "num_classes": 2},
        "stages": [{"name": "all", "binarize": "all", "epochs": 1, "lr": 0.01, "losses": losses}],
        "calibrate": {"batches": 1},
        "log": {"tensorboard": False},
        "device": "cpu",
        **changes,
    }
    teacher = net(out, channels)
    student = bd.bidensify(teacher, example_inputs=torch.zeros(1, channels, 16, 16))
    data = Own(make, channels)
    return finetune(
        student, teacher=teacher, recipe=recipe, train=data, val=data, run_dir=folder, task=task, quiet=True
    )


@pytest.mark.parametrize(
    ("losses", "make", "task", "out", "message"),
    [
        ({"kl": 1}, mask, OneLogit(), 1, r"losses\.kl: the prediction has one channel .*use bce for one logit"),
        ({"cwd": 1}, mask, OneLogit(), 1, None),
        ({"bce": 1}, mask, OneLogit(), 1, None),
        ({"kl": 1}, depth, DepthTask(max_depth=10), 1, r"losses\.kl: .*kd_l1 for a depth map"),
        ({"cwd": 1}, depth, DepthTask(max_depth=10), 1, r"losses\.cwd: .*'depth' gives is no score per class"),
        ({"cwd": {"layers": ["3"]}, "kd_l1": 1}, depth, DepthTask(max_depth=10), 1, None),
        ({"kd_l1": 1}, mask, SegmentationTask(2), 2, r"losses\.kd_l1: it compares depths, and the task is 'segmentation'"),
        ({"kl": {"ignore": True}}, depth, DepthTask(max_depth=10), 1, r"losses\.kl"),
        ({"kl": 1}, mask, SegmentationTask(3), 2, "2 channels .* 3 classes|needs 3"),
        ({"l1": 1, "features": {"layers": ["3"]}}, mask, SegmentationTask(2), 2, None),
        ({}, depth, SegmentationTask(2), 2, r"losses\.task: the task 'segmentation' needs 'mask'"),
    ],
)  # fmt: skip
def test_a_loss_that_cannot_work(
    tmp_path: Path, losses: Any, make: Any, task: Any, out: int, message: str | None
) -> None:
    if message is None:
        assert run(tmp_path / "run", losses, make, task, out).steps == 2
        return
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", losses, make, task, out)
    assert not (tmp_path / "run").exists()


def test_a_loss_without_a_gradient_is_told_whatever_it_is(tmp_path: Path) -> None:
    from bidensify.losses import Loss, Outputs

    @bd.register_loss("constant")
    class Constant(Loss):
        def value(self, outputs: Outputs, target: Any, task: Any) -> Tensor:
            return (outputs.student.softmax(1).sum(1) - 1).clamp(min=0.5).mean()

    with pytest.raises(ConfigError, match=r"losses\.constant: it is 0\.5 with a gradient of 0.*\(2, 2, 16, 16\)"):
        run(tmp_path / "run", {"constant": 1}, mask, SegmentationTask(2), 2)


class Pooled(nn.Module):
    """A branch on a 1x1 map with a norm, as in DeepLabV3."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pooled, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        y: Tensor = self.head(x + self.norm(self.pooled(x.mean((2, 3), keepdim=True))))
        return y


@pytest.mark.parametrize(("batch_size", "accumulate", "fine"), [(1, 1, False), (4, 4, False), (4, 2, True)])
def test_a_norm_that_sees_one_value(tmp_path: Path, batch_size: int, accumulate: int, fine: bool) -> None:
    recipe = {
        "name": "own", "data": {"batch_size": batch_size, "accumulate": accumulate}, "device": "cpu",
        "task": {"name": "segmentation", "num_classes": 2}, "log": {"tensorboard": False},
        "stages": [{"name": "t", "binarize": "none", "epochs": 1, "lr": 0.01}],
    }  # fmt: skip
    given: dict[str, Any] = {"recipe": recipe, "train": Own(mask), "val": Own(mask), "run_dir": tmp_path / "run"}
    if fine:
        finetune(Pooled(), **given, quiet=True)
        return
    with pytest.raises(
        ConfigError, match=r"the norm 'norm' of the student sees one value per channel.*data.batch_size"
    ):
        finetune(Pooled(), **given, quiet=True)
    assert not (tmp_path / "run").exists()


def test_networks_of_other_channels_and_sizes(tmp_path: Path) -> None:
    def wide(index: int, image: Tensor) -> dict[str, Tensor]:
        return {"image": image.repeat(2, 1, 1), **mask(index, image)}

    with pytest.raises(ConfigError, match=r"student does not run on images of shape \(2, 6, 16, 16\): .*in_channels"):
        run(tmp_path / "run", {}, wide, SegmentationTask(2), 2)
    assert run(tmp_path / "one", {}, mask, SegmentationTask(2), 2, channels=1).steps == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_images_of_double_precision_train(tmp_path: Path, dtype: torch.dtype) -> None:
    def double(index: int, image: Tensor) -> dict[str, Tensor]:
        return {"image": image.to(dtype), **mask(index, image)}

    assert run(tmp_path / "run", {}, double, SegmentationTask(2), 2).steps == 2


def test_images_that_lie_otherwise(tmp_path: Path) -> None:
    def turned(index: int, image: Tensor) -> dict[str, Tensor]:
        return {"image": image.permute(1, 2, 0), **mask(index, image)}

    with pytest.raises(
        DataError, match=r"has the shape \(16, 16, 3\), which looks like \(H, W, C\).*permute\(2, 0, 1\)"
    ):
        run(tmp_path / "run", {}, turned, SegmentationTask(2), 2)


def test_outputs_that_nobody_can_read(tmp_path: Path) -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Any:
            return {"class_queries_logits": self.head(x).flatten(2), "masks_queries_logits": self.head(x)}

    recipe = {
        "name": "own", "data": {"batch_size": 4}, "device": "cpu", "task": {"name": "segmentation", "num_classes": 2},
        "stages": [{"name": "t", "binarize": "none", "epochs": 1, "lr": 0.01}],
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"losses\.task: .*class_queries_logits"):
        finetune(Queries(), recipe=recipe, train=Own(mask), val=Own(mask), run_dir=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


class Sizes(Own):
    """Images, or their masks alone, of a size each."""

    def __init__(self, images: bool) -> None:
        super().__init__(None, length=5)
        self.images = images

    def __getitem__(self, index: int) -> Any:
        side = 16 + 4 * (index % 3)
        image = torch.rand(
            3, *((side, 20) if self.images else (16, 16)), generator=torch.Generator().manual_seed(index)
        )
        target = (torch.rand(side, 20, generator=torch.Generator().manual_seed(index + 99)) > 0.5).long()
        return {"image": image, "mask": target}


@pytest.mark.parametrize("images", [True, False])
def test_validation_images_of_several_sizes(images: bool) -> None:
    model, task, data = net().eval(), SegmentationTask(2), Sizes(images)
    together, alone = (evaluate(model, task, data, batch_size=size) for size in (5, 1))
    assert together == pytest.approx(alone)
    right = total = 0
    for sample in (data[index] for index in range(5)):
        with torch.no_grad():
            scores = nn.functional.interpolate(
                model(sample["image"][None]), sample["mask"].shape, mode="bilinear", align_corners=False
            )
        right += int((scores.argmax(1)[0] == sample["mask"]).sum())
        total += sample["mask"].numel()
    assert together["pixel_accuracy" if "pixel_accuracy" in together else "pixacc"] == pytest.approx(right / total)


def test_evaluation_that_fails_late_costs_no_epoch(tiny: ModuleType, tmp_path: Path) -> None:
    class Late(tiny.Colours):  # type: ignore[name-defined]
        broken = True

        def load(self, index: int) -> Any:
            sample = super().load(index)
            if self.broken and index == 7:
                sample["mask"][:] = 9
            return sample

    def go(val: Any, resume: bool) -> Any:
        recipe, train_set = tiny.recipe(), tiny.Colours()
        return finetune(
            tiny.network(), recipe=recipe, train=train_set, val=val, run_dir=tmp_path / "run", task=tiny.TASK,
            resume=resume, quiet=True,
        )  # fmt: skip

    val = Late(16, seed=1)
    with pytest.raises(DataError, match="label 9|labels outside"):
        go(val, False)
    if (tmp_path / "run").exists():  # a task that reads labels in evaluation alone
        state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["state"]
        assert (state["epoch"], state["batch"], state["step"], len(state["history"])) == (0, 5, 5, 0)
    val.broken = False
    result = go(val, True)
    whole = finetune(
        tiny.network(), recipe=tiny.recipe(), train=tiny.Colours(), val=tiny.Colours(16, seed=1), run_dir=tmp_path / "b",
        task=tiny.TASK, quiet=True,
    )  # fmt: skip
    assert [(r["loss"], r["lr"], r["metrics"]) for r in result.history] == [
        (r["loss"], r["lr"], r["metrics"]) for r in whole.history
    ]


def test_a_full_disk(tmp_path: Path) -> None:
    assert "MB free in" in check_disk(tmp_path / "a" / "b", 1)
    with pytest.raises(ConfigError, match=r"needs 1,000,000,000,000 MB at the most, .* make room"):
        check_disk(tmp_path / "run", 10**18)


class Wild(Dataset[Any]):
    """Draws from all three generators."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        import random

        import numpy as np

        draws = [np.random.random(), random.random(), float(torch.rand(()))]
        return {"image": torch.zeros(3, 2, 2), "draws": torch.tensor(draws, dtype=torch.float64)}


@pytest.mark.parametrize("workers", [0, 2])
def test_no_epoch_repeats_anothers_augmentation(workers: int) -> None:
    """With workers each process starts from the loader's seed, without from the caller's generators."""
    recipe = load_recipe({
        "name": "x", "data": {"batch_size": 4, "workers": workers}, "task": {"name": "segmentation", "num_classes": 2},
        "stages": [{"name": "a", "binarize": "none", "epochs": 1, "lr": 1e-3}],
    })  # fmt: skip
    epochs = [torch.cat([batch["draws"] for batch in training_loader(Wild(), recipe, epoch)]) for epoch in range(3)]
    assert all(len(set(column.tolist())) == 24 for column in torch.cat(epochs).T)


def test_wrapped_networks_train_as_what_is_inside(tiny: ModuleType, tmp_path: Path) -> None:
    student, teacher = tiny.network(binary=True), tiny.network()
    average = torch.optim.swa_utils.AveragedModel(teacher)
    given: dict[str, Any] = {
        "recipe": tiny.recipe(**tiny.STUDENT), "train": tiny.Colours(), "val": tiny.Colours(16, seed=1), "task": tiny.TASK,
        "quiet": True,
    }  # fmt: skip
    wrapped = torch.compile(nn.DataParallel(student), backend="eager")
    result = finetune(wrapped, teacher=average, run_dir=tmp_path / "a", **given)
    plain = finetune(tiny.network(binary=True), teacher=teacher, run_dir=tmp_path / "b", **given)
    assert result.metrics == plain.metrics
    again, _ = load_run(tmp_path / "a", tiny.network(binary=True))
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in again.state_dict().items())
    with pytest.raises(ConfigError, match="the student is a ScriptModule"):
        finetune(torch.jit.script(tiny.network()), run_dir=tmp_path / "c", **given)


def test_check_run_looks_at_everything_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {
        "name": "x", "model": {"source": "demo:unet", "options": {"num_classes": 8, "width": 8}}, "device": "cpu",
        "data": {"train": {"name": "scenes", "split": "train", "length": 8}, "val": {"name": "scenes", "split": "val",
                 "length": 4}, "size": [32, 32], "batch_size": 4},
        "task": {"name": "segmentation"}, "teacher": {"stages": [{"name": "t", "binarize": "none", "epochs": 1, "lr": 1e-3}]},
        "stages": [{"name": "s", "binarize": "all", "epochs": 3, "lr": 1e-3, "losses": {"kl": 1}}],
    }  # fmt: skip
    check = check_run(recipe)
    assert check.problems == []
    found = dict(check.rows)
    assert set(found) >= {"recipe", "data.train", "data.val", "network", "teacher", "rewrite", "disk", "time"}
    assert "3 epochs" in found["recipe"]
    assert "trained first" in found["teacher"]
    assert not [path for path in tmp_path.iterdir() if path.name != ".cache"]
    broken = load_recipe(recipe, ["stages[0].losses={kl: null, kd_l1: 1}", "teacher.weights=gone.pth"])
    problems = "\n".join(check_run(broken).problems)
    assert "network: weights 'gone.pth' do not exist" in problems
    broken = load_recipe(recipe, ["stages[0].losses={kl: null, kd_l1: 1}"])
    assert "start: losses.kd_l1: it compares depths" in "\n".join(check_run(broken).problems)
    other = load_recipe(recipe, ["model.options.num_classes=5"])
    assert any("5 channels" in problem for problem in check_run(other, role="teacher").problems)
    with pytest.raises(BidensifyError, match="role='pupil'"):
        check_run(recipe, role="pupil")  # type: ignore[arg-type]
