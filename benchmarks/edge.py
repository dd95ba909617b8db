"""Deployed without torch: files, memory and time of one network in float, int8 and 1 bit; ExecuTorch, OpenVINO and PyTorch.

    python benchmarks/edge.py make runs/edge --network smp:Unet/resnet34 --sizes 256 512
    python benchmarks/edge.py time runs/edge --threads 1 2          # nothing else may run meanwhile
    ... --names ov_float ov_int8 ov_bits8 ov_bits torch             # OpenVINO alone, for both actions

`make` writes float.pte and int8.pte (XNNPACK; pt2e, every operator that its quantizer takes), int8own.pte (the same without
bidensify's passes, as ExecuTorch lowers it by itself), bits.pte (packed, float rest), bits8.pte (packed, the rest in int8), the
same for OpenVINO as ov_*.xml (int8: NNCF, every operator that it takes), and the packed folder. `time` runs each in a process of
its own: .pte files in the program of examples/deploy_cpp, .xml files in Python with OpenVINO and NumPy alone, the packed network
in PyTorch. Weights are random: neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FILES = ("float", "int8", "int8own", "bits8", "bits", "ov_float", "ov_int8", "ov_bits8", "ov_bits")


def file_of(folder: Path, name: str, size: int) -> Path:
    """Where the file of that name is."""
    return folder / f"{name}{size}.{'xml' if name.startswith('ov_') else 'pte'}"


def make(folder: Path, network: str, sizes: list[int], classes: int, names: list[str]) -> None:
    """Writes the files."""
    import torch

    import bidensify as bd
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
        for name in names:
            file = file_of(folder, name, size)
            if file.exists() or name == "torch":
                continue
            kind = name.removeprefix("ov_")
            if kind.startswith("bits"):
                given = calibration if kind == "bits8" else None
                written = bd.export(packed, file, example_inputs=x, int8_rest=given)
                done[f"{name}{size}"] = written.difference
                print(written, flush=True)
            elif name == kind:
                file.write_bytes(pte(plain, x, None if kind == "float" else calibration, kind == "int8own"))
            else:
                ir(plain, x, calibration if kind == "int8" else None, file)
    record = {"network": network, "classes": classes, "sizes": sizes, "differences": done}
    (folder / "made.json").write_text(json.dumps(record))


def pte(model: Any, x: Any, calibration: list[Any] | None, own: bool = False) -> bytes:
    """The float network for XNNPACK, in int8 where there are images to calibrate with; ``own``: without bidensify's passes."""
    import torch

    from bidensify.deploy.executorch import lower
    from bidensify.deploy.export.capture import capture
    from bidensify.deploy.runtimes.prepare import prepared

    with torch.no_grad():
        program = capture(prepared(model), (x,), {}, None)
        if calibration is not None:
            from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

            quantizer = xnnpack_quantizer.XNNPACKQuantizer()
            quantizer.set_global(xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
            module = prepare_pt2e(program.module(), quantizer)
            for image in calibration:
                module(image)
            program = capture(convert_pt2e(module), (x,), {}, None)
        if own:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            # The program of examples/deploy_cpp runs sealed files alone.
            return lower.seal(bytes(edge.to_executorch().buffer))
        return lower.lower(program)


def ir(model: Any, x: Any, calibration: list[Any] | None, file: Path) -> None:
    """The same for OpenVINO."""
    import openvino as ov
    import torch

    with torch.no_grad():
        network = ov.convert_model(model, example_input=x)
    network.reshape(list(x.shape))
    if calibration is not None:
        import nncf

        images = [image.numpy() for image in calibration]
        network = nncf.quantize(network, nncf.Dataset(images), subset_size=len(images))
    ov.save_model(network, str(file), compress_to_fp16=False)


def run_openvino(file: Path, library: str, size: int, threads: int, runs: int) -> None:
    """A file in a process without torch; prints as the C++ program does."""
    import resource
    import time

    import numpy as np
    import openvino as ov

    core = ov.Core()
    if library:
        core.add_extension(library)
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(str(file), "CPU", hints).create_infer_request()
    x = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        request.infer([x])
        times.append(1000 * (time.perf_counter() - start))
    assert "torch" not in sys.modules
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = sorted(times[2:])
    print(f"openvino: {times[runs // 2]:.1f} ms on {threads} threads, {peak:.1f} MiB at its peak")
    print(f"the fastest of {runs} runs: {times[0]:.1f} ms")


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

    library = ""
    if any(name.startswith("ov_bits") for name in names):
        # Not here: a process's peak counts what its parent held when it was started.
        code = "from bidensify.deploy.runtimes.build import OPENVINO; print(OPENVINO.find())"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        library = found.stdout.split()[-1]
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
                elif name.startswith("ov_"):
                    file = file_of(folder, name, size)
                    command = [sys.executable, __file__, "openvino", file, "--size", size, "--threads", count]
                    command += ["--runs", runs, "--library", library if "bits" in name else ""]
                else:
                    file = file_of(folder, name, size)
                    command = [program, file, image, folder / "mask.png", count, runs]
                done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
                line = re.search(r"([\d.]+) ms on \d+ threads, ([\d.]+) MiB", done.stdout)
                if line is None:
                    print(f"| {size} | {count} | {name} | failed: {(done.stdout + done.stderr)[-300:]} |")
                    continue
                best = re.search(r"fastest of \d+ runs: ([\d.]+) ms", done.stdout)
                fast = float(line[1] if best is None else best[1])
                weights = file.with_suffix(".bin")
                mb = (file.stat().st_size + (weights.stat().st_size if weights.exists() else 0)) / 1e6
                print(
                    f"| {size} | {count} | {name} | {mb:.2f} | {float(line[2]):.0f} | {fast:.1f} | {float(line[1]):.1f} |",
                    flush=True,
                )


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "time", "torch", "openvino"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", default="smp:Unet/resnet34")
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--names", nargs="+", default=[*FILES, "torch"])
    parser.add_argument("--program", type=Path, default=HERE.parent / "build" / "mask", help="of examples/deploy_cpp")
    parser.add_argument("--library", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.action == "openvino":
        run_openvino(given.folder, given.library, given.size, given.threads[0], given.runs)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.action == "make":
        make(given.folder, given.network, given.sizes, given.classes, given.names)
    elif given.action == "torch":
        run_torch(given.folder, given.size, given.threads[0], given.runs)
    else:
        measure(given.folder, given.program, given.threads, given.runs, given.names)


if __name__ == "__main__":
    main()
