"""Tests work on tensors too small to share between threads, also in the processes that they start."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test never reaches for a model hub; read when its package is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes of pytest-xdist are told a terminal's width, to which tables would be folded.
os.environ.pop("COLUMNS", None)
# Where a change is judged the examples are the same for the same code; elsewhere every run draws new ones.
settings.register_profile("judged", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("judged")

# Trains in seconds.
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


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two or more processes for the whole suite; none for parts of it, which would wait longer for them than they gain."""
    return min(os.cpu_count() or 1, 4) if config.args_source is not pytest.Config.ArgsSource.ARGS else 0


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What bidensify remembers between runs does not go to the user's folder."""
    os.environ["BIDENSIFY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def the_same_numbers() -> None:
    """A test draws the same weights and images whichever tests its process ran before."""
    import numpy as np
    import torch  # Not above: it reads the number of threads when it is imported.

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    """What a test registers ends with it: which tests share a process, and in what order, is chance."""
    from bidensify.data.registry import DATA_SETS
    from bidensify.deploy import backends
    from bidensify.losses import LOSSES
    from bidensify.methods.registry import _METHODS
    from bidensify.models.build import _SOURCES
    from bidensify.tasks.registry import TASKS

    registries = [_METHODS, backends._BACKENDS, *(each._known for each in (DATA_SETS, LOSSES, TASKS, _SOURCES))]
    before = [dict(each) for each in registries]  # type: ignore[call-overload]
    yield
    for registry, entries in zip(registries, before):
        if dict(registry) != entries:  # type: ignore[call-overload]
            registry.clear()  # type: ignore[attr-defined]
            registry.update(entries)  # type: ignore[attr-defined]
            backends._choose.cache_clear()


def _module(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"tests_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny.py beside this file."""
    return _module("tiny")


@pytest.fixture(scope="session")
def trees() -> ModuleType:
    """The module trees.py beside this file."""
    return _module("trees")


@pytest.fixture(scope="session")
def recipe_text() -> str:
    """A small recipe of every section that has no default."""
    return RECIPE
