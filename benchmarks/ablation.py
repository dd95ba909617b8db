"""The ablation behind the defaults: one choice changed at a time, every variant with the same budget.

    python benchmarks/ablation.py --out runs/ablation

Trains one full-precision teacher on the generated scenes, then every variant from it for each seed, and writes
``ablation.json`` and a Markdown table. A run that is there already is read, one that was stopped is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

import bidensify as bd
from bidensify._util.files import atomic_write
from bidensify._util.machine import cpu_name
from bidensify.methods import LayerParts, LayerSpec, get_method
from bidensify.nn import RPReLU, WeightBinarizer
from bidensify.recipe import load_recipe
from bidensify.train.run import run_recipe

HERE = Path(__file__).parent
KL = {"weight": 1.0, "temperature": 2.0}
CWD = {"weight": 0.02, "temperature": 4.0}


def stages(both: dict[str, Any], *, one: bool = False, epochs: tuple[int, int] = (4, 10)) -> list[dict[str, Any]]:
    """The two default stages with the same losses, or one stage of the same total length."""
    second = {"name": "all", "binarize": "all", "epochs": epochs[1], "lr": 2.0e-3, "schedule": "cosine", "losses": both}
    if one:
        return [{**second, "epochs": sum(epochs)}]
    first = {"name": "activations", "binarize": "activations", "epochs": epochs[0], "lr": 3.0e-3, "losses": both}
    return [first, second]


@bd.register_method(
    "bidense-unscaled", activation=RPReLU, bypass="all", activation_first=True, citation="the authors' code of BiDense"
)
def bidense_unscaled(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
    """BiDense with the authors' estimator of the weights' sign: 1[|w| <= 1] without the factor s_o."""
    parts = get_method("bidense").parts(spec, config)
    weights = WeightBinarizer(transposed=spec.transposed, groups=spec.groups, ste_scaled=False)
    return LayerParts(parts.binarizer, weights)


TASK_KL = {"task": 1.0, "kl": KL}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("the defaults: rule on, per_tensor, two stages, task + KL", {}),
    "residual keep": ("adds always stay, the last layer drops its bypass", {"binarize": {"residual": "keep"}}),
    "residual off": ("rule off: adds stay and every bypass too", {"binarize": {"residual": "double"}}),
    "act_scale per_channel": ("one scale per channel (cannot be packed)", {"binarize": {"act_scale": "per_channel"}}),
    "act_scale none": ("no activation scale", {"binarize": {"act_scale": "none"}}),
    "act_bits 2": ("activations of two bits", {"binarize": {"act_bits": 2}}),
    "one stage": ("weights and activations binarized at once", {"stages": stages(TASK_KL, one=True)}),
    "task only": ("no distillation", {"stages": stages({"task": 1.0})}),
    "KL only": ("no task loss", {"stages": stages({"task": None, "kl": KL})}),
    "task + CWD": ("channel-wise distillation instead of KL", {"stages": stages({"task": 1.0, "cwd": CWD})}),
    "task + KL + CWD": ("both", {"stages": stages({**TASK_KL, "cwd": CWD})}),
    "task + KL + features": (
        "attention maps of the decoder's blocks matched too",
        {
            "stages": stages(
                {**TASK_KL, "features": {"weight": 1.0, "kind": "attention", "layers": ["decoder.0", "decoder.1"]}}
            )
        },
    ),
    "the paper's order": ("the bypass joins before the activation", {"binarize": {"method": "bidense-in-paper"}}),
    "bnn": ("the method bnn under the same recipe", {"binarize": {"method": "bnn"}}),
    "unscaled STE": ("the weights' gradient not multiplied by s_o", {"binarize": {"method": "bidense-unscaled"}}),
}


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    file = folder / "result.json"
    return json.loads(file.read_text()) if file.is_file() else None


def score(folder: Path, recipe: Any, role: str, teacher: Path | None, primary: str) -> float:
    """Runs (or resumes, or reads) one run and returns its primary metric."""
    if finished(folder) is None:
        run_recipe(recipe, folder, role=role, teacher_weights=teacher, resume=folder.exists(), quiet=True)
    result = finished(folder)
    assert result is not None
    return float(result["metrics"][primary])


def main() -> None:
    """Runs the variants and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=HERE / "recipes" / "ablation_scenes.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH=VALUE")
    arguments = parser.parse_args()
    base = load_recipe(arguments.recipe, arguments.set).to_dict()
    primary = load_recipe(base).build_task().primary
    teacher = arguments.out / "teacher"
    rows: dict[str, Any] = {}
    reference = score(teacher, load_recipe(base), "teacher", None, primary)
    print(f"teacher: {primary} {reference:.4f}", flush=True)
    for name in arguments.only:
        text, changes = VARIANTS[name]
        values = []
        for seed in arguments.seeds:
            data = {**base, "seed": seed, **changes}
            data["binarize"] = {**base["binarize"], **changes.get("binarize", {})}
            folder = arguments.out / f"{name.replace(' ', '_').replace('+', 'and')}-{seed}"
            values.append(score(folder, load_recipe(data), "student", teacher, primary))
        rows[name] = {"text": text, "values": values, "mean": statistics.mean(values)}
        print(f"{name}: {' '.join(f'{value:.4f}' for value in values)}", flush=True)
    write(arguments.out, rows, reference, primary, arguments.seeds)


def write(out: Path, rows: dict[str, Any], reference: float, primary: str, seeds: list[int]) -> None:
    """``ablation.json`` and ``ablation.md``."""
    data = {
        "teacher": reference,
        "primary": primary,
        "seeds": seeds,
        "variants": rows,
        "cpu": cpu_name(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "torch": torch.__version__,
    }
    with atomic_write(out / "ablation.json") as temporary:
        temporary.write_text(json.dumps(data, indent=1))
    default = rows.get("default", {}).get("mean")
    lines = [
        f"| variant | what it changes | {primary}, seeds {seeds} | mean | against the default |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        delta = "" if default is None else f"{100 * (row['mean'] - default):+.1f}"
        values = " ".join(f"{100 * value:.1f}" for value in row["values"])
        lines.append(f"| {name} | {row['text']} | {values} | {100 * row['mean']:.1f} | {delta} |")
    lines.append(f"\nTeacher: {100 * reference:.1f}.\n")
    with atomic_write(out / "ablation.md") as temporary:
        temporary.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
