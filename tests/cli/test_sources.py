"""What a source on the command line says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from torch import nn
from typer.testing import CliRunner

from bidensify.cli.app import app
from bidensify.cli.sources import Source
from bidensify.recipe import load_recipe

OWN = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}


def source(text: str, **data: object) -> Source:
    given = yaml.safe_load(text)
    given["data"].update(data)
    return Source(Path("run"), nn.Identity(), load_recipe(given))


def test_normalisation_is_the_recipes_or_the_data_sets(recipe_text: str) -> None:
    assert source(recipe_text, **OWN).normalisation() == {"image_mean": OWN["mean"], "image_std": OWN["std"]}
    info = source(recipe_text).need_recipe().data_info()
    assert source(recipe_text).normalisation() == {"image_mean": list(info.mean), "image_std": list(info.std)}
    half = source(recipe_text, std=OWN["std"]).normalisation()
    assert half == {"image_mean": list(info.mean), "image_std": OWN["std"]}


def test_normalisation_that_is_not_known_is_empty(recipe_text: str) -> None:
    assert Source(Path("run"), nn.Identity(), None).normalisation() == {}
    assert source(recipe_text, val=None, train=None, size=None).normalisation() == {}
    assert source(recipe_text, val=None, train=None, size=None, **OWN).normalisation()["image_mean"] == OWN["mean"]


def test_an_export_holds_mean_and_std(cli: CliRunner, work: Path, tmp_path: Path, recipe_text: str) -> None:
    pytest.importorskip("openvino")
    own = yaml.safe_load(recipe_text)
    own["data"].update(OWN)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    out = tmp_path / "net.xml"
    found = cli.invoke(app, ["export", str(work / "packed"), str(out), "--recipe", str(tmp_path / "own.yaml")])
    assert found.exit_code == 0, found.output + found.stderr
    text = out.read_text()
    assert "0.1 0.2 0.3" in text
    assert "0.5 0.6 0.7" in text
