"""Names that users give are printed as they are, and proposed commands can be pasted into a shell."""

from __future__ import annotations

import html
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.table import Table
from typer.testing import CliRunner

import bidensify as bd
from bidensify._util.terminal import as_text, console, shell
from bidensify.cli.app import app
from bidensify.compare import Report, render
from bidensify.compare.report import Table as ReportTable

ODD = ("läufe/exp 1 #a", "runs/[bold]exp", "runs/exp[/]2", "runs/[lr=1e-3]", "runs/:smile: it's", "a\\[red]b")


@pytest.mark.parametrize("name", ODD)
def test_markup_means_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    console().print(name, table)
    assert capsys.readouterr().out.count(name) == 5
    assert as_text(table).count(name) == 4
    assert shlex.split(shell("bidensify", "pack", name)) == ["bidensify", "pack", name]


@pytest.mark.parametrize("name", ODD)
def test_every_command_names_the_folder_as_it_is_called(
    name: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(work / "run", name)
    picture = f"bild {name.replace('/', ' ')}.png"
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(picture)

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, result.output
        return result.output

    assert f"{name} on scenes/val" in run("evaluate", name)
    assert f"{name}/packed/model.safetensors: " in run("pack", name, f"{name}/packed")
    assert f"1 prediction in {name}/pre[di]ct" in run("predict", name, picture, "--out", f"{name}/pre[di]ct")
    assert Path(f"{name}/pre[di]ct/{Path(picture).stem}.labels.png").is_file()
    assert f"Report: {name}/c [1].html" in run("compare", name, "--out", f"{name}/c [1].html")
    assert repr(name)[1:-1] in run("pack", name, f"{name}/packed", code=2)
    resumed = run("finetune", f"{name}/recipe.yaml", "--run-dir", name, "--resume", "-t", str(work / "run_teacher"))
    (line,) = [line for line in resumed.splitlines() if line.startswith("Next: ")]
    assert shlex.split(line)[1:] == ["bidensify", "pack", name, f"{name}/packed"]
    assert f"{name}, epoch 1" in resumed


def test_what_goes_to_a_pipe_is_not_folded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    path = "encoder." + ".".join(["layer"] * 60)
    table = Table("layer")
    table.add_row(path)
    console().print(table)
    assert path in capsys.readouterr().out
    assert path in as_text(table)
    monkeypatch.setenv("COLUMNS", "60")
    console().print(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_plans_are_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    result = CliRunner().invoke(app, ["plan", "demo:unet", "-o", "width=8"])
    plan = bd.plan(bd.models.build_model("demo:unet", width=8))
    for layer in plan.layers:
        (line,) = [line for line in result.output.splitlines() if f" {layer.path} " in line]
        assert layer.reason in line
        assert "×".join(map(str, layer.output)) in line
        assert f"{100 * layer.macs / sum(other.macs for other in plan.layers):.1f}" in line


@pytest.mark.parametrize("name", [*ODD, "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
def test_pages_escape_names(name: str) -> None:
    page = render(Report(name, name, sections=[ReportTable(name, [name], [[name]], note=name)]))
    assert html.unescape(page).count(name) == 7
    assert "<script>alert" not in page
    assert "<img src=x" not in page
