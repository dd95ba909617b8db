"""``bidensify demo``: teacher, two students, packing, reloading, comparison and a report page, in one resumable job."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bidensify._util.files import atomic_write
from bidensify._util.machine import cpu_name
from bidensify._util.version import __version__
from bidensify.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from bidensify.recipe import Recipe

__all__ = ["CHECKS", "run_demo"]

METHODS = ("bidense", "bnn")
QUICK = (
    "data.train.length=48",
    "data.val.length=16",
    "data.eval_batch_size=16",
    "teacher.stages[0].epochs=1",
    "stages[0].epochs=1",
    "stages[1].epochs=1",
    "evaluate.every=1",
)
# What the job promises: name in results.json -> (text, lowest allowed value or None, highest allowed value or None).
CHECKS: dict[str, tuple[str, float | None, float | None]] = {
    "student_over_teacher": ("bidense reaches this share of the teacher's mIoU", 0.92, None),
    "points_above_bnn": ("bidense is above bnn by this many points of mIoU", 5.0, None),
    "agreement": ("pixels on which packed and latent agree", 0.999, None),
    "size_over_bound": ("packed file against binary weights / 8 + 4 · other parameters", None, 1.05),
}
# Quality needs the whole length; what is exact has to hold in seconds too.
EXACT = ("agreement", "size_over_bound")


@dataclass
class Student:
    """One trained student: latent, and packed as read back from disk."""

    method: str
    latent: nn.Module
    packed: nn.Module
    figures: dict[str, Any]


def demo_recipe(seed: int, quick: bool, method: str) -> Recipe:
    """The packaged recipe for one method."""
    import yaml

    from bidensify.recipe import load_recipe

    text = resources.files("bidensify.demo").joinpath("recipe.yaml").read_text(encoding="utf-8")
    overrides = [f"seed={seed}", f"binarize.method={method}", *(QUICK if quick else ())]
    return load_recipe(yaml.safe_load(text), overrides)


def _train(recipe: Recipe, folder: Path, role: Any, teacher: Path | None, console: Console) -> None:
    from bidensify.train import run_recipe

    if (folder / "result.json").is_file() and (folder / "model.safetensors").is_file():
        console.print(f"{folder.name}: already trained", highlight=False)
        return
    console.print(folder.name, style="bold")
    run_recipe(recipe, folder, role=role, teacher_weights=teacher, resume=(folder / "recipe.yaml").is_file())


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in torch.split(images, 50)])


def _pack(method: str, run: Path, out: Path, images: Tensor) -> Student:
    import bidensify
    from bidensify.deploy.format import TENSORS
    from bidensify.nn import binary_layers
    from bidensify.train import load_run

    latent, _ = load_run(run)
    packed = bidensify.pack(latent)
    folder = out / f"{method}_packed"
    bidensify.save_pretrained(packed, folder)
    reloaded = bidensify.from_pretrained(folder)
    binary = sum(layer.latent_weight.numel() for _, layer in binary_layers(latent))
    other = sum(parameter.numel() for parameter in latent.parameters()) - binary
    size = (folder / TENSORS).stat().st_size
    bound = binary / 8 + 4 * other
    agreement = (_outputs(latent, images).argmax(1) == _outputs(reloaded, images).argmax(1)).double().mean().item()
    figures = {
        "binary_weights": binary,
        "other_parameters": other,
        "packed_bytes": size,
        "bound_bytes": bound,
        "size_over_bound": size / bound,
        "latent_bytes": 4 * (binary + other),
        "agreement": agreement,
    }
    return Student(method, latent, reloaded, figures)


def run_demo(out: Path, *, seed: int = 0, quick: bool = False, console: Console) -> dict[str, Any]:
    """Runs the whole job in ``out`` (or goes on where it was stopped) and returns what ``results.json`` holds.

    Args:
        out: folder for runs, packed models, ``results.json`` and ``report.html``.
        seed: of data, weights and training.
        quick: a size that takes seconds; the targets of quality are then reported, not enforced.
        console: where progress goes.

    Raises:
        ConfigError: ``out`` holds a demo of another seed or size.
    """
    from bidensify.compare import read_run
    from bidensify.train import load_run

    started = time.perf_counter()
    settings = {"seed": seed, "quick": quick}
    marker = out / "demo.json"
    if marker.is_file():
        found = marker.read_text(encoding="utf-8")
        if found != json.dumps(settings):
            raise ConfigError(
                f"{str(out)!r} holds a demo with {found}, this one has {json.dumps(settings)}; give another folder with --out"
            )
    with atomic_write(marker) as temporary:
        temporary.write_text(json.dumps(settings), encoding="utf-8")
    recipes = {method: demo_recipe(seed, quick, method) for method in METHODS}
    _train(recipes["bidense"], out / "teacher", "teacher", None, console)
    for method, recipe in recipes.items():
        _train(recipe, out / method, "student", out / "teacher", console)

    val = recipes["bidense"].build_dataset("val")
    samples = [val[index] for index in range(len(val))]
    images = torch.stack([sample["image"] for sample in samples])
    students = {method: _pack(method, out / method, out, images) for method in METHODS}
    records = {name: read_run(out / name) for name in ("teacher", *METHODS)}
    teacher, _ = load_run(out / "teacher")

    miou = {name: record.metrics["miou"] for name, record in records.items()}
    measured = {
        "student_over_teacher": miou["bidense"] / miou["teacher"],
        "points_above_bnn": 100 * (miou["bidense"] - miou["bnn"]),
        "agreement": min(student.figures["agreement"] for student in students.values()),
        "size_over_bound": max(student.figures["size_over_bound"] for student in students.values()),
    }
    checks = []
    for name, (text, low, high) in CHECKS.items():
        passed = (low is None or measured[name] >= low) and (high is None or measured[name] <= high)
        enforced = not quick or name in EXACT
        checks.append({"name": name, "text": text, "measured": measured[name], "low": low, "high": high,
                       "passed": passed, "enforced": enforced})  # fmt: skip
    results = {
        "passed": all(check["passed"] for check in checks if check["enforced"]),
        "checks": checks,
        **measured,
        "miou": miou,
        "metrics": {name: record.metrics for name, record in records.items()},
        "seconds_per_step": {name: record.seconds_per_step for name, record in records.items()},
        "training_seconds": {name: record.seconds for name, record in records.items()},
        "students": {method: student.figures for method, student in students.items()},
        "seed": seed,
        "quick": quick,
        "seconds": time.perf_counter() - started,
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "platform": platform.platform()},
        "versions": {"bidensify": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    from bidensify.demo.page import write_page
    from bidensify.train.rundir.logs import write_json

    write_json(out / "results.json", results)

    models = {"teacher": teacher, **{method: student.packed for method, student in students.items()}}
    write_page(out, results, records, recipes["bidense"], val.info, models, samples)
    _tell(results, out, console)
    return results


def _tell(results: dict[str, Any], out: Path, console: Console) -> None:
    from rich.text import Text

    for check in results["checks"]:
        target = f"≥ {check['low']:g}" if check["low"] is not None else f"≤ {check['high']:g}"
        if check["passed"]:
            mark = ("passed", "green")
        else:
            mark = ("failed", "red") if check["enforced"] else ("not reached", "")
        line = f"  {check['text']}: {check['measured']:.4f} ({target})"
        console.print(Text.assemble(mark, line), soft_wrap=True)
    if results["quick"]:
        console.print("--quick trains for seconds: its mIoU says nothing about a method.", highlight=False)
    console.print(f"Results: {out / 'results.json'}\nReport: {out / 'report.html'}", highlight=False)
