"""``compile: true``: the same training, through ``torch.compile``."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import bidensify as bd
from bidensify._util.machine import has_compiler
from bidensify.errors import ConfigError
from bidensify.kernels import dense
from bidensify.nn import set_binarization, set_progress
from bidensify.train.step import compiled

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile captures its graphs and differentiates them, and runs them as they are."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def curve(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return list({record["step"]: record["loss"] for record in records if record["kind"] == "step"}.values())


@needs_compiler
def test_the_loss_and_gradients_are_those_of_the_eager_step(tiny: ModuleType) -> None:
    student = tiny.network(binary=True).train()
    x = torch.rand(8, 3, 16, 16)
    found = []
    for call in (student, compiled(student)):
        loss = call(x).square().mean()
        loss.backward()
        grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found.append((loss.item(), {name: grad.clone() for name, grad in grads.items()}))
        student.zero_grad()
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert found[1][1].keys() == found[0][1].keys()
    for name, grad in found[0][1].items():
        assert torch.allclose(grad, found[1][1][name], rtol=1e-3, atol=1e-5), name


@pytest.mark.usefixtures("captured")
def test_a_run_has_the_loss_curve_and_the_files_of_one_without(tiny: ModuleType, tmp_path: Path) -> None:
    """Two stages, EMA, clipping, features; float64, in which no rounding flips a sign."""
    changes = {"precision": "fp64"}
    plain = tiny.student_run(tmp_path / "plain", changes=changes)
    counters.clear()
    result = tiny.student_run(tmp_path / "compiled", changes={**changes, "compile": True})
    assert counters["stats"]["unique_graphs"] == 2  # one of each stage
    assert not counters["graph_break"]
    assert curve(tmp_path / "compiled") == pytest.approx(curve(tmp_path / "plain"), rel=1e-9)
    assert result.metrics == plain.metrics
    states = [
        torch.load(tmp_path / each / "checkpoints" / "last.pt", weights_only=True) for each in ("plain", "compiled")
    ]
    for part in ("student", "ema"):
        mine, its = (state[part] if part == "student" else state[part]["shadow"] for state in states)
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            assert torch.allclose(value, its[key]), key


@pytest.mark.usefixtures("captured")
def test_a_compiled_run_goes_on(tiny: ModuleType, tmp_path: Path) -> None:
    changes = {"precision": "fp64", "compile": True}
    tiny.student_run(tmp_path / "one", changes=changes)
    with pytest.raises(KeyboardInterrupt):
        tiny.student_run(tmp_path / "two", changes=changes, fail_at=120)
    tiny.student_run(tmp_path / "two", changes=changes, resume=True)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-9)


@pytest.mark.parametrize("method", ["irnet", "recu", "adabin", "bisrnet"])
def test_no_step_compiles_again_because_training_has_come_further(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    x = torch.randn(4, 3, 16, 16)
    student = bd.bidensify(net, method=method, example_inputs=x).double().train()
    torch._dynamo.reset()
    call = torch.compile(student, backend="aot_eager")
    counters.clear()
    for step in range(6):
        set_progress(student, step / 10)
        assert torch.allclose(call(x.double()), student(x.double()), rtol=1e-9)
    # A number's second value tells torch that it changes.
    assert counters["stats"]["unique_graphs"] <= 2
    set_binarization(student, activations=True, weights=False)
    assert torch.allclose(call(x.double()), student(x.double()), rtol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"), [({}, "needs a C.. compiler"), ({"distributed": {"strategy": "fsdp"}}, "fsdp")]
)
def test_what_cannot_be_compiled_is_told_first(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    if not changes:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        tiny.student_run(tmp_path / "run", changes={**changes, "compile": True})
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("kernels", ["0", "1"])
def test_a_cpu_with_training_kernels_keeps_them(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setenv("BIDENSIFY_TRAIN_KERNELS", kernels)
    counters.clear()
    tiny.student_run(tmp_path / "run", changes={"compile": True})
    assert (counters["stats"]["unique_graphs"] == 0) == dense.available()
