"""Every script in examples/ runs, at a small size, and README names it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_is_tested_here_and_named_in_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    elsewhere = {"deploy_python_without_torch"}  # tests/deploy/executorch
    assert names == {"segmentation", "depth_transformers", "own_method", "deploy"} | elsewhere
    assert all(f"examples/{name}.py" in readme for name in names)


def test_segmentation(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    miou = load("segmentation").main(tmp_path, 32, 16, ("teacher.stages[0].epochs=1", "stages[0].epochs=1"))
    assert set(miou) == {"teacher", "student", "packed"}
    assert abs(miou["packed"] - miou["student"]) < 1e-6
    assert (tmp_path / "packed" / "model.safetensors").is_file()


def test_depth_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert load("depth_transformers").main(tmp_path).shape == (96, 128)


def test_own_method(tmp_path: Path) -> None:
    small = (
        "data.size=[32,32]", "data.train.length=8", "data.val.length=4", "data.batch_size=4", "model.options.width=8",
        "teacher.stages[0].epochs=1", "stages[0].epochs=1", "stages[1].epochs=1", "calibrate.batches=1",
        "log.tensorboard=false",
    )  # fmt: skip
    assert set(load("own_method").main(tmp_path, small)) == {"teacher", "bidense", "mine"}
    assert "mine" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_deploy(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    load("deploy").save(tmp_path / "packed")
    command = [sys.executable, str(EXAMPLES / "deploy.py"), str(tmp_path / "packed"), "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["file", "float", "packed"]
