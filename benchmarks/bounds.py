"""How near packed layers come to what this machine's memory and popcounts allow, one thread.

    python benchmarks/bounds.py

The bound of a layer: x is read twice (its mean; its bits and distances), then popcounts run beside the last pass, which reads
what the bypass takes of x and writes y: 2 reads + max(popcounts, read + write). Reading and writing are measured on tensors of
the layer's own size (a sum; a fill of memory that the kernel library keeps), popcounts as the multiply-accumulates of a layer
that does little else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bidensify.bench.cases import CASES, Case
from bidensify.bench.timing import interleave, machine, threads
from bidensify.deploy.freeze import freeze
from bidensify.kernels import memory

SHAPES = (
    *(case for case in CASES if not case.name.startswith(("transposed", "3x3/2", "3x3 512"))),
    Case("1x1 64->256 at 128x128", "conv", (1, 64, 128, 128), 256),
    Case("3x3 16->16 at 192x256", "conv", (1, 16, 192, 256), 16, 3, 1, 1),
    Case("linear 16384x256->1024", "linear", (1, 16384, 256), 1024),
)
POPCOUNTS = Case("3x3 1024->1024 at 16x16", "conv", (1, 1024, 16, 16), 1024, 3, 1, 1)


def median(call: Callable[[], Any], count: int = 15) -> float:
    """Milliseconds."""
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def macs(case: Case, y: Tensor) -> int:
    """Binary multiply-accumulates."""
    channels = case.shape[-1] if case.kind == "linear" else case.shape[1]
    return y.numel() * (channels // case.groups) * case.kernel**2


def measure(case: Case, rate: float, seconds: float) -> dict[str, Any]:
    """One row; ``rate`` in multiply-accumulates per millisecond."""
    floats, latent = case.build()
    packed, x = freeze(latent), case.input()
    y = packed(x)
    timing = interleave({"float": partial(floats, x), "packed": partial(packed, x)}, seconds=seconds)
    flat = x.flatten() if case.kind == "linear" else x.permute(0, 2, 3, 1).flatten()
    out = memory.empty((1, 1, 1, y.numel()), torch.float32)
    read, write = median(flat.sum), median(partial(out.fill_, 1.0))
    # A layer that widens repeats x, one that narrows reads all of it.
    popcounts = macs(case, y) / rate
    bound = 2 * read + max(popcounts, read + write)
    return {
        "layer": case.name,
        "float": timing.milliseconds["float"],
        "packed": timing.milliseconds["packed"],
        "read x": read,
        "write y": write,
        "popcounts": popcounts,
        "bound": bound,
        "packed / bound": timing.milliseconds["packed"] / bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with threads(1), torch.inference_mode():
        layer, x = freeze(POPCOUNTS.build()[1]), POPCOUNTS.input()
        rate = macs(POPCOUNTS, layer(x)) / median(partial(layer, x))
        rows = [measure(case, rate, arguments.seconds) for case in SHAPES]
    if arguments.out is not None:
        arguments.out.write_text(
            json.dumps({"machine": machine(), "macs per ms": rate, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
    print(f"{machine()['processor']}: {rate / 1e6:.0f} binary GMAC/s of one core\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else v for v in row.values()) + " |")


if __name__ == "__main__":
    main()
