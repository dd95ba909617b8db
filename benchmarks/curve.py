"""Accuracy against measured milliseconds and against bytes, of the files that run: a teacher's and its students'.

    python benchmarks/curve.py --teacher runs/teacher --students '1 bit=runs/one' 'mixed=runs/mixed' --out runs/curve

Under OpenVINO, in one process: the teacher in float32, in bfloat16 and in int8 (post-training, calibrated on training images),
and each student as `bidensify export NET.xml` writes it, its rest in float and in int8; beside them the students packed in
PyTorch. What is measured is what runs: all validation images of the teacher's recipe go through each file one by one, and then
the files take turns on one image. Files and accuracies are kept in ``--out``, times are taken anew. With
ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI OpenVINO goes without AMX.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify._util.files import atomic_write
from bidensify._util.fingerprint import weights_fingerprint
from bidensify.bench.int8 import OneByOne, open_int8, open_openvino, openvino_call, quantize_int8
from bidensify.bench.timing import interleave, machine
from bidensify.bench.timing import threads as torch_threads
from bidensify.compare.plots import Mark, Scatter, scatters
from bidensify.deploy.openvino.program import open_network
from bidensify.deploy.runtimes.build import OPENVINO
from bidensify.tasks import Task
from bidensify.train import evaluate, load_run

CALIBRATION = 64


@dataclass
class Deployed:
    """A file that runs: ``opened`` gives a call that runs it on what a tensor then holds."""

    name: str
    file: Path
    bytes: int
    opened: Callable[[Tensor], Callable[[], Any]]


def weight(file: Path) -> int:
    """Bytes of an .xml with its .bin."""
    return file.stat().st_size + file.with_suffix(".bin").stat().st_size


def teachers(folder: Path, model: nn.Module, x: Tensor, samples: list[Tensor], threads: int) -> list[Deployed]:
    """The network in full precision and in int8."""
    ov: Any = importlib.import_module("openvino")
    file = folder / "float.xml"
    if not file.exists():
        with torch.no_grad():
            made = ov.convert_model(model, example_input=x.clone(), input=[list(x.shape)])
        ov.save_model(made, file, compress_to_fp16=False)
    half = folder / "half.xml"
    if not half.exists():
        ov.save_model(ov.Core().read_model(file), half, compress_to_fp16=True)

    int8 = quantize_int8("openvino int8", model, x, folder, samples)
    return [
        Deployed("float", file, weight(file), lambda x: open_openvino(file, x, threads, "f32")),
        # The file in which OpenVINO keeps a network for 16 bits; what computes is bfloat16 where the processor has it.
        Deployed("bf16", half, weight(half), lambda x: open_openvino(half, x, threads, "bf16")),
        Deployed("int8", int8, weight(int8), lambda x: open_int8("openvino int8", int8, x, threads)),
    ]


def students(folder: Path, name: str, run: Path, x: Tensor, samples: list[Tensor], threads: int) -> list[Deployed]:
    """The packed network as it is exported, and in PyTorch."""
    packed = bd.pack(load_run(run, trust=True)[0].eval())
    found = []
    for rest, images in (("float rest", None), ("int8 rest", samples)):
        file = folder / f"{name} {rest}.xml".replace(" ", "_")
        if not file.exists():
            print(bd.export(packed, file, example_inputs=x, int8_rest=images), flush=True)

        def opened(file: Path, x: Tensor) -> Callable[[], Any]:
            return openvino_call(open_network(file, OPENVINO.find(), threads), x)

        found.append(Deployed(f"{name}, {rest}", file, weight(file), partial(opened, file)))
    whole = folder / f"{name} packed".replace(" ", "_")
    if not whole.exists():
        bd.save_pretrained(packed, whole)

    def in_torch(x: Tensor) -> Callable[[], Any]:
        return lambda: packed(x.contiguous(memory_format=torch.channels_last))

    size = sum(part.stat().st_size for part in whole.rglob("*") if part.is_file())
    return [*found, Deployed(f"{name}, in PyTorch", whole, size, in_torch)]


def accuracy(folder: Path, one: Deployed, x: Tensor, task: Task, data: Any, mark: str) -> dict[str, float]:
    """The task's metrics of what runs, kept beside the file."""
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    key = hashlib.sha256(f"{mark} {one.name} {one.file.stat().st_mtime_ns} {isa}".encode()).hexdigest()[:16]
    kept = folder / f"metrics_{key}.json"
    if not kept.exists():
        with torch.inference_mode():
            found = evaluate(OneByOne(one.opened, x.shape), task, data, batch_size=8)
        with atomic_write(kept) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
    return dict(json.loads(kept.read_text(encoding="utf-8")))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, metavar="RUN")
    parser.add_argument("--students", nargs="+", required=True, metavar="NAME=RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, recipe = load_run(arguments.teacher, trust=True)
    data = recipe.build_dataset("val")
    x = data[0]["image"][None].contiguous()
    samples = recipe.calibration_images((x.shape[-2], x.shape[-1]), CALIBRATION)
    task = recipe.build_task()
    deployed = teachers(folder, model.eval(), x, samples, arguments.threads)
    for each in arguments.students:
        name, _, run = each.partition("=")
        deployed += students(folder, name, Path(run), x, samples, arguments.threads)
    mark = weights_fingerprint(model)
    with torch_threads(arguments.threads), torch.inference_mode():
        metrics = {one.name: accuracy(folder, one, x, task, data, mark) for one in deployed}
        timing = interleave({one.name: one.opened(x.clone()) for one in deployed}, seconds=arguments.seconds, least=9)
    primary, full = task.primary, metrics["float"][task.primary]
    rows: list[dict[str, Any]] = [
        {
            "name": one.name, "bytes": one.bytes, "milliseconds": timing.milliseconds[one.name],
            primary: metrics[one.name][primary], "of float": metrics[one.name][primary] / full,
        }
        for one in deployed
    ]  # fmt: skip
    found = {
        **machine(), "openvino": importlib.import_module("openvino").__version__, "threads": arguments.threads,
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "all"), "input": list(x.shape), "images": len(data),
        "network": recipe.name, "rows": rows,
    }  # fmt: skip
    with atomic_write(folder / "curve.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shown = [row for row in rows if not row["name"].endswith((", float rest", ", in PyTorch"))]
    panels = [
        Scatter(f"{primary} against {what}", label, primary, [
            Mark(row["name"], row[key] * scale, row[primary], hollow=row["name"] in ("float", "bf16", "int8"))
            for row in shown
        ])
        for what, label, key, scale in (
            ("time", f"ms, {arguments.threads} thread, OpenVINO", "milliseconds", 1.0),
            ("size", "MB of the file", "bytes", 1e-6),
        )
    ]  # fmt: skip
    figure = scatters(recipe.name, panels, [row["name"] for row in shown])
    for ending, drawn in (("png", figure.light), ("svg", figure.svg)):
        (folder / f"curve.{ending}").write_bytes(drawn)
    print(f"| file | ms | MB | {primary} % | of float |\n|---|---|---|---|---|")
    for row in rows:
        cells = (
            f"{row['milliseconds']:.1f}",
            f"{1e-6 * row['bytes']:.2f}",
            f"{100 * row[primary]:.1f}",
            f"{row['of float']:.3f}",
        )
        print(f"| {' | '.join((row['name'], *cells))} |")


if __name__ == "__main__":
    main()
