"""What moves accuracy per minute of training: one lever at a time, under the ablation's protocol.

    python benchmarks/levers.py --out runs/levers --seeds 0 --only "lr 6e-3" "branches x 0.5"
    python benchmarks/levers.py --out runs/levers --table          # what is there: levers.json and a Markdown table

Recipe, teacher and default are those of ``ablation.py``, and so is the length of every run unless its text says otherwise. A
run that is there already is read, one that was stopped is resumed. A lever is a change of the recipe, or code of its own
beside this file: another start of the student, something after each step, another data set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from ablation import finished, score  # noqa: E402
from lever_list import LEVERS, Lever  # noqa: E402

from bidensify._util.files import atomic_write  # noqa: E402
from bidensify._util.machine import cpu_name  # noqa: E402
from bidensify.recipe import load_recipe  # noqa: E402
from bidensify.train import build_student, build_teacher, finetune  # noqa: E402


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where a lever's run is."""
    kept = "".join(each if each.isalnum() or each in ".-" else "_" for each in name)
    return out / f"{kept}-{seed}"


def train(lever: Lever, base: dict[str, Any], seed: int, folder: Path, teacher_folder: Path) -> None:
    """One run, as ``run_recipe`` has it, with what the lever adds."""
    changes = (f"{path}={json.dumps(value)}" for path, value in lever.recipe.items())
    recipe = load_recipe(base, [f"seed={seed}", *changes])
    data, val = recipe.build_datasets()
    teacher = build_teacher(recipe, teacher_folder)
    student = build_student(recipe, teacher)
    if lever.start is not None:
        lever.start(student)
    hooks = []
    if lever.after_step is not None:
        after: Callable[[], None] = lever.after_step(student)
        hooks.append(register_optimizer_step_post_hook(lambda *unused: after()))
    try:
        finetune(
            student, teacher=teacher, recipe=recipe, train=data if lever.data is None else lever.data(data), val=val,
            run_dir=folder, resume=folder.exists(), quiet=True,
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()


def minutes(folder: Path) -> float:
    """Of the training itself."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return sum(line["seconds"] for line in lines if line["kind"] == "epoch") / 60


def table(out: Path, primary: str, reference: float) -> None:
    """``levers.json`` and ``levers.md`` of what has been run."""
    rows: dict[str, Any] = {}
    for name, lever in LEVERS.items():
        found = {seed: finished(folder_of(out, name, seed)) for seed in range(10)}
        values = {seed: float(run["metrics"][primary]) for seed, run in found.items() if run is not None}
        if values:
            times = [minutes(folder_of(out, name, seed)) for seed in values]
            rows[name] = {"text": lever.text, "values": values, "minutes": round(statistics.median(times), 2)}
    data = {"teacher": reference, "primary": primary, "levers": rows, "cpu": cpu_name(), "torch": torch.__version__,
            "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))}  # fmt: skip
    with atomic_write(out / "levers.json") as temporary:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    default = rows["default"]["values"]
    lines = [
        f"| lever | what it changes | {primary} %, seed: value | against the default on these seeds |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        own = row["values"]
        delta = statistics.mean(own[seed] for seed in own) - statistics.mean(default[seed] for seed in own)
        shown = ", ".join(f"{seed}: {100 * value:.1f}" for seed, value in own.items())
        lines.append(f"| {name} | {row['text']} | {shown} | {100 * delta:+.1f} |")
    text = "\n".join([*lines, f"\nTeacher: {100 * reference:.1f}.\n"])
    with atomic_write(out / "levers.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Runs the levers, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=HERE / "recipes" / "ablation_scenes.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/levers"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=list(LEVERS), choices=list(LEVERS), metavar="LEVER")
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH=VALUE")
    parser.add_argument("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    base = load_recipe(arguments.recipe, arguments.set).to_dict()
    primary = load_recipe(base).build_task().primary
    teacher = arguments.out / "teacher"
    reference = score(teacher, load_recipe(base), "teacher", None, primary)
    for seed in [] if arguments.table else arguments.seeds:
        for name in arguments.only:
            folder = folder_of(arguments.out, name, seed)
            if finished(folder) is None:
                train(LEVERS[name], base, seed, folder, teacher)
            found = finished(folder)
            assert found is not None
            print(f"{name}, seed {seed}: {100 * found['metrics'][primary]:.2f} ({minutes(folder):.1f} min)", flush=True)
    table(arguments.out, primary, reference)


if __name__ == "__main__":
    main()
