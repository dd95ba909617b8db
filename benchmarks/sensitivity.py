"""How well the forecast of ``bidensify.sensitivity`` tells what a layer gains in float once the network is trained that way.

    python benchmarks/sensitivity.py --run runs/ablation/default-0 --teacher runs/ablation/teacher --out runs/sensitivity

For every binary layer of a trained student: the network is rewritten with that layer kept in float and trained for a few steps
from the teacher's weights, calibrated, as is the network with all layers binary. What the one ends with above the other is what
the layer gained. (``--start student`` takes the trained student's weights everywhere else instead: that measures how much a
student that has learned from the signs is disturbed, and every layer loses.) Writes the forecasts, a file per training (one that
is there is read), and ``sensitivity.md`` with rank correlations, and ``sensitivity.png``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import bidensify as bd
from bidensify._util.files import atomic_write
from bidensify._util.machine import cpu_name
from bidensify.data import Seeded
from bidensify.data.batches import collate
from bidensify.losses.terms import kl_loss
from bidensify.nn import binary_layers
from bidensify.precisions import Sensitivity
from bidensify.recipe import Recipe
from bidensify.train import build_student, build_teacher, load_run

BATCH = 16


class Data:
    """Images, labels and the teacher's logits, in memory: every fine-tuning sees the same."""

    def __init__(self, recipe: Recipe, teacher: nn.Module, file: Path, train: int, val: int) -> None:
        if not file.is_file():
            sets = recipe.build_datasets()
            self.parts: dict[str, Tensor] = {}
            for name, dataset, count in (("train", Seeded(sets[0], recipe.seed), train), ("val", sets[1], val)):
                batch = collate([dataset[index] for index in range(min(count, len(dataset)))])
                with torch.no_grad():
                    logits = torch.cat([teacher(x) for x in batch["image"].split(BATCH)])
                self.parts |= {f"{name}.image": batch["image"], f"{name}.mask": batch["mask"], f"{name}.logits": logits}
            with atomic_write(file) as temporary:
                torch.save(self.parts, temporary)
        self.parts = torch.load(file, weights_only=True)

    def take(self, name: str, index: Tensor) -> dict[str, Tensor]:
        """Some samples as a batch."""
        found = {key: self.parts[f"{name}.{key}"][index] for key in ("image", "mask", "logits")}
        return {**found, "image": found["image"].contiguous(memory_format=torch.channels_last)}

    def count(self, name: str) -> int:
        """How many samples."""
        return len(self.parts[f"{name}.image"])

    def images(self, batches: int) -> list[Tensor]:
        """Training images in batches."""
        return [self.take("train", torch.arange(n * BATCH, (n + 1) * BATCH))["image"] for n in range(batches)]


def measured(student: nn.Module, data: Data, task: Any) -> tuple[float, float]:
    """(mIoU, KL to the teacher) on the validation images."""
    metrics, total = task.metrics(), 0.0
    with torch.no_grad():
        for index in torch.arange(data.count("val")).split(BATCH):
            batch = data.take("val", index)
            output = student(batch["image"])
            metrics.update(output, batch)
            total += len(index) * float(kl_loss(output, batch["logits"]))
    return metrics.compute()[task.primary], total / data.count("val")


def tuned(
    path: str | None,
    seed: int,
    trained: nn.Module,
    teacher: nn.Module,
    recipe: Recipe,
    data: Data,
    steps: int,
    lr: float,
    start: str,
) -> dict[str, Any]:
    """One training with the layer ``path`` in float (None: with all layers binary)."""
    base = recipe.config()
    rules = (bd.Rule(path, "keep"), *base.rules) if path else base.rules
    student = build_student(recipe, teacher, config=bd.BidensifyConfig(**{**base.__dict__, "rules": rules}))
    own, theirs = student.state_dict(), trained.state_dict() if start == "student" else {}
    taken = {key: value for key, value in theirs.items() if key in own and own[key].shape == value.shape}
    student.load_state_dict(
        {**own, **{key: value for key, value in taken.items() if not (path and key.startswith(f"{path}."))}}
    )
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    bd.calibrate(student, data.images(4), thresholds=start == "teacher")
    task = recipe.build_task()
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0)
    order = torch.randperm(data.count("train"), generator=torch.Generator().manual_seed(seed))
    student.train()
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / 4) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = data.take("train", order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)])
        output = student(batch["image"])
        loss = task.loss(output, batch) + kl_loss(output, batch["logits"], 2.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
    bd.calibrate(student, data.images(8), thresholds=False)
    metric, kl = measured(student.eval(), data, task)
    return {"path": path, "seed": seed, "metric": metric, "kl": kl}


def main() -> None:
    """Forecasts, fine-tunings, correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished student's run folder")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/sensitivity"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--start", choices=("teacher", "student"), default="teacher")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--train", type=int, default=480)
    parser.add_argument("--val", type=int, default=160)
    parser.add_argument(
        "--part", type=int, nargs=2, default=[0, 1], metavar=("I", "N"), help="every N-th layer from I on"
    )
    arguments = parser.parse_args()
    trained, recipe = load_run(arguments.run, trust=True)
    teacher = build_teacher(recipe, arguments.teacher)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = Data(recipe, teacher, arguments.out / "data.pt", arguments.train, arguments.val)
    samples = [{"image": image, "mask": mask} for image, mask in zip(data.parts["val.image"], data.parts["val.mask"])]
    forecasts = {
        around: bd.sensitivity(
            trained,
            samples,
            teacher,
            task=recipe.build_task(),
            around=around,
            calibration=data.images(4),
            batch_size=BATCH,
            channels_last=True,
            trained=True,
            cache=arguments.out / f"sensitivity_{around}.json",
        )
        for around in ("teacher", "student")
    }
    folder = arguments.out / f"from_{arguments.start}"
    tasks = [(path, seed) for seed in arguments.seeds for path in [None, *(path for path, _ in binary_layers(trained))]]
    for path, seed in tasks[arguments.part[0] :: arguments.part[1]]:
        file = folder / f"{path or 'none'}-{seed}.json"
        if not file.is_file():
            row = tuned(path, seed, trained, teacher, recipe, data, arguments.steps, arguments.lr, arguments.start)
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(row))
            print(row, flush=True)
    report(forecasts, arguments.out, folder, arguments.seeds)


def report(forecasts: dict[str, Sensitivity], out: Path, folder: Path, seeds: list[int]) -> None:
    """``sensitivity.md`` and ``sensitivity.png`` of the layers that every seed has."""
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    base = {row["seed"]: row for row in rows if row["path"] is None}
    gains: dict[str, tuple[float, float]] = {}
    for layer in forecasts["teacher"].layers:
        own = [row for row in rows if row["path"] == layer.name and row["seed"] in base and row["seed"] in seeds]
        if len(own) == len(seeds):
            metric = sum(row["metric"] - base[row["seed"]]["metric"] for row in own) / len(own)
            kl = sum(base[row["seed"]]["kl"] - row["kl"] for row in own) / len(own)
            gains[layer.name] = metric, kl
    if len(gains) < 3:
        print(f"{len(gains)} layers are trained: too few to correlate")
        return
    by_name = {around: {row.name: row for row in found.layers} for around, found in forecasts.items()}
    columns = {
        f"{around}, {by}": [found.gain(by_name[around][name], "float", "metric" if by == found.metric else "distance")
                            for name in gains]
        for around, found in forecasts.items()
        for by in (found.metric, "kl")
    }  # fmt: skip
    columns |= {f"student, |{by}|": [abs(value) for value in columns[f"student, {by}"]] for by in ("miou", "kl")}
    metric, kl = ([gain[n] for gain in gains.values()] for n in (0, 1))
    lines = [
        f"{len(gains)} layers, {len(seeds)} seed(s), {cpu_name()}", "",
        "| forecast | Spearman with the gain in KL | in mIoU |", "| --- | ---: | ---: |",
        *(f"| {name} | {spearmanr(values, kl).statistic:+.2f} | {spearmanr(values, metric).statistic:+.2f} |"
          for name, values in columns.items()),
        "", f"| layer | gain in mIoU | gain in KL | {' | '.join(columns)} |", f"| --- |{' ---: |' * (2 + len(columns))}",
        *(f"| {name} | {gain[0]:+.4f} | {gain[1]:+.4f} | {' | '.join(f'{values[n]:+.4f}' for values in columns.values())} |"
          for n, (name, gain) in enumerate(gains.items())), "",
    ]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    with atomic_write(out / "sensitivity.md") as temporary:
        temporary.write_text(text)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, (name, truth) in zip(figure.subplots(1, 2), (("kl", kl), ("miou", metric))):
        axis.scatter(columns[f"teacher, {name}"], truth, s=14)
        axis.set_xlabel(f"forecast: {name} lost by this layer alone in binary")
        axis.set_ylabel(f"{name} gained by float, trained")
    figure.savefig(out / "sensitivity.png", dpi=120)


if __name__ == "__main__":
    main()
