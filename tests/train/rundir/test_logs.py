from __future__ import annotations

import io
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from bidensify.recipe import load_recipe
from bidensify.train import finetune
from bidensify.train.rundir import logs


def run(tiny: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, stage: str = "only") -> str:
    stream = io.StringIO()
    monkeypatch.setattr(
        logs, "Console", lambda quiet: Console(file=stream, force_terminal=terminal, width=160, quiet=quiet)
    )
    recipe = tiny.recipe(stages=[{"name": stage, "binarize": "none", "epochs": 2, "lr": 0.01}])
    finetune(
        tiny.network(), recipe=recipe, train=tiny.Colours(), val=tiny.Colours(8, seed=1), run_dir=folder, task=tiny.TASK
    )
    return stream.getvalue()


def test_one_line_per_epoch_where_there_is_no_terminal(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = run(tiny, tmp_path / "run", monkeypatch, terminal=False).splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"only 1/2  loss \d\.\d{4}  miou 0\.\d{4}  [\d.]+ images/s", lines[0])
    assert re.fullmatch(r"tiny: miou 0\.\d{4} \(epoch \d\)", lines[2])


def test_progress_shows_loss_metric_speed_and_eta(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run(tiny, tmp_path / "run", monkeypatch, terminal=True)
    assert re.search(r"only 2/2.*10/10.*loss \d.*miou 0\.\d.*images/s.*ETA", text)


def test_names_with_brackets_are_shown_as_they_are(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run(tiny, tmp_path / "run", monkeypatch, terminal=True, stage="all[/1]")
    assert re.search(r"all\[/1\] 2/2", text)


def test_other_processes_write_nothing(tiny: ModuleType, tmp_path: Path) -> None:
    with logs.RunLog(tmp_path, load_recipe(tiny.recipe()), main=False) as log:
        log.write("step", {"loss": 1.0})
        log.scalars("train", {"loss": 1.0}, 1)
        log.start_bar(3, 0)
        log.advance(1, "x", 1.0, 2.0)
        log.say("nothing")
    assert list(tmp_path.iterdir()) == []


def test_log_is_cut_to_the_checkpoint_and_appended(tiny: ModuleType, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe())
    with logs.RunLog(tmp_path, recipe, main=True, quiet=True) as log:
        log.write("step", {"step": 1, "loss": 1.0})
        kept = log.position
        log.write("step", {"step": 2, "loss": 2.0})
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2  # written out at once
    with logs.RunLog(tmp_path, recipe, main=True, position=kept, quiet=True) as log:
        log.write("step", {"step": 2, "loss": float("nan")})
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records == [{"kind": "step", "step": 1, "loss": 1.0}, {"kind": "step", "step": 2, "loss": None}]


def test_revision_is_that_of_the_own_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "env" / "bidensify" / "train" / "rundir"
    package.mkdir(parents=True)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(logs, "__file__", str(package / "logs.py"))
    assert logs.git_revision() == {"revision": None, "modified": None}
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "env", check=True)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(commit, cwd=tmp_path / "env", check=True)
    assert re.fullmatch("[0-9a-f]{40}", str(logs.git_revision()["revision"]))
    assert logs.git_revision()["modified"] is False
