"""Two checkouts of bidensify against each other, in turn in one run: is a change slower than what was before it?

    python benchmarks/side_by_side.py ../before . --threads 1 --out side_by_side.json
    python benchmarks/side_by_side.py ../before . --channels 24:72 72:24 --networks smp:Linknet/mobilenet_v2

One process per checkout (each with its own built library) stays alive; they are asked in turn, A B B A ..., so that a machine
that is faster now and slower later slows both. Prints the median of the ratios second / first for each packed layer of
``bidensify bench``, for whole networks and for a training step, or of what is named (1x1 layers of these channels at 96x128,
packed networks at 192x256); below 1 the second is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = """
import importlib, json, sys, time
import torch
import bidensify as bd
from bidensify.models import build_model
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
try:
    cases = importlib.import_module("bidensify.bench.cases").CASES
except ModuleNotFoundError:
    cases = importlib.import_module("bidensify.runtime.cases").CASES
calls = {}
chosen = json.loads(sys.argv[2])
usual = not any(chosen.values())
for inner, outer in chosen["channels"]:
    layer = torch.nn.Sequential(bd.nn.BiDenseConv2d(inner, outer, 1)).eval()
    x = torch.randn(1, inner, 96, 128).contiguous(memory_format=torch.channels_last)
    calls[f"layer 1x1 {inner}->{outer}"] = (bd.pack(layer), x)
for spec in chosen["networks"]:
    classes = "classes" if spec.startswith("smp:") else "num_classes"
    x = torch.randn(1, 3, 192, 256).contiguous(memory_format=torch.channels_last)
    packed = bd.pack(bd.bidensify(build_model(spec, **{classes: 11}).eval(), example_inputs=x).eval())
    calls["packed " + spec] = (packed, x)
for case in cases if usual else []:
    latent = case.build()[1]
    x = case.input()
    calls["layer " + case.name] = (bd.pack(latent), x)
NETWORKS = {"U-Net ResNet-34": "smp:Unet/resnet34", "UPerNet ConvNeXt-T": "smp:UPerNet/tu-convnext_tiny"}
for name, spec in NETWORKS.items() if usual else []:
    student = bd.bidensify(build_model(spec, classes=11).eval())
    x = torch.randn(1, 3, 256, 256).contiguous(memory_format=torch.channels_last)
    calls["packed " + name] = (bd.pack(student), x)
    calls["latent " + name] = (student, x)
net = bd.bidensify(build_model("demo:unet", num_classes=8, width=16)).to(memory_format=torch.channels_last).train()
data = torch.randn(8, 3, 64, 96).contiguous(memory_format=torch.channels_last)
def step():
    net.zero_grad()
    net(data).square().mean().backward()
if usual:
    calls["training step demo:unet"] = (step, None)
def run(name):
    call, x = calls[name]
    if x is None:
        return call()
    with torch.inference_mode():
        return call(x)
for name in calls:
    run(name); run(name)
print(json.dumps(list(calls)), flush=True)
for line in sys.stdin:
    name, count = json.loads(line)
    start = time.perf_counter()
    for _ in range(count):
        run(name)
    print(json.dumps((time.perf_counter() - start) / count), flush=True)
"""


class Worker:
    """A process on one checkout."""

    def __init__(self, checkout: Path, threads: int, chosen: dict[str, list[object]]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(threads), json.dumps(chosen)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=checkout,
        )  # fmt: skip
        self.names: list[str] = self._read()

    def _read(self) -> list[str]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def time(self, name: str, count: int) -> float:
        """Seconds of one run, over ``count`` of them."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps((name, count)) + "\n")
        self.process.stdin.flush()
        return float(self._read())  # type: ignore[arg-type]


def main() -> None:
    """Compares two checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.25, help="of one measurement")
    parser.add_argument("--channels", nargs="*", default=[], metavar="IN:OUT")
    parser.add_argument("--networks", nargs="*", default=[], metavar="SOURCE:NAME")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pairs = [[int(number) for number in pair.split(":")] for pair in arguments.channels]
    chosen = {"channels": pairs, "networks": arguments.networks}
    workers = [Worker(checkout, arguments.threads, chosen) for checkout in (arguments.first, arguments.second)]
    found = {}
    for name in (name for name in workers[0].names if name in workers[1].names):
        count = max(1, round(arguments.seconds / workers[0].time(name, 2)))
        ratios, best = [], [float("inf")] * 2
        for number in range(arguments.rounds):
            seconds = [0.0, 0.0]
            for which in (0, 1) if number % 2 else (1, 0):
                seconds[which] = workers[which].time(name, count)
                best[which] = min(best[which], seconds[which])
            ratios.append(seconds[1] / seconds[0])
        found[name] = {"ratio": statistics.median(ratios), "milliseconds": [1e3 * each for each in best]}
        print(f"{found[name]['ratio']:.3f}  {best[0] * 1e3:9.3f} {best[1] * 1e3:9.3f} ms  {name}", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"threads": arguments.threads, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
