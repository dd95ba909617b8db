"""Memory of packed layers' outputs (``bidensify/kernels/memory.py``) against glibc's and against a preloaded allocator.

    python benchmarks/allocators.py --threads 1 --preload /usr/lib/x86_64-linux-gnu/libjemalloc.so.2

One process per allocator stays alive and they are asked in turn; prints milliseconds and page faults of a run, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

NETWORKS = {
    "U-Net ResNet-34": "smp:Unet/resnet34",
    "UPerNet ConvNeXt-T": "smp:UPerNet/tu-convnext_tiny",
    "FPN ResNet-50": "smp:FPN/resnet50",
}
WORKER = """
import json, resource, sys, time
import torch
import bidensify as bd
from bidensify.kernels import memory
from bidensify.models import build_model
torch.set_num_threads(int(sys.argv[1]))
if sys.argv[2] == "no":
    memory.takes = lambda shape, dtype: False
packed = {name: bd.pack(bd.bidensify(build_model(spec, classes=11).eval())) for name, spec in json.loads(sys.argv[3]).items()}
x = torch.randn(1, 3, 512, 512).contiguous(memory_format=torch.channels_last)
for line in sys.stdin:
    name = json.loads(line)
    with torch.inference_mode():
        packed[name](x)
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for _ in range(2):
            packed[name](x)
        seconds = (time.perf_counter() - start) / 2
    print(json.dumps([seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / 2]), flush=True)
"""


def main() -> None:
    """Compares the allocators."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--preload", nargs="*", default=[], metavar="LIBRARY")
    arguments = parser.parse_args()
    variants = {
        "own": ("yes", ""),
        "glibc": ("no", ""),
        **{Path(each).name: ("no", each) for each in arguments.preload},
    }
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-c", WORKER, str(arguments.threads), own, json.dumps(NETWORKS)], text=True,
            env={**os.environ, "LD_PRELOAD": preload}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for name, (own, preload) in variants.items()
    }  # fmt: skip
    for network in NETWORKS:
        found: dict[str, list[list[float]]] = {name: [] for name in workers}
        for _ in range(arguments.rounds):
            for name, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write(json.dumps(network) + "\n")
                worker.stdin.flush()
                found[name].append(json.loads(worker.stdout.readline()))
        text = ", ".join(
            f"{name} {1e3 * statistics.median(t for t, _ in runs):.1f} ms ({statistics.median(f for _, f in runs):.0f} faults)"
            for name, runs in found.items()
        )
        print(f"{network}: {text}", flush=True)


if __name__ == "__main__":
    main()
