"""What the rewrite's new parts start from, and what that does to the scale of each stage.

    python benchmarks/starts.py                       # the networks of which the scale is asked: benchmarks/results/starts.json
    python benchmarks/starts.py --only 'transformers:*'

Each variant changes the start of an untrained rewrite afterwards: the activations' last shift, the norms' weights. The figures
are ``zoo.stages.ratios``: standard deviations of stages against the original's.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from zoo import stages  # noqa: E402
from zoo.networks import Entry, networks, strict  # noqa: E402
from zoo.subject import Subject  # noqa: E402

from bidensify._util.files import atomic_write  # noqa: E402
from bidensify._util.machine import cpu_name  # noqa: E402
from bidensify.nn import RPReLU, binary_layers  # noqa: E402
from bidensify.rewrite import Plan  # noqa: E402
from bidensify.rewrite.plan.entries import LayerPlan  # noqa: E402

RESULTS = HERE / "results" / "starts.json"


@dataclass(frozen=True)
class Start:
    """A start of the new parts: whether activations are centred, and a factor on each norm's weight."""

    text: str
    centred: bool = True
    gain: Callable[[LayerPlan], float] = lambda layer: 1.0


def _unit_power(layer: LayerPlan) -> float:
    """What takes a new norm's weight from inputs behind a ReLU to inputs of unit power."""
    return 1.0 if layer.norm is not None else math.sqrt(2)


def _every_tap(layer: LayerPlan) -> float:
    """The same, with all taps of a transposed convolution counted for each output."""
    transposed = layer.norm is None and layer.kind.startswith("conv_transpose")
    return _unit_power(layer) * (math.sqrt(math.prod(layer.stride)) if transposed else 1.0)


STARTS: dict[str, Start] = {
    "default": Start("centred activations, new norms for inputs behind a ReLU"),
    "unit power": Start("centred, new norms for inputs of unit power", gain=_unit_power),
    "uncentred": Start("last shifts 0, new norms for inputs behind a ReLU", centred=False),
    "plain": Start("last shifts 0, new norms for inputs of unit power, every tap", centred=False, gain=_every_tap),
    "plain, branches x 0.71": Start(
        "and every norm's weight times 0.71", centred=False, gain=lambda layer: _unit_power(layer) * math.sqrt(0.5)
    ),
    "plain, branches x 0.5": Start(
        "and every norm's weight times 0.5", centred=False, gain=lambda layer: _unit_power(layer) * 0.5
    ),
    "plain, branches x 0.3": Start(
        "and every norm's weight times 0.3", centred=False, gain=lambda layer: _unit_power(layer) * 0.3
    ),
}


def started(student: nn.Module, plan: Plan, start: Start) -> nn.Module:
    """A copy of an untrained rewrite with another start."""
    twin = copy.deepcopy(student)
    layers = {layer.path: layer for layer in plan.binary}
    with torch.no_grad():
        for path, layer in binary_layers(twin):
            if isinstance(layer.norm, nn.Module) and isinstance(layer.norm.weight, torch.Tensor):
                layer.norm.weight.mul_(start.gain(layers[path]))
        for module in twin.modules():
            if isinstance(module, RPReLU) and not start.centred:
                module.bias_out.zero_()
    return twin


def measure(entry: Entry) -> dict[str, Any] | None:
    """Start -> [lowest, highest, mean magnitude of log2] of the stages' ratios; None for what does not run or has no stage."""
    try:
        subject = Subject(entry)
        subject.convert()
    except Exception:
        return None
    found = {}
    for name, start in STARTS.items():
        twin = started(subject.student, subject.plan, start)
        values = list(stages.ratios(subject.model, twin, subject.plan, subject.run).values())
        if not values:
            return None
        distance = statistics.mean(abs(math.log2(max(value, 1e-9))) for value in values)
        found[name] = [round(min(values), 3), round(max(values), 3), round(distance, 3)]
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: per start, how many networks are within a factor of 4, the extremes, and the mean distance."""
    lines = [
        f"| start | within ×4, of {len(rows)} | lowest | median of the highest | mean distance, powers of 2 |",
        "|---|---|---|---|---|",
    ]
    for name, start in STARTS.items():
        own = [row[name] for row in rows.values()]
        lines.append(
            f"| {name}: {start.text} | {sum(low >= 0.25 and high <= 4 for low, high, _ in own)} | "
            f"{min(row[0] for row in own):.2f} | {statistics.median(row[1] for row in own):.2f} | "
            f"{statistics.mean(row[2] for row in own):.2f} |"
        )
    return "\n".join(lines)


def main(
    only: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="These networks instead; repeat for more.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The file of results.")] = RESULTS,
) -> None:
    """Measures every start on each network."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for name, entry in networks().items():
        chosen = any(fnmatch.fnmatchcase(name, glob) for glob in only) if only else strict(name, "scale")
        if entry.unavailable or not chosen:
            continue
        row = measure(entry)
        if row is None:
            continue
        rows[name] = row
        print(name, *(f"{key} {low:.2f}-{high:.2f}" for key, (low, high, _) in row.items()), sep="; ", flush=True)
        data = {"cpu": cpu_name(), "torch": torch.__version__, "networks": rows}
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
