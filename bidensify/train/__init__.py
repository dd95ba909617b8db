"""Training: the loop that runs a recipe, its stages, checkpoints and distribution."""

from __future__ import annotations

from bidensify.train.evaluation import evaluate
from bidensify.train.folder import RunResult
from bidensify.train.loop import finetune
from bidensify.train.run import build_student, build_teacher, load_run, run_recipe

__all__ = ["RunResult", "build_student", "build_teacher", "evaluate", "finetune", "load_run", "run_recipe"]
