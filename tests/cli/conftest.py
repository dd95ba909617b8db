"""One run of the small recipe and the same network packed, shared by the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bidensify.cli.app import app


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner()


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory, recipe_text: str) -> Path:
    """A folder with ``tiny.yaml``, ``run``, ``run_teacher`` and ``packed``."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(recipe_text)
    for arguments in (
        ["finetune", str(folder / "tiny.yaml"), "--run-dir", str(folder / "run"), "--quiet"],
        ["pack", str(folder / "run"), str(folder / "packed")],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output + result.stderr
    return folder
