"""A recipe that trains in seconds, one run of it and the same network packed, shared by the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bidensify.cli.app import app

RECIPE = """
name: tiny
model: {source: "demo:unet", options: {num_classes: 8, width: 8, levels: 2}}
data:
  train: {name: scenes, split: train, length: 8}
  val: {name: scenes, split: val, length: 4}
  size: [32, 32]
  batch_size: 4
task: {name: segmentation}
teacher: {stages: [{name: float, binarize: none, epochs: 1, lr: 1.0e-3}]}
stages: [{name: all, binarize: all, epochs: 1, lr: 1.0e-3, losses: {task: 1.0, kl: 1.0}}]
calibrate: {batches: 1}
device: cpu
log: {tensorboard: false}
"""


@pytest.fixture(scope="session")
def recipe_text() -> str:
    return RECIPE


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner()


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tiny.yaml``, ``run``, ``run_teacher`` and ``packed``."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(RECIPE)
    for arguments in (
        ["finetune", str(folder / "tiny.yaml"), "--run-dir", str(folder / "run"), "--quiet"],
        ["pack", str(folder / "run"), str(folder / "packed")],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output + result.stderr
    return folder
