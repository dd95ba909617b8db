"""Times what every method packs, beside BiDense, interleaved in one process: single layers and a network.

    python benchmarks/methods.py --out benchmarks/results/methods.json

A layer is convolution (or linear layer), BatchNorm and ReLU as the method rewrites them: what its authors have around it is
part of the time. Where something is left outside of the packed layer (the network's own ReLU), that layer is timed alone too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# glibc is told to keep freed memory: otherwise whichever method runs next pays the page faults of the one before.
KEEP = {
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
}
LAYERS = ("3x3 256->256 at 64x64", "3x3 64->64 at 128x128", "linear 4096x384->1536")


def packed_layer(case: Any, method: str) -> tuple[Any, Any]:
    """A case's layer as ``method`` packs it, and its input."""
    import torch

    import bidensify as bd

    torch.manual_seed(0)
    model, _ = case.build()
    x = case.input()
    config = bd.BidensifyConfig(method=method, linear="all", rules=[bd.Rule("0", "binarize")])
    student = bd.bidensify(model, config, example_inputs=x)
    bd.calibrate(student, [x])
    return bd.pack(student.eval()), x


def packed_network(name: str, method: str, size: int) -> tuple[Any, Any]:
    """A network as ``method`` packs it, and an image."""
    import torch

    import bidensify as bd
    from bidensify.models import build_model

    torch.manual_seed(0)
    x = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    model = build_model(name, classes=11).eval().to(memory_format=torch.channels_last)
    student = bd.bidensify(model, method=method, example_inputs=x)
    bd.calibrate(student, [x])
    return bd.pack(student.eval()), x


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="by default all")
    parser.add_argument("--layers", nargs="*", default=LAYERS)
    parser.add_argument("--network", default="smp:Unet/resnet34", help="'' for none")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="for each layer and for the network, all methods together"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEEP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})

    import functools

    import torch
    from torch import nn

    import bidensify as bd
    from bidensify._util.files import atomic_write
    from bidensify.bench.cases import CASES
    from bidensify.bench.timing import interleave, machine, threads
    from bidensify.methods import get_method

    methods = arguments.methods or bd.available_methods()
    makers: dict[str, Any] = {
        case.name: functools.partial(packed_layer, case) for case in CASES if case.name in arguments.layers
    }
    kinds = {case.name: "linear" if case.kind == "linear" else "conv2d" for case in CASES}
    if arguments.network:
        makers[arguments.network] = lambda method: packed_network(arguments.network, method, arguments.size)
    rows: list[dict[str, Any]] = []
    for name, make in makers.items():
        kind = kinds.get(name, "conv2d")
        # Twice, to say how far two equal ones are apart in the same run.
        names = ["bidense", *(m for m in methods if m != "bidense" and get_method(m).takes(kind)), "bidense again"]
        made = {method: make(method.removesuffix(" again")) for method in names}
        calls = {method: functools.partial(module, x) for method, (module, x) in made.items()}
        for method, (module, x) in made.items():
            if isinstance(module, nn.Sequential) and not all(isinstance(part, nn.Identity) for part in module[1:]):
                calls[f"{method}, packed layer alone"] = functools.partial(module[0], x)
        with threads(arguments.threads), torch.inference_mode():
            timing = interleave(calls, seconds=arguments.seconds)
        base = timing.milliseconds["bidense"]
        found = {"rounds": timing.rounds, "others": timing.others, "milliseconds": timing.milliseconds}
        rows.append({"what": name, **found})
        print(f"\n{name} ({timing.rounds} rounds, other programs {timing.others or 0:.2f} of a core)\n")
        print("| method | ms | to bidense |\n|---|---|---|")
        for method, ms in timing.milliseconds.items():
            print(f"| {method} | {ms:.3f} | {ms / base:.2f} |", flush=True)
    if arguments.out is not None:
        result = {"machine": machine(), "threads": arguments.threads, "size": arguments.size, "rows": rows}
        with atomic_write(arguments.out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
