"""Deployed without torch: files, memory and time of one network in float, int8 and 1 bit under ExecuTorch, and in PyTorch.

    python benchmarks/edge.py make runs/edge --network smp:Unet/resnet34 --sizes 256 512
    python benchmarks/edge.py time runs/edge --threads 1 2          # nothing else may run meanwhile

`make` writes float.pte and int8.pte (XNNPACK; pt2e, every operator that its quantizer takes), bits.pte (packed, float rest),
bits8.pte (packed, the rest in int8), and the packed folder. `time` runs each in a process of its own: .pte files in the program
of examples/deploy_cpp, the packed network in PyTorch. Weights are random: neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("float", "int8", "bits8", "bits")


def make(folder: Path, network: str, sizes: list[int], classes: int) -> None:
    """Writes all files."""
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    import bidensify as bd
    from bidensify.deploy.executorch import lower
    from bidensify.deploy.export.capture import capture
    from bidensify.deploy.runtimes.prepare import prepared
    from bidensify.models import build_model

    torch.manual_seed(0)
    plain = build_model(network, classes=classes).eval()
    student = bd.bidensify(plain, example_inputs=torch.randn(2, 3, 128, 128))
    bd.calibrate(student, [torch.randn(2, 3, 128, 128)])
    packed = bd.pack(student.eval())
    bd.save_pretrained(packed, folder / "packed")
    done = {}
    for size in sizes:
        x = torch.randn(1, 3, size, size)
        calibration = [torch.randn(1, 3, size, size) for _ in range(2)]
        for name, model, int8 in (("float", plain, None), ("bits", packed, None), ("bits8", packed, calibration)):
            if (folder / f"{name}{size}.pte").exists():
                continue
            written = bd.export(model, folder / f"{name}{size}.pte", example_inputs=x, int8_rest=int8)
            done[f"{name}{size}"] = written.difference
            print(written, flush=True)
        if (folder / f"int8{size}.pte").exists():
            continue
        with torch.no_grad():
            program = capture(prepared(plain), (x,), {}, None)
            quantizer = xnnpack_quantizer.XNNPACKQuantizer()
            quantizer.set_global(xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
            module = prepare_pt2e(program.module(), quantizer)
            for image in calibration:
                module(image)
            program = capture(convert_pt2e(module), (x,), {}, None)
        (folder / f"int8{size}.pte").write_bytes(lower.lower(program))
    record = {"network": network, "classes": classes, "sizes": sizes, "differences": done}
    (folder / "made.json").write_text(json.dumps(record))


def run_torch(folder: Path, size: int, threads: int, runs: int) -> None:
    """The packed network in PyTorch; prints as the C++ program does."""
    import resource
    import time

    import torch

    import bidensify as bd

    torch.set_num_threads(threads)
    model = bd.from_pretrained(folder / "packed")
    x = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        for _ in range(runs + 2):
            start = time.perf_counter()
            model(x)
            times.append(1000 * (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = sorted(times[2:])
    print(f"torch: {times[runs // 2]:.1f} ms on {threads} threads, {peak:.1f} MiB at its peak")
    print(f"the fastest of {runs} runs: {times[0]:.1f} ms")


def measure(folder: Path, program: Path, threads: list[int], runs: int, names: list[str]) -> None:
    """Prints a table row for each file, size and number of threads."""
    import numpy as np
    from PIL import Image

    made = json.loads((folder / "made.json").read_text())
    print(f"{made['network']}, {processor()}, {platform.python_version()}", flush=True)
    print(
        "| size | threads | what | file, MB | peak memory, MiB | ms, fastest | ms, median |\n|---|---|---|---|---|---|---|"
    )
    for size in made["sizes"]:
        image = folder / f"{size}.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(image)
        for count in threads:
            for name in names:
                if name == "torch":
                    file = folder / "packed" / "model.safetensors"
                    command = [sys.executable, __file__, "torch", folder, "--size", size, "--threads", count]
                    command += ["--runs", runs]
                else:
                    file = folder / f"{name}{size}.pte"
                    command = [program, file, image, folder / "mask.png", count, runs]
                done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
                found = re.search(r"([\d.]+) ms on \d+ threads, ([\d.]+) MiB", done.stdout)
                if found is None:
                    print(f"| {size} | {count} | {name} | failed: {(done.stdout + done.stderr)[-300:]} |")
                    continue
                best = re.search(r"fastest of \d+ runs: ([\d.]+) ms", done.stdout)
                fast = float(found[1] if best is None else best[1])
                mb = file.stat().st_size / 1e6
                print(
                    f"| {size} | {count} | {name} | {mb:.2f} | {float(found[2]):.0f} | {fast:.1f} | {float(found[1]):.1f} |",
                    flush=True,
                )


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "time", "torch"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", default="smp:Unet/resnet34")
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--names", nargs="+", default=[*FILES, "torch"])
    parser.add_argument("--program", type=Path, default=HERE.parent / "build" / "mask", help="of examples/deploy_cpp")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.action == "make":
        make(given.folder, given.network, given.sizes, given.classes)
    elif given.action == "torch":
        run_torch(given.folder, given.size, given.threads[0], given.runs)
    else:
        measure(given.folder, given.program, given.threads, given.runs, given.names)


if __name__ == "__main__":
    main()
