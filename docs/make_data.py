"""Writes docs/data.md from the docstrings and signatures of the data sets and tasks: python docs/make_data.py"""

from __future__ import annotations

import inspect
import itertools
import re
from pathlib import Path
from typing import Any

from bidensify.data.registry import DATA_SETS
from bidensify.tasks.registry import TASKS

PAGE = Path(__file__).with_name("data.md")

INTRO = """\
# Data sets and tasks

Made by `python docs/make_data.py` from the docstrings; change those.

A recipe's `data.train` and `data.val` name a data set, a split and the data set's options; `data.root` gives `root` to both.
`task` names the task and its options; what a data set knows (number of classes, names, colours, farthest depth) need not be
said again. In Python: `bidensify.data.build_dataset(name, split, **options)` and `bidensify.tasks.build_task(name, info,
**options)`.

- **Before training every label is read**, in parallel, and remembered in `$BIDENSIFY_CACHE` (else `~/.cache/bidensify`): files
  that cannot be used, labels outside the classes, and masks of 0 and 255 whose foreground would be ignored are errors; classes
  that never occur, depth maps without depth, and masks that are mostly ignored are warnings. In Python:
  `bidensify.data.check_dataset(dataset)`.
- **Training** cuts random windows of `data.size` (`data.augment`: `scale`, `hflip`, `color_jitter`, `rotate`). What is drawn
  depends on (`seed`, epoch, index) alone, however many workers read; NumPy's and Python's global generators are seeded too.
- **Evaluation** brings an image to `data.size` as `evaluate.resize` says: `letterbox` (as large as fits, padded), `pad` (its own
  size, padded), `native` (its own size, padded to a multiple of `evaluate.multiple`),
  `cover` (as small as covers `data.size`) or `squash` (stretched). Predictions are
  brought back and measured at the image's own size, so images of one set may differ in size. Padding lies right and below.
- **Files** are PNG, JPEG, TIFF, BMP, WebP, PPM or NumPy's `.npy`. Photographs are turned as their EXIF orientation says; masks
  and depth maps too, by their own. Images of more than 8 bits are scaled to [0, 1].
- **Lists of samples** may be UTF-8, UTF-16 or Windows' 1252, with a byte order mark or without.

## A data set of your own

A class that gives `info`, `__len__` and `load`; its other parameters are its options in a recipe.

```python
import torch
import bidensify as bd
from bidensify.data import DataInfo, DenseDataset
from torchvision import tv_tensors


@bd.register_data_set("discs")
class Discs(DenseDataset):
    \"\"\"Bright discs on a dark ground.\"\"\"

    def __init__(self, split, *, length=100, transforms=None):
        super().__init__(transforms)
        self.length, self.first = length, {"train": 0, "val": length}[split]
        self.info = DataInfo(2, ("ground", "disc"), ((0, 0, 0), (255, 200, 0)))

    def __len__(self):
        return self.length

    def load(self, index):
        generator = torch.Generator().manual_seed(self.first + index)
        y, x = torch.rand(2, 1, 1, generator=generator)
        rows, columns = torch.linspace(0, 1, 64)[:, None], torch.linspace(0, 1, 64)[None]
        mask = ((rows - y) ** 2 + (columns - x) ** 2 < 0.05).long()
        image = (60 + 150 * mask).to(torch.uint8).expand(3, -1, -1)
        return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask)}
```

Whoever has files derives from `bidensify.data.FileDataset`, which reads, caches, checks sizes and counts labels:
`bidensify/data/sets/` has six of them.

## A task of your own

A class that derives from `bidensify.tasks.DenseTask`, or from a task that is here:

```python
import bidensify as bd
from bidensify.tasks import DepthTask


@bd.register_task("disparity")
class Disparity(DepthTask):
    \"\"\"Depth from a network that gives inverse depth.\"\"\"

    def __init__(self, max_depth=80.0):
        super().__init__(output="inverse", max_depth=max_depth)
```
"""


def sections(docstring: str) -> dict[str, str]:
    """Returns a docstring's parts: "" for what comes first, then "Args", "Raises", "Example"."""
    pieces = re.split(r"^(Args|Raises|Example|Returns|Attributes):\n", docstring, flags=re.MULTILINE)
    parts = {"": pieces[0].strip()}
    for name, body in zip(pieces[1::2], pieces[2::2]):
        parts[name] = inspect.cleandoc("\n" + body).strip("\n")
    return parts


def markdown(text: str) -> str:
    """Turns a docstring's marks into those of Markdown; lines are joined."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"\s*\n\s*", " ", text).strip()


def arguments(text: str) -> dict[str, str]:
    """Returns {option: what it is} of an "Args" section; several names may share a text."""
    found = {}
    for entry in re.split(r"\n(?=\S)", text):
        names, _, what = entry.partition(":")
        for name in names.split(","):
            found[name.strip()] = markdown(what)
    return found


def examples(text: str) -> list[tuple[str, str]]:
    """Returns (what it shows, YAML) of an "Example" section."""
    found = []
    for block in re.finditer(r"(?P<title>[^\n]*(?:\n[^\n]+)*?)::\n\n(?P<code>(?:(?:    .*)?\n?)+)", text):
        found.append((markdown(block["title"]), inspect.cleandoc("\n" + block["code"]).strip()))
    return found


def entry(name: str, registry: Any) -> str:
    """Returns the page's section on one data set or task.

    Raises:
        ValueError: an option is not documented, or a documented one does not exist.
    """
    parts = sections(inspect.getdoc(registry[name]) or "")
    options, known = registry.options(name), arguments(parts.get("Args", ""))
    given = set(registry.given)
    if set(known) - given != set(options):
        raise ValueError(f"{name}: the options are {sorted(options)}, the docstring says {sorted(set(known) - given)}")
    lines = [f"### `{name}`", "", *(markdown(p) + "\n" for p in parts[""].split("\n\n"))]
    if "split" in known:
        lines += [f"`split`: {known['split']}", ""]
    lines += ["| option | default | what |", "| --- | --- | --- |"]
    for what, group in itertools.groupby(options, key=lambda option: known[option]):  # one row where they share a text
        names = list(group)
        defaults = [options[option].default for option in names]
        shown = ["required" if d is inspect.Parameter.empty else f"`{d!r}`" for d in dict.fromkeys(defaults)]
        row = (", ".join(f"`{option}`" for option in names), ", ".join(shown), what.replace("|", "\\|"))
        lines.append(f"| {' | '.join(row)} |")
    for title, code in examples(parts.get("Example", "")):
        lines += ["", *([f"{title}:", ""] if title else []), "```yaml", code, "```"]
    return "\n".join(lines)


def page(sets: list[str], tasks: list[str]) -> str:
    """Returns the whole page."""
    parts = [INTRO.rstrip()]
    for title, names, registry in (("Data sets", sets, DATA_SETS), ("Tasks", tasks, TASKS)):
        parts += [f"## {title}", *(entry(name, registry) for name in names)]
    return "\n\n".join(parts) + "\n"


def own(registry: Any) -> list[str]:
    """Returns the names that come with bidensify."""
    return [name for name in registry.names() if registry[name].__module__.startswith("bidensify.")]


if __name__ == "__main__":
    PAGE.write_text(page(own(DATA_SETS), own(TASKS)), encoding="utf-8")
