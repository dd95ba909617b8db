"""Does data loading keep up? Images a second of the loader alone beside the training rate of U-Net ResNet-34, at 480x480.

    python benchmarks/loading.py --root CAMVID                        # the table
    python benchmarks/loading.py --root CAMVID --output loading.json  # and the figures as JSON

CamVid's files (JPEG of 480x360 and PNG) with the recipe's augmentation, read anew (``cache: false``), by as many workers as
threads train. The two are not run at once: what matters is that batches are there before they are needed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from bidensify._util.machine import cpu_name
from bidensify.recipe import Recipe, load_recipe
from bidensify.tasks import Task
from bidensify.train.distributed import make_accelerator
from bidensify.train.loaders import training_loader
from bidensify.train.run import build_student
from bidensify.train.stages import set_mode
from bidensify.train.step import stage_step

RECIPE = Path(__file__).parents[1] / "recipes" / "camvid_unet_resnet34.yaml"


def loader_rate(recipe: Recipe, seconds: float) -> float:
    """Images a second that come out of the training loader, the start of its workers not counted."""
    train = recipe.build_dataset("train")
    done, start = 0, 0.0
    for epoch in range(1000):
        for batch in training_loader(train, recipe, epoch):
            if not start:
                start = time.perf_counter()
                continue
            done += len(batch["image"])
            if time.perf_counter() - start > seconds:
                return done / (time.perf_counter() - start)
    raise AssertionError("the loader gave nothing")


def training_rate(recipe: Recipe, role: str, steps: int) -> float:
    """Images a second of optimizer steps on one batch that is there already, the first step not counted."""
    loaded = recipe if role == "student" else recipe.for_teacher()
    teacher = loaded.build_model()
    # Recorded on a small image: the rewrite is the same, and sooner there.
    network = build_student(load_recipe(loaded, ["data.size=[96,96]"]), teacher) if role == "student" else teacher
    if loaded.channels_last:
        network, teacher = (model.to(memory_format=torch.channels_last) for model in (network, teacher))  # type: ignore[call-overload]
    train = loaded.build_dataset("train")
    task: Task = loaded.build_task(train.info)
    batch = next(iter(training_loader(train, loaded, 0)))
    accelerator, stage = make_accelerator(loaded), loaded.stages[-1]
    set_mode(network, stage)
    times = []
    with stage_step(
        network,
        teacher.eval() if role == "student" else None,
        stage,
        task,
        recipe=loaded,
        accelerator=accelerator,
        state=None,
    ) as step:
        for _ in range(steps + 1):
            start = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - start)
    return loaded.data.batch_size * steps / sum(times[1:])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="CamVid as the recipe has it: {train,val}/{images,labels}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="of the loader")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--roles", nargs="*", default=["teacher", "student"], help="which networks train")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    changes = [f"data.root={options.root}", "data.size=[480,480]", f"data.batch_size={options.batch}", "device=cpu"]
    changes += [f"data.workers={options.threads}", "data.train.cache=false", "data.val.cache=false"]
    recipe = load_recipe(RECIPE, changes)
    rates: dict[str, float] = {}
    figures = {
        "processor": cpu_name(),
        "torch": torch.__version__,
        "threads": options.threads,
        "images_per_second": rates,
    }
    alone = load_recipe(recipe, ["data.workers=0"])
    print("| what | images/s | the loader gives |\n|---|---:|---:|", flush=True)
    for name in ("loader", *options.roles):
        rate = loader_rate(recipe, options.seconds) if name == "loader" else training_rate(alone, name, options.steps)
        rates[name] = round(rate, 2)
        print(f"| {name} | {rate:.2f} | {rates['loader'] / rate:.1f} times as many |", flush=True)
        if options.output:
            options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
