"""How far trained networks and their packed forms agree: arg-max per pixel, and bit for bit.

    python benchmarks/agreement.py runs/camvid_r34 runs/scenes --data-root CAMVID --out agreement.json

Each RUN is a folder that `bidensify finetune` wrote (a student's). The validation images of its recipe go through the latent
network and through the packed one, which is written to disk and read back, in both memory formats. Columns:

* agreement and identical: share of pixels with the same arg-max, and of images whose outputs are equal bit for bit;
* formats: the latent network in channels_last against itself in the plain format;
* training arithmetic: the latent network as it computes with gradients against the packed one (what the shared arithmetic
  of evaluation spares);
* bfloat16: packed with float_dtype=torch.bfloat16 against the latent network.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import bidensify as bd
from bidensify._util.files import atomic_write
from bidensify._util.machine import cpu_name
from bidensify.data.batches import collate
from bidensify.deploy.backends import available_kernels
from bidensify.recipe import load_recipe
from bidensify.train import load_run

PLAIN, LAST = torch.contiguous_format, torch.channels_last


class Count:
    """Pixels with the same arg-max and images with the same bits."""

    def __init__(self) -> None:
        self.pixels = self.same = self.images = self.identical = 0

    def add(self, got: Tensor, want: Tensor) -> None:
        """Two outputs (N, classes, H, W) for the same images."""
        self.same += int((got.argmax(1) == want.argmax(1)).sum())
        self.pixels += want.numel() // want.shape[1]
        self.identical += sum(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        self.images += len(want)

    def result(self) -> dict[str, float]:
        """Shares."""
        return {"argmax": self.same / self.pixels, "identical": self.identical / self.images}


def run(model: nn.Module, images: Tensor, memory: torch.memory_format, gradients: bool = False) -> Tensor:
    """The model's logits in plain format; ``gradients`` leaves autograd on, as training does."""
    given = images.contiguous(memory_format=memory)
    with torch.enable_grad() if gradients else torch.inference_mode():
        output = model(given.clone().requires_grad_() if gradients else given)
    output = output if isinstance(output, Tensor) else next(iter(output.values()))
    return output.detach().contiguous()


def measure(folder: Path, overrides: list[str], limit: int | None, batch: int) -> dict[str, Any]:
    """One run's row."""
    latent, own = load_run(folder)
    latent.eval()
    recipe = load_recipe(own, overrides)
    data = recipe.build_dataset("val")
    count = min(len(data), limit or len(data))
    with tempfile.TemporaryDirectory() as place:
        bd.save_pretrained(bd.pack(latent), f"{place}/fp32")
        bd.save_pretrained(bd.pack(latent, float_dtype=torch.bfloat16), f"{place}/bf16")
        packed = bd.from_pretrained(f"{place}/fp32", recipe.build_model()).eval()
        half = bd.from_pretrained(f"{place}/bf16", recipe.build_model()).eval()
    columns = {name: Count() for name in ("plain", "channels_last", "formats", "training arithmetic", "bfloat16")}
    for sample in DataLoader(Subset(data, range(count)), batch_size=batch, collate_fn=collate):
        images = sample["image"]
        latent.to(memory_format=PLAIN)
        want = run(latent, images, PLAIN)
        ours = run(packed, images, PLAIN)
        columns["plain"].add(ours, want)
        columns["training arithmetic"].add(ours, run(latent, images, PLAIN, gradients=True))
        columns["bfloat16"].add(run(half, images, PLAIN), want)
        latent.to(memory_format=LAST)
        last = run(latent, images, LAST)
        columns["channels_last"].add(run(packed, images, LAST), last)
        columns["formats"].add(last, want)
    size = tuple(images.shape[-2:])
    return {
        "run": folder.name,
        "model": recipe.model.source,
        "data": recipe.data.val.name,
        "images": count,
        "size": size,
        "metrics": json.loads((folder / "result.json").read_text(encoding="utf-8"))["metrics"],
        "columns": {name: each.result() for name, each in columns.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""

    def percent(value: float) -> str:
        return "100" if value == 1 else f"{100 * value:.3f}"

    heads = ("plain", "channels_last", "formats", "training arithmetic", "bfloat16")
    pick: Callable[[dict[str, Any], str], str] = lambda row, name: percent(row["columns"][name]["argmax"])  # noqa: E731
    lines = [
        "| run | images | mIoU % | identical images %, plain, channels_last | " + " | ".join(heads) + " |",
        "|" + "---|" * (4 + len(heads)),
    ]
    for row in rows:
        same = ", ".join(percent(row["columns"][name]["identical"]) for name in ("plain", "channels_last"))
        where = f"{row['images']} of {row['size'][0]}x{row['size'][1]}"
        score = 100 * row["metrics"].get("miou", float("nan"))
        cells = [f"{row['run']} ({row['model']})", where, f"{score:.1f}", same, *(pick(row, name) for name in heads)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data-root", help="data.root of recipes that have one")
    parser.add_argument("--limit", type=int, help="images per run; all by default")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON; rows of runs that are in it already are kept")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if arguments.out is not None and arguments.out.is_file():
        rows = {row["run"]: row for row in json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]}
    for folder in arguments.runs:
        needs_root = arguments.data_root and load_recipe(folder / "recipe.yaml").data.root is not None
        overrides = [f"data.root={arguments.data_root}"] if needs_root else []
        rows[folder.name] = measure(folder, overrides, arguments.limit, arguments.batch)
        print(table([rows[folder.name]]).splitlines()[-1], flush=True)
        if arguments.out is not None:
            data = {
                "cpu": cpu_name(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "kernel": available_kernels()[0],
                "rows": list(rows.values()),
            }
            with atomic_write(arguments.out) as temporary:
                temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
