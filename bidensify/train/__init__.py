"""Training: the loop that runs a recipe, its stages, checkpoints and distribution."""

from __future__ import annotations

from bidensify.train.allocation import recipe_sensitivity
from bidensify.train.check import RunCheck
from bidensify.train.evaluation import evaluate
from bidensify.train.run import build_student, build_teacher, check_run, load_run, run_recipe
from bidensify.train.rundir.folder import RunResult
from bidensify.train.start import finetune

__all__ = [
    "RunCheck",
    "RunResult",
    "build_student",
    "build_teacher",
    "check_run",
    "evaluate",
    "finetune",
    "load_run",
    "recipe_sensitivity",
    "run_recipe",
]
