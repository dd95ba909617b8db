"""Which epoch's weights a run keeps, and what re-estimated norm statistics may change."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bidensify.recipe import load_recipe
from bidensify.tasks import DepthTask, Task
from bidensify.train.rundir.folder import RunFolder, RunState
from bidensify.train.selection import Selection
from bidensify.train.stages import epochs

STAGES = [
    {"name": "activations", "binarize": "activations", "epochs": 1, "lr": 0.1},
    {"name": "all", "binarize": "all", "epochs": 3, "lr": 0.1},
]


def selection(tiny: ModuleType, folder: Path, select: str = "best", task: Task | None = None) -> Selection:
    recipe = load_recipe(tiny.recipe(stages=STAGES, evaluate={"select": select}))
    return Selection(recipe, task or tiny.TASK, RunFolder(folder), main=True)


@pytest.mark.parametrize(("select", "chosen"), [("best", 2), ("last", 3)])
def test_the_best_or_the_last_epoch_of_those_binarized_as_the_result(
    tiny: ModuleType, tmp_path: Path, select: str, chosen: int
) -> None:
    chooser, state = selection(tiny, tmp_path, select), RunState()
    plan = epochs(chooser.recipe.stages)
    for epoch, miou in zip(plan, (0.9, 0.3, 0.5, 0.4), strict=True):
        weights = {"w": torch.tensor([float(epoch.index)])}
        chooser.offer(weights, {"miou": miou}, epoch, epoch.index == 3, state)
    assert state.best_epoch == chosen
    assert load_file(RunFolder(tmp_path).best(chosen))["w"].item() == chosen
    assert not RunFolder(tmp_path).best(0).exists()


def test_lower_is_better_where_the_task_says_so(tiny: ModuleType, tmp_path: Path) -> None:
    task = DepthTask(max_depth=10)
    chooser = selection(tiny, tmp_path, task=task)
    assert chooser.better(0.1, 0.2) is not task.higher_is_better
    assert chooser.better(0.2, 0.1) is task.higher_is_better
    assert chooser.better(0.2, None)


@pytest.mark.parametrize(("after", "kept"), [(0.6, True), (0.4, False), (0.5, False)])
def test_statistics_are_kept_only_where_the_metric_gets_better(
    tiny: ModuleType, tmp_path: Path, after: float, kept: bool
) -> None:
    student: nn.Module = tiny.network(binary=True).eval()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    metrics, record = selection(tiny, tmp_path).recalibrate(
        student, [torch.randn(4, 3, 16, 16)], {"miou": 0.5}, lambda model: {"miou": after}
    )
    assert metrics == {"miou": after if kept else 0.5}
    assert record == {"before": {"miou": 0.5}, "after": {"miou": after}, "kept": kept}
    same = {key: torch.equal(value, before[key]) for key, value in student.state_dict().items()}
    assert all(same.values()) is not kept
    assert all(equal for key, equal in same.items() if "running" not in key and "num_batches" not in key)
