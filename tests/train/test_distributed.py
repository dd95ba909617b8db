from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bidensify._util.machine import has_compiler
from bidensify.errors import ConfigError
from bidensify.recipe import load_recipe
from bidensify.train.distributed import (
    GlobalBatches,
    SyncedNorms,
    forward_context,
    make_accelerator,
    sync_batch_norm,
)  # fmt: skip

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


def test_global_batches_are_the_same_for_any_number_of_processes() -> None:
    alone = list(GlobalBatches(22, 4, seed=3, epoch=1))
    assert len(alone) == 5
    assert len({i for batch in alone for i in batch}) == 20
    halves = [list(GlobalBatches(22, 4, seed=3, epoch=1, rank=rank, processes=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == alone
    parts = [list(GlobalBatches(22, 4, seed=3, epoch=1, rank=rank, processes=2, parts=2)) for rank in (0, 1)]
    assert [[a[0], b[0], a[1], b[1]] for a, b in zip(*parts, strict=True)] == alone
    assert list(GlobalBatches(22, 4, seed=3, epoch=1, skip=2)) == alone[2:]
    assert len(GlobalBatches(22, 4, seed=3, epoch=1, skip=2)) == 3
    assert list(GlobalBatches(22, 4, seed=3, epoch=2)) != alone


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (7, 3), (2, 3, 4)])
def test_sync_batch_norm_is_batch_norm_in_one_process(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, dtype=torch.float64) + 5).float()
    weight, bias, slope = torch.rand(3), torch.rand(3), torch.randn(shape)
    results = []
    for norm in (F.batch_norm, sync_batch_norm):
        mean, var = torch.zeros(3), torch.ones(3)
        own = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = norm(own[0], mean, var, own[1], own[2], training=True, momentum=0.3, eps=1e-3)
        (y * slope).sum().backward()
        results.append([y, mean, var, *(t.grad for t in own)])
    for native, own_result in zip(*results, strict=True):
        assert torch.allclose(native, own_result, rtol=1e-4, atol=1e-4)


def test_mode_reaches_every_batch_norm_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(kwargs["training"])
        return x

    monkeypatch.setattr("bidensify.train.distributed.sync_batch_norm", spy)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with SyncedNorms():
        model(torch.rand(2, 3, 4, 4))
        model.eval()(torch.rand(2, 3, 4, 4))
    model(torch.rand(2, 3, 4, 4))
    assert calls == [True, False]


def test_batch_that_cannot_be_split(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 3))
    with pytest.raises(ConfigError, match="batch_size 8 cannot be split over 3 processes"):
        make_accelerator(load_recipe(tiny.recipe()))


def launch(run_dir: Path, arguments: dict[str, object], check: bool = True) -> None:
    """Trains tiny.py's student in two processes under `accelerate launch`."""
    # The launcher's --cpu leaves several processes to mpirun; the recipe's device: cpu makes these run on the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    program = str(Path(__file__).resolve().parents[1] / "tiny.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, program, str(run_dir), json.dumps(arguments)], check=check, env=environment, timeout=600)


def curve(run_dir: Path) -> list[float]:
    """The loss of each step; of a step that was taken twice, the later."""
    records = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return list({record["step"]: record["loss"] for record in records if record["kind"] == "step"}.values())


@pytest.fixture(scope="module")
def alone(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the run of one process for a setting, trained the first time."""
    made: dict[str, Any] = {}

    def run(changes: dict[str, Any], depth: int) -> Any:
        key = json.dumps([changes, depth])
        if key not in made:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            made[key] = tiny.student_run(tmp_path_factory.mktemp("alone") / "run", changes=changes, depth=depth)
            torch.set_num_threads(threads)
        return made[key]

    return run


def settings(tiny: ModuleType, precision: str, accumulate: int) -> dict[str, Any]:
    return {"data": {**tiny.recipe()["data"], "accumulate": accumulate}, "precision": precision}


@needs_gloo
@pytest.mark.parametrize(
    ("strategy", "precision", "depth", "accumulate", "tolerance"),
    [("ddp", "fp32", 2, 1, 1e-4), ("fsdp", "fp64", 8, 2, 1e-9)],
)
def test_two_processes_have_the_loss_curve_of_one(
    tiny: ModuleType,
    alone: Any,
    tmp_path: Path,
    strategy: str,
    precision: str,
    depth: int,
    accumulate: int,
    tolerance: float,
) -> None:
    """A binary student with norms, EMA, clipping and two kinds of distillation, under `accelerate launch`.

    In float32 a rounding error, of another order of summation for example, may flip a sign, and each flip makes others in
    the layers after it; in a deep network that shows in the loss. Float64 tells an error of the method from that.
    """
    changes = settings(tiny, precision, accumulate)
    one = alone(changes, depth)
    two = tmp_path / "two"
    launch(two, {"changes": {**changes, "distributed": {"strategy": strategy}}, "depth": depth})
    for run_dir, processes in ((one.run_dir, 1), (two, 2)):
        assert json.loads((run_dir / "versions.json").read_text())["processes"] == processes
    assert len(curve(two)) == 20
    print("largest difference:", max(abs(a - b) / a for a, b in zip(curve(one.run_dir), curve(two), strict=True)))
    assert curve(two) == pytest.approx(curve(one.run_dir), rel=tolerance)
    other = json.loads((two / "result.json").read_text())
    states = [torch.load(path / "checkpoints" / "last.pt", weights_only=True) for path in (one.run_dir, two)]
    for key, value in states[0]["ema"]["shadow"].items():
        assert torch.allclose(value, states[1]["ema"]["shadow"][key], rtol=1e-3, atol=1e-4), key
    # Metrics are sums over samples, each counted once, whichever process measured it.
    assert other["teacher_metrics"] == one.teacher_metrics
    if precision == "fp64":
        assert other["metrics"] == one.metrics
    else:
        assert other["metrics"]["miou"] == pytest.approx(one.metrics["miou"], abs=1e-3)


@needs_gloo
@needs_compiler
def test_two_compiled_processes_have_the_loss_curve_of_one(tiny: ModuleType, alone: Any, tmp_path: Path) -> None:
    changes = settings(tiny, "fp64", 1)
    one, two = alone(changes, 2), tmp_path / "two"
    launch(two, {"changes": {**changes, "compile": True, "distributed": {"strategy": "ddp"}}, "depth": 2})
    assert curve(two) == pytest.approx(curve(one.run_dir), rel=1e-9)
    assert json.loads((two / "result.json").read_text())["metrics"] == one.metrics


@needs_gloo
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_of_two_processes_goes_on_in_one(tiny: ModuleType, alone: Any, tmp_path: Path, strategy: str) -> None:
    changes = settings(tiny, "fp64", 2)
    one, two = alone(changes, 8), tmp_path / "two"
    sharded = {**changes, "distributed": {"strategy": strategy}}
    launch(two, {"changes": sharded, "depth": 8, "fail_at": 70}, check=False)
    assert not (two / "result.json").exists()
    stopped = torch.load(two / "checkpoints" / "last.pt", weights_only=True)["state"]["step"]
    assert 0 < stopped < 20
    result = tiny.student_run(two, resume=True, changes=changes, depth=8)
    assert curve(two) == pytest.approx(curve(one.run_dir), rel=1e-9)
    assert result.metrics == one.metrics
    assert json.loads((two / "versions.json").read_text())["processes"] == 2


@needs_gloo
def test_a_run_of_one_process_goes_on_sharded_over_two(tiny: ModuleType, alone: Any, tmp_path: Path) -> None:
    changes = settings(tiny, "fp64", 2)
    one, two = alone(changes, 8), tmp_path / "two"
    with pytest.raises(KeyboardInterrupt):
        tiny.student_run(two, changes=changes, depth=8, fail_at=120)
    launch(two, {"changes": {**changes, "distributed": {"strategy": "fsdp"}}, "depth": 8, "resume": True})
    assert curve(two) == pytest.approx(curve(one.run_dir), rel=1e-9)


def test_norms_may_be_left_to_each_process(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    calls: list[bool] = []
    monkeypatch.setattr(
        "bidensify.train.distributed.sync_batch_norm", lambda x, *args, **kwargs: (calls.append(True), x)[1]
    )
    accelerator = make_accelerator(load_recipe(tiny.recipe()))
    norm = nn.BatchNorm2d(3)
    for sync in (True, False):
        with forward_context(accelerator, sync):
            norm(torch.rand(2, 3, 4, 4))
    assert calls == [True]
