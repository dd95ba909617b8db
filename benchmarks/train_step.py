"""Training step of a full-precision network and of its BiDense student, side by side.

    python benchmarks/train_step.py                      # the table, and the figures as JSON with --output
    BIDENSIFY_TRAIN_KERNELS=0 python benchmarks/train_step.py    # the same in torch operations alone

A step is forward, cross-entropy, backward and AdamW. The two networks take turns within each round, so that whatever
else slows the machine slows both; the ratio is the median over rounds of (student's time / full-precision time).
``--memory`` measures the peak of each network's resident memory in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify._util.machine import cpu_name

FORMATS = {"plain": torch.contiguous_format, "channels_last": torch.channels_last}


def networks(source: str, size: tuple[int, int]) -> dict[str, nn.Module]:
    """The full-precision network and its student, in training mode."""
    import bidensify
    from bidensify.models import build_model

    torch.manual_seed(0)
    options: dict[str, Any] = {"classes": 11, "encoder_weights": None} if source.startswith("smp:") else {}
    options = {"num_classes": 11} if source.startswith("demo:") else options
    full = build_model(source, **options)
    # The rewrite is the same for every input size; a small one is recorded sooner.
    example = torch.zeros(1, 3, *(min(side, 96) for side in size))
    return {"full precision": full.train(), "student": bidensify.bidensify(full, example_inputs=example).train()}


def logits(output: Any) -> Tensor:
    """The tensor of class scores in whatever the network gives."""
    return output["out"] if isinstance(output, dict) else output


def make_step(model: nn.Module, x: Tensor, target: Tensor, dtype: str) -> Callable[[], None]:
    """One training step on a fixed batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = nn.functional.cross_entropy(logits(model(x)).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batch(arguments: argparse.Namespace, form: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(arguments.batch, 3, *arguments.size, generator=generator)
    target = torch.randint(0, 11, (arguments.batch, *arguments.size), generator=generator)
    return x.contiguous(memory_format=FORMATS[form]), target


def compare(arguments: argparse.Namespace, pair: dict[str, nn.Module], form: str, dtype: str) -> dict[str, Any]:
    """Interleaved timing of one memory format and precision."""
    x, target = batch(arguments, form)
    steps = {name: make_step(model.to(memory_format=FORMATS[form]), x, target, dtype) for name, model in pair.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.warmup + arguments.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= arguments.warmup:
                times[name].append(time.perf_counter() - start)
    full, student = times["full precision"], times["student"]
    ratios = sorted(s / f for f, s in zip(full, student))
    return {
        "format": form,
        "dtype": dtype,
        "full_ms": statistics.median(full) * 1e3,
        "student_ms": statistics.median(student) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
        "ratio_of_best": min(student) / min(full),
        "rounds": arguments.rounds,
    }


def peak(arguments: argparse.Namespace, form: str, dtype: str, name: str) -> float:
    """Peak resident memory of this process (MiB) above what it held before the first step, for three steps."""
    x, target = batch(arguments, form)
    model = networks(arguments.model, arguments.size)[name].to(memory_format=FORMATS[form])
    step = make_step(model, x, target, dtype)
    # What building the networks took is not the step's: the peak is counted from the current level on Linux.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident()
    for _ in range(3):
        step()
    high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(high.split()[1]) / 1024 - before


def resident() -> float:
    """Resident memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def peaks(arguments: argparse.Namespace, form: str, dtype: str) -> dict[str, float]:
    """``peak`` of both networks, each in a process of its own."""
    found = {}
    for name in ("full precision", "student"):
        command = [
            sys.executable,
            __file__,
            "--model",
            arguments.model,
            "--batch",
            str(arguments.batch),
            "--peak",
            name,
        ]
        command += ["--size", *map(str, arguments.size), "--threads", str(arguments.threads)]
        command += ["--formats", form, "--dtypes", dtype]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = float(output.split()[-1])
    return found


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{results['model']}, batch {results['batch']} x 3 x {results['size'][0]} x {results['size'][1]}"
    )
    for column in ("format", "dtype", "full precision", "student", "ratio", "quartiles", "peak, full", "peak, student"):
        table.add_column(column, justify="left" if column in ("format", "dtype") else "right")
    for row in results["rows"]:
        memory = row.get("peak_mib", {})
        table.add_row(
            row["format"],
            row["dtype"],
            f"{row['full_ms']:.0f} ms" if "full_ms" in row else "",
            f"{row['student_ms']:.0f} ms" if "student_ms" in row else "",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            "{:.2f}-{:.2f}".format(*row["ratio_quartiles"]) if "ratio_quartiles" in row else "",
            *(f"{memory[name]:.0f} MiB" if memory else "" for name in ("full precision", "student")),
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{results['cpu']}, {results['threads']} threads, torch {results['torch']}, kernels: {results['kernels']}"
    )


def save(results: dict[str, Any], path: Path | None) -> None:
    """Writes the figures, whole or not at all."""
    if path is not None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smp:Unet/resnet34")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--memory", action="store_true", help="measure peak memory in place of time")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.size = tuple(arguments.size)
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak(arguments, arguments.formats[0], arguments.dtypes[0], arguments.peak))
        return

    from bidensify.kernels.dense import instruction_set

    results: dict[str, Any] = {
        "model": arguments.model,
        "batch": arguments.batch,
        "size": list(arguments.size),
        "threads": arguments.threads,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "kernels": instruction_set(),
        "rows": [],
    }
    pair = {} if arguments.memory else networks(arguments.model, arguments.size)
    for dtype in arguments.dtypes:
        for form in arguments.formats:
            if arguments.memory:
                row = {"format": form, "dtype": dtype, "peak_mib": peaks(arguments, form, dtype)}
            else:
                row = compare(arguments, pair, form, dtype)
            results["rows"].append(row)
            # Each row is kept as soon as it is there.
            save(results, arguments.output)
    show(results)


if __name__ == "__main__":
    main()
