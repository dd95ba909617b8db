"""The runs of a comparison: every method under every seed, one recipe, one teacher; each cell by itself."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from bidensify._util.files import atomic_write
from bidensify._util.fingerprint import weights_fingerprint
from bidensify.compare.results import Cell
from bidensify.compare.runs import read_run
from bidensify.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from bidensify.recipe import Recipe

__all__ = ["Matrix"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Matrix:
    """What is run, and where.

    Args:
        recipe: of all cells; its method and seed are replaced.
        methods: names of registered methods.
        seeds: of weights and training.
        out: the comparison's folder.
        own: method -> changes to the recipe for it alone ("stages[0].lr=1e-3"), for example the learning rate that suits it.
        teacher: a teacher's run folder; by default the recipe's teacher is trained in ``out / "teacher"``.

    Raises:
        ConfigError: an unknown method, a seed or a method twice, or changes for a method that is not compared.
    """

    recipe: Recipe
    methods: Sequence[str]
    seeds: Sequence[int]
    out: Path
    own: Mapping[str, Sequence[str]] = field(default_factory=dict)
    teacher: Path | None = None

    def __post_init__(self) -> None:
        from bidensify.methods import get_method

        for name, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} {list(values)}: give at least one, and each once")
        for method in self.methods:
            get_method(method)
        other = sorted(set(self.own) - set(self.methods))
        if other:
            raise ConfigError(f"changes are given for {', '.join(other)}, which is not compared: {list(self.methods)}")
        for method in self.methods:
            self.cell_recipe(method, self.seeds[0])

    def cell_recipe(self, method: str, seed: int) -> Recipe:
        """The recipe of one cell."""
        from bidensify.recipe import load_recipe

        changes = [f"name={method}", f"seed={seed}", f"binarize.method={method}"]
        return load_recipe(self.recipe, [*changes, *self.own.get(method, ())])

    def folder(self, method: str, seed: int) -> Path:
        """The folder of one cell's run."""
        return self.out / "runs" / method / f"seed{seed}"

    @property
    def teacher_folder(self) -> Path | None:
        """Where the teacher is, or will be; None where the recipe names its weights, or has no teacher."""
        if self.teacher is not None:
            return self.teacher
        section = self.recipe.teacher
        return self.out / "teacher" if section is not None and section.weights is None and section.stages else None

    def claim(self) -> None:
        """Makes ``out`` this comparison's folder, or finds that it is.

        Raises:
            ConfigError: it holds something else, or a comparison under another recipe.
        """
        from bidensify.recipe import load_recipe
        from bidensify.train.rundir.differences import differences

        file = self.out / "recipe.yaml"
        if self.out.exists() and (not self.out.is_dir() or (any(self.out.iterdir()) and not file.is_file())):
            raise ConfigError(f"{str(self.out)!r} is not a comparison's folder; give a new one")
        if file.is_file():
            found = differences(load_recipe(file, trust=False).to_dict(), self.recipe.to_dict())
            if found:
                raise ConfigError(
                    f"{str(self.out)!r} holds a comparison under another recipe; it differs in {', '.join(found[:5])}. Give "
                    "another folder, or that recipe"
                )
            return
        with atomic_write(file) as temporary:
            temporary.write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False), encoding="utf-8")

    def train_teacher(self, say: Say, quiet: bool = False) -> None:
        """Trains the teacher where there is none yet."""
        from bidensify.train import run_recipe

        folder = self.teacher_folder
        if folder is None or self.teacher is not None or _finished(folder):
            return
        say(f"teacher: {folder}")
        run_recipe(self.recipe, folder, role="teacher", resume=(folder / "recipe.yaml").is_file(), quiet=quiet)

    def run(self, *, jobs: int = 1, say: Say, quiet: bool = False) -> Iterator[Cell]:
        """Runs the cells that are not finished, and yields each as it ends; one that fails does not end the others.

        Args:
            jobs: processes at a time; with one, cells run in this process; with none, those that are finished are read.
            say: told what begins and what failed.
            quiet: print nothing while training.

        Raises:
            ConfigError: without ``jobs``, none is finished.
        """
        places = [(method, seed) for seed in self.seeds for method in self.methods]
        if jobs == 0:
            cells = [self._cell(method, seed, None, say) for method, seed in places]
            if all(cell.state == "open" for cell in cells):
                raise ConfigError(
                    f"jobs=0 trains nothing, and {str(self.out)!r} has no finished run of these methods and seeds"
                )
            yield from cells
            return
        if jobs == 1:
            for method, seed in places:
                yield self._cell(method, seed, lambda m, s: self._here(m, s, say, quiet), say)
            return
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [
                pool.submit(self._cell, method, seed, lambda m, s: self._elsewhere(m, s, jobs, say), say)
                for method, seed in places
            ]
            for future in as_completed(waiting):
                yield future.result()

    def open_cell(self, method: str, seed: int) -> Cell:
        """A cell as it stands before it is run."""
        return Cell(method=method, seed=seed, folder=self.folder(method, seed).relative_to(self.out).as_posix())

    @functools.cached_property
    def _teacher_fingerprint(self) -> str | None:
        from bidensify.train import load_run

        folder = self.teacher_folder
        if folder is None or not (folder / "recipe.yaml").is_file():
            return None
        return weights_fingerprint(load_run(folder, trust=True)[0])

    def _stands(self, method: str, seed: int) -> bool:
        """Whether a cell's run is through.

        Raises:
            ConfigError: it was made under another recipe, other than for more epochs, or under another teacher.
        """
        from bidensify.train.rundir.folder import RunFolder

        folder = self.folder(method, seed)
        if not _finished(folder):
            return False
        run, inputs = RunFolder(folder), folder / "inputs.json"
        run.inspect(self.cell_recipe(method, seed), resume=True)
        if self._teacher_fingerprint is not None and inputs.is_file():
            teacher = {"weights": str(self.teacher_folder), "fingerprint": self._teacher_fingerprint}
            run.check_inputs({**run.read(inputs), "teacher": teacher})
        return not run.longer

    def _cell(self, method: str, seed: int, train: Callable[[str, int], None] | None, say: Say) -> Cell:
        cell = self.open_cell(method, seed)
        try:
            if not self._stands(method, seed):
                if train is None:
                    return cell
                train(method, seed)
            run = read_run(self.folder(method, seed))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            say(f"{method}, seed {seed}: failed. {text}")
            return cell.model_copy(update={"state": "failed", "error": text[:2000]})
        points = dict(run.curve(run.primary))
        history = [
            {"epoch": epoch, "loss": loss, **({run.primary: points[epoch]} if epoch in points else {})}
            for epoch, loss in run.curve("loss")
        ]
        done = {"state": "done", "metrics": run.metrics, "history": history, "seconds_per_step": run.seconds_per_step}
        return cell.model_copy(update=done)

    def _here(self, method: str, seed: int, say: Say, quiet: bool) -> None:
        from bidensify.train import run_recipe

        folder = self.folder(method, seed)
        say(f"{method}, seed {seed}: {folder}")
        run_recipe(
            self.cell_recipe(method, seed),
            folder,
            teacher_weights=self.teacher_folder,
            resume=(folder / "recipe.yaml").is_file(),
            quiet=quiet,
        )

    def _elsewhere(self, method: str, seed: int, jobs: int, say: Say) -> None:
        """Trains in a process of its own: what ends that process (memory, a signal) ends this cell alone."""
        folder, log = self.folder(method, seed), self.out / "logs" / f"{method}-seed{seed}.log"
        recipe = self.out / "recipes" / f"{method}-seed{seed}.yaml"
        with atomic_write(recipe) as temporary:
            text = yaml.safe_dump(self.cell_recipe(method, seed).to_dict(), sort_keys=False)
            temporary.write_text(text, encoding="utf-8")
        words = ["finetune", str(recipe), "--run-dir", str(folder), "--quiet"]
        words += ["-t", str(self.teacher_folder)] if self.teacher_folder is not None else []
        words += ["--resume"] if (folder / "recipe.yaml").is_file() else []
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, "COLUMNS": "200"}
        log.parent.mkdir(parents=True, exist_ok=True)
        say(f"{method}, seed {seed}: {folder} (log: {log})")
        with log.open("ab") as target:
            command = [sys.executable, "-m", "bidensify", *words]
            code = subprocess.run(command, stdout=target, stderr=target, env=environment, check=False).returncode
        if code:
            lines = [
                line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
            ]
            raise TrainingError(
                f"its process ended with {code}; last line of {log}: {lines[-1] if lines else '(none)'}"
            )


def _finished(folder: Path) -> bool:
    return (folder / "result.json").is_file() and (folder / "model.safetensors").is_file()
