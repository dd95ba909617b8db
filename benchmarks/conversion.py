"""Time and memory of a conversion: ``bidensify(model)`` as it is called, check included, each network in a process of its own.

    python benchmarks/conversion.py                          # the table
    python benchmarks/conversion.py --output figures.json    # and the figures as JSON
    python benchmarks/conversion.py timm:hrnet_w18           # one network

Memory is the highest resident size during the conversion over that before it, as a multiple of the network's own
parameters and buffers: the converted copy is one of it, what the conversion needs besides is the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import torch
from children import in_child

from bidensify._util.machine import cpu_name

SOURCES: dict[str, dict[str, Any]] = {
    "smp:UPerNet/tu-convnext_tiny": {"encoder_weights": None, "classes": 19},
    "smp:Unet/efficientnet-b0": {"encoder_weights": None, "classes": 19},
    "timm:hrnet_w18": {},
    "timm:convnext_xlarge": {},
    "smp:DPT/tu-vit_large_patch16_224": {"encoder_weights": None, "classes": 19},
}


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(source: str) -> dict[str, Any]:
    """Converts one network in this process."""
    import bidensify
    from bidensify.models import build_model

    torch.set_num_threads(1)
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 1))
    # What the first conversion of a process imports is not this network's.
    bidensify.bidensify(small)
    model = build_model(source, **SOURCES.get(source, {}))
    own = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    start = time.perf_counter()
    student = bidensify.bidensify(model)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    plan = student.bidensify_plan
    del student
    gc.collect()
    tracemalloc.start()
    bidensify.plan(model)
    python = tracemalloc.get_traced_memory()[1]
    return {
        "network": source,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(plan.layers),
        "binary": len(plan.binary),
        "seconds": round(seconds, 2),
        "model_mib": round(own / 2**20, 1),
        "extra_mib": round(peak / 2**20, 1),
        "extra_of_model": round(peak / own, 3),
        "python_mib": round(python / 2**20, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    head = "| network | parameters | layers, binary | conversion, one thread | extra memory | of the model |"
    lines = [head, "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['network']} | {row['parameters'] / 1e6:.1f} M | {row['layers']}, {row['binary']} | {row['seconds']:.1f} s | "
        f"{row['extra_mib']:.0f} MiB | {row['extra_of_model']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help=f"by default {', '.join(SOURCES)}")
    parser.add_argument("--output", type=Path, help="JSON; networks that it holds already are replaced")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.sources[0])))
        return
    rows: dict[str, dict[str, Any]] = {}
    if options.output and options.output.is_file():
        rows = {row["network"]: row for row in json.loads(options.output.read_text(encoding="utf-8"))["rows"]}
    for source in options.sources or SOURCES:
        rows[source] = in_child(__file__, source)
        print(json.dumps(rows[source]), flush=True)
        if options.output:
            figures = {"processor": cpu_name(), "torch": torch.__version__, "rows": list(rows.values())}
            options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"{cpu_name()}, torch {torch.__version__}\n\n{table(list(rows.values()))}")


if __name__ == "__main__":
    main()
