"""What docs/ says is so: code runs, defaults are the defaults."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import bidensify as bd
from bidensify.models import build_model

DOCS = Path(__file__).parents[1] / "docs"


def test_the_method_of_ones_own_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "methods.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    plan = bd.bidensify(build_model("demo:unet", width=8), method="mine").bidensify_plan
    assert {layer.method for layer in plan.binary} == {"mine"}  # type: ignore[union-attr]


def test_the_table_of_methods_has_every_method() -> None:
    table = (DOCS / "methods.md").read_text(encoding="utf-8").split("## A method of your own")[0]
    first = re.findall(r"^\| (`.+?) \|", table, flags=re.MULTILINE)
    named = {name for cell in first for name in re.findall(r"`([a-z-]+)`", cell)}
    assert named == {name for name in bd.available_methods() if not name.startswith("own-")}


def test_the_table_of_options_is_that_of_the_class() -> None:
    text = (DOCS / "rewrite.md").read_text(encoding="utf-8")
    table = text[text.index("| `BidensifyConfig` |") :]
    rows: dict[str, str] = {}
    for names, default in re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \| (.+?) \|", table, flags=re.MULTILINE):
        rows.update(dict.fromkeys(re.findall(r"`([a-z_]+)`", names), default.strip("`")))
    shown: dict[Any, str] = {"True": "true", "False": "false", "()": "none"}
    fields = {item.name: str(item.default) for item in dataclasses.fields(bd.BidensifyConfig)}
    assert rows == {name: shown.get(value, value) for name, value in fields.items()}
