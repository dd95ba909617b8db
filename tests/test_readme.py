"""Every command and every block of code in README is really run: here at a small size, or by .ci/run as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bidensify as bd
from bidensify.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What makes a command of README small enough for a test.
TRAINING = [
    "--quiet",
    *(part for value in (
        "data.size=[32,32]", "data.train.length=8", "data.val.length=4", "data.batch_size=4", "model.options.width=8",
        "teacher.stages[0].epochs=1", "stages[0].epochs=1", "stages[1].epochs=1", "calibrate.batches=1",
        "model.options.levels=2",
    ) for part in ("--set", value)),
]  # fmt: skip
SMALL = {
    "demo": ["--quick"],
    "bench": ["--size", "64", "64", "--seconds", "0.02"],
    "finetune": TRAINING,
    "compare --methods": [*TRAINING, "--seconds", "0.05", "--pictures", "1"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.strip().splitlines()]


def test_first_screen_has_a_picture_and_the_two_commands() -> None:
    head = README[: README.index("## ")]
    assert len(head.splitlines()) < 40
    picture = re.search(r"!\[[^\]]+\]\((.+?)\)", head)
    assert picture is not None
    assert (ROOT / picture.group(1)).stat().st_size < 200_000
    assert commands()[:2] == ['pip install -e ".[all]" && bidensify demo', 'pip install -e ".[all,test]" && pytest']


def test_ci_runs_the_test_command_as_it_stands() -> None:
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    assert {"ruff check", "ruff format --check", "mypy", "lint-imports"} <= set(lines)
    # A line too long is told in seconds, not behind the tests.
    assert lines.index("ruff check") < lines.index(commands()[1])


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)(.+?)\)", README):
        path, _, heading = target.partition("#")
        assert (ROOT / path).exists(), target
        if not path:
            assert f"\n## {heading}\n" in README.lower(), target


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    for folder in ("recipes", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in commands():
        for part in line.split(" && "):
            words = shlex.split(part)
            if words[0] in ("pip", "pytest"):
                continue
            assert words[0] == "bidensify", f"{part!r}: run it here, or in .ci/run"
            kind = "compare --methods" if "--methods" in words else words[1]
            result = CliRunner().invoke(app, [*words[1:], *SMALL.get(kind, [])])
            assert result.exit_code == 0, (part, result.output[-2000:], result.exception)
            ran.append(words[1])
    assert {"demo", "plan", "convert", "finetune", "evaluate", "predict", "pack", "bench", "export", "compare"} <= set(
        ran
    )
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    assert (tmp_path / "comparison.html").is_file()


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, namespace)
    model, again = namespace["model"], namespace["again"]
    assert isinstance(again, type(model))
    assert len(bd.plan(model, namespace["config"]).binary) > 10  # type: ignore[arg-type]
