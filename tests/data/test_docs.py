"""docs/data.md is what the docstrings give, and what it shows works."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from bidensify.data import DataInfo, build_dataset, check_dataset
from bidensify.data.registry import DATA_SETS
from bidensify.tasks import build_task
from bidensify.tasks.registry import TASKS

DOCS = Path(__file__).parents[2] / "docs"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", DOCS / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = generator()
SETS, KNOWN = MAKE.own(DATA_SETS), MAKE.own(TASKS)
INFO = DataInfo(3, ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))


def shown(name: str, registry: Any) -> list[dict[str, Any]]:
    """The sections that the examples of one entry hold."""
    parts = MAKE.sections(inspect.getdoc(registry[name]))
    found = []
    for _, code in MAKE.examples(parts["Example"]):
        data = yaml.safe_load(code)
        found += [data] if "name" in data else list(data.values())
    return found


def test_the_page_is_what_the_docstrings_give() -> None:
    assert MAKE.PAGE.read_text(encoding="utf-8") == MAKE.page(SETS, KNOWN), "run: python docs/make_data.py"


@pytest.mark.parametrize(("name", "registry"), [*((n, DATA_SETS) for n in SETS), *((n, TASKS) for n in KNOWN)])
def test_every_option_has_an_example_that_fits(name: str, registry: Any) -> None:
    examples = shown(name, registry)
    options = set(registry.options(name))
    assert all(example.pop("name") == name for example in examples)
    splits = [example.pop("split") for example in examples] if registry is DATA_SETS else []
    assert all(splits)
    assert {key for example in examples for key in example} == options
    if registry is TASKS:
        for example in examples:
            build_task(name, {"binary": DataInfo(2, ("a", "b"), ((0, 0, 0),) * 2)}.get(name, INFO), **_fitting(example))


def _fitting(options: dict[str, Any]) -> dict[str, Any]:
    """Lists of the examples are for their own number of classes."""
    lengths = [len(value) for key, value in options.items() if isinstance(value, list) and key != "colour"]
    if not lengths:
        return options
    unnamed = {"class_names": (), "palette": None} if "class_names" not in options else {}
    return {"num_classes": lengths[0], **unnamed, **options}


def test_an_undocumented_option_is_an_error() -> None:
    @DATA_SETS.register("undocumented_of_this_test")
    class Undocumented:
        """A set.

        Args:
            split: any.
            root: a folder.
        """

        def __init__(self, split: str, *, root: str, secret: int = 0, transforms: object = None) -> None: ...

    with pytest.raises(ValueError, match=r"options are \['root', 'secret'\], the docstring says \['root'\]"):
        MAKE.entry("undocumented_of_this_test", DATA_SETS)


def test_the_code_on_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", MAKE.PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    discs = build_dataset("discs", "val", length=70)
    assert check_dataset(discs).warnings == ()  # type: ignore[union-attr]
    assert not torch.equal(discs[0]["image"], build_dataset("discs", "train")[0]["image"])
    depth = build_task("disparity").predict(torch.full((1, 1, 2, 2), 0.5))
    assert torch.equal(depth, torch.full((1, 2, 2), 2.0))
