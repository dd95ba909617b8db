"""The pages of the site: their code runs in order, their pictures are the methods', and no page with code is left out."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bidensify as bd
from bidensify.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = (
    "docs/index.md", "docs/start.md", "docs/own-data.md", "docs/own-model.md", "docs/deployment.md", "docs/compare.md",
    "docs/sensitivity.md", "recipes/README.md",
)  # fmt: skip
# Run by test_readme, test_contributing, test_docs, data/test_docs and integrations/test_transformers_docs.
ELSEWHERE = ("README.md", "CONTRIBUTING.md", "docs/methods.md", "docs/data.md", "docs/transformers.md")
CODE = re.compile(r"^```(python|bash|yaml)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SMALL = [
    part
    for value in (
        "data.size=[32,32]", "data.train.length=8", "data.val.length=4", "data.batch_size=4", "model.options.width=8",
        "teacher.stages[0].epochs=1", "stages[0].epochs=1", "stages[1].epochs=1", "calibrate.batches=1",
    )
    for part in ("--set", value)
]  # fmt: skip


def test_every_page_with_code_is_run_by_a_test() -> None:
    files = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "recipes" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
    with_code = {path.relative_to(ROOT).as_posix() for path in files if CODE.search(path.read_text(encoding="utf-8"))}
    assert with_code == {*PAGES, *ELSEWHERE}


def more(words: list[str]) -> list[str]:
    """What makes a command small enough for a test."""
    scenes = any("scenes_segmentation" in word for word in words)
    if words[0] == "bench":
        return ["--size", "64", "64", "--seconds", "0.02"]
    if words[0] == "compare":
        return ["--quiet", *SMALL, "--seconds", "0.05", "--pictures", "1"]
    quiet = ["--quiet"] if words[0] == "finetune" and "--dry-run" not in words else []
    if words[0] in ("sensitivity", "calibrate") and scenes:
        # What the teacher was trained with.
        return [part for value in SMALL[1::2] if "epochs" not in value for part in ("--set", value)]
    return quiet + (SMALL if words[0] == "finetune" and scenes else [])


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("recipes", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"build_our_network": lambda name, width: nn.Conv2d(3, width, 1)}
    for match in CODE.finditer(text):
        language, code = match.groups()
        if language == "python":
            exec(code, namespace)
        elif language == "yaml":
            named = re.findall(r"`([\w-]+\.yaml)`:\s*$", text[: match.start()])
            assert named, "a page says before a block of YAML which file it is"
            Path(named[0]).write_text(code, encoding="utf-8")
        else:
            for part in code.strip().replace(" && ", "\n").splitlines():
                words = shlex.split(part)
                # pip: this is what the tests are run from; the demo is README's first command, too, and run for that.
                if words[0] == "pip" or words[1] == "demo":
                    continue
                assert words[0] == "bidensify", part
                result = CliRunner().invoke(app, [*words[1:], *more(words[1:])])
                assert result.exit_code == 0, (part, result.output[-2000:], result.exception)


def quantizers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_quantizers", ROOT / "docs" / "make_quantizers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_its_picture() -> None:
    module, text = quantizers(), (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert {path.stem for path in module.FOLDER.glob("*.svg")} == set(module.names())
    for name in module.names():
        assert f"(quantizers/{name}.svg)" in text


def test_a_picture_shows_forward_and_gradient(tmp_path: Path) -> None:
    module = quantizers()
    x, given, gradient = module.curves("bnn")["activations"]
    assert torch.equal(given, torch.where(x >= 0, 1.0, -1.0))
    assert torch.equal(gradient, (x.abs() <= 1).float())
    x, given, gradient = module.curves("bireal")["activations"]
    assert torch.allclose(gradient, (2 - 2 * x.abs()).clamp(min=0), atol=1e-6)
    x, given, _ = module.curves("bidense")["weights"]
    assert torch.allclose(given.abs(), x.abs().mean().expand_as(x), atol=1e-5)
    module.draw("bnn", tmp_path / "bnn.svg")
    assert "bnn: weights" in (tmp_path / "bnn.svg").read_text()
    assert set(module.names()) <= set(bd.available_methods())
