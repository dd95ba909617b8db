"""Networks of all kinds, packed beside float PyTorch and beside int8 of OpenVINO and ONNX Runtime.

    python benchmarks/suite.py                                    # all that is missing in the results, then the tables
    python benchmarks/suite.py --only 'smp:FPN*' --size 192 256 --threads 1
    python benchmarks/suite.py --prepare                          # quantize and compile ahead, time nothing
    python benchmarks/suite.py --render                           # the tables of what is there

A row is one network, size and number of threads, measured in a process of its own in which all variants run in turn (medians);
it is stored as soon as it is there, and a run goes on where another stopped. Weights are random: time does not depend on them.
Quantized networks and what torch compiled are kept in ``--cache``. What a variant cannot do is stored as its reason.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bidensify.bench.int8 import installed_runtimes, open_int8, open_openvino, openvino_call, quantize_int8
from bidensify.bench.timing import interleave, machine, threads
from bidensify.models import build_model

HERE = Path(__file__).resolve().parent
SMP: dict[str, Any] = {"classes": 11, "encoder_weights": None}
DPT = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 384,
    "neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64, "backbone_out_indices": [2, 5, 8, 11],
    "is_hybrid": False,
}  # fmt: skip
# Name -> (kind, source, options).
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Unet/resnet34": ("cnn", "smp:Unet/resnet34", SMP),
    "Unet/mobilenet_v2": ("cnn", "smp:Unet/mobilenet_v2", SMP),
    "Unet/efficientnet-b0": ("cnn", "smp:Unet/efficientnet-b0", SMP),
    "DeepLabV3Plus/mobilenetv3_large": ("cnn", "smp:DeepLabV3Plus/tu-mobilenetv3_large_100", SMP),
    "FPN/resnet50": ("cnn", "smp:FPN/resnet50", SMP),
    "Segformer/mit_b0": ("transformer", "smp:Segformer/mit_b0", SMP),
    "UPerNet/convnext_tiny": ("cnn", "smp:UPerNet/tu-convnext_tiny", SMP),
    "MAnet/resnet18": ("cnn", "smp:MAnet/resnet18", SMP),
    "Linknet/resnet18": ("cnn", "smp:Linknet/resnet18", SMP),
    "deeplabv3_resnet50": ("cnn", "torchvision:deeplabv3_resnet50", {"num_classes": 11}),
    "lraspp_mobilenet_v3_large": ("cnn", "torchvision:lraspp_mobilenet_v3_large", {"num_classes": 11}),
    "transformers Segformer-b0": ("transformer", "transformers:SegformerForSemanticSegmentation", {"num_labels": 11}),
    "transformers DPT-small": ("transformer", "transformers:DPTForDepthEstimation", DPT),
    "transformers MobileViTV2": ("transformer", "transformers:MobileViTV2ForSemanticSegmentation", {"num_labels": 11}),
}
SIZES = ((192, 256), (512, 512))
# Networks of one size of image alone.
SQUARE = {"transformers DPT-small": 384}
PACKED = ("packed", "packed compiled", "packed bfloat16")
# The packed network as `bidensify export NET.xml` writes it: the same kernels inside OpenVINO, the rest in float or int8.
EXPORTED = ("packed openvino", "packed openvino int8 rest")
VARIANTS = ("float", "float compiled", "openvino float", "openvino int8", "onnxruntime int8", *PACKED, *EXPORTED)
MARK = "row: "


class First(nn.Module):
    """A network's first output tensor, for tools that take no dictionaries."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(x)
        while not isinstance(output, Tensor):
            output = next(iter(output.values() if hasattr(output, "values") else output))
        return output


def open_float(folder: Path, module: nn.Module, x: Tensor, number: int) -> Callable[[], Any]:
    """OpenVINO in float32."""
    file = folder / "openvino_float.xml"
    if not file.exists():
        ov: Any = importlib.import_module("openvino")
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            made = ov.convert_model(module, example_input=x.contiguous().clone(), input=[list(x.shape)])
        ov.save_model(made, file, compress_to_fp16=False)
    # Where a processor has bfloat16, OpenVINO would compute in it.
    return open_openvino(file, x, number, "f32")


def open_packed(folder: Path, student: nn.Module, x: Tensor, number: int, int8: bool) -> Callable[[], Any]:
    """The student, packed, under OpenVINO."""
    import bidensify as bd
    from bidensify.deploy.openvino.program import open_network
    from bidensify.deploy.runtimes.build import OPENVINO

    file = folder / f"packed_{'int8_rest' if int8 else 'float_rest'}.xml"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = [torch.randn_like(x) for _ in range(2)] if int8 else None
        bd.export(First(bd.pack(student)).eval(), file, example_inputs=x, int8_rest=images)
    return openvino_call(open_network(file, OPENVINO.find(), number), x)


def calls(
    name: str, size: tuple[int, int], number: int, cache: Path, wanted: list[str], linear: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What is timed, by variant, and why the others are not."""
    import bidensify as bd

    _, source, options = NETWORKS[name]
    torch.manual_seed(0)
    network = build_model(source, **options).eval()
    x = torch.randn(1, 3, *size).contiguous(memory_format=torch.channels_last)
    folder = cache / f"{name}_{size[0]}x{size[1]}".replace("/", "_").replace(" ", "_")
    student = bd.bidensify(network, bd.BidensifyConfig(linear=linear), example_inputs=torch.zeros(1, 3, *size)).eval()
    floats = network.to(memory_format=torch.channels_last)
    first = First(network).eval()

    def int8(key: str) -> Callable[[], Any]:
        if key not in installed_runtimes():
            raise ImportError(f"{key} is not installed")
        return open_int8(key, quantize_int8(key, first, x, folder), x, number)

    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "float": lambda: partial(floats, x),
        "float compiled": lambda: partial(cast(nn.Module, torch.compile(floats, options={"freezing": True})), x),
        "openvino float": lambda: open_float(folder, first, x, number),
        "openvino int8": lambda: int8("openvino int8"),
        "onnxruntime int8": lambda: int8("onnxruntime int8"),
        "packed": lambda: partial(bd.pack(student), x),
        "packed compiled": lambda: partial(bd.pack(student, compile=True), x),
        "packed bfloat16": lambda: partial(bd.pack(student, float_dtype=torch.bfloat16), x),
        "packed openvino": lambda: open_packed(folder, student, x, number, False),
        "packed openvino int8 rest": lambda: open_packed(folder, student, x, number, True),
    }
    made: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    for key, maker in makers.items():
        if key not in wanted:
            continue
        try:
            with torch.inference_mode(key != "packed compiled" and "compiled" in key), torch.no_grad():
                made[key] = maker()
                made[key]()
        except Exception as error:  # whatever another library raises is that variant's result
            missing[key] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            made.pop(key, None)
    return made, missing


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    size = tuple(arguments.size)
    with threads(arguments.threads):
        made, missing = calls(
            arguments.row, size, arguments.threads, arguments.cache, arguments.variants, arguments.linear
        )
        row: dict[str, Any] = {
            "network": arguments.row,
            "kind": NETWORKS[arguments.row][0],
            "linear": arguments.linear,
            "size": list(size),
            "threads": arguments.threads,
            "missing": missing,
            "machine": machine(),
        }
        if not arguments.prepare:
            with torch.inference_mode():
                timing = interleave(made, seconds=arguments.seconds, least=3)
            row |= {"ms": timing.milliseconds, "rounds": timing.rounds, "others": timing.others}
    return row


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["network"], tuple(row["size"]), row["threads"], row.get("linear", "pointwise")


def read(file: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows that are there, by what they measure."""
    if not file.is_file():
        return {}
    return {key_of(row): row for row in json.loads(file.read_text(encoding="utf-8"))}


def store(file: Path, row: dict[str, Any]) -> None:
    """Adds a row; variants that an earlier run of it measured and this one did not are left out: they ran at another time."""
    rows = read(file)
    rows[key_of(row)] = row
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def best(row: dict[str, Any]) -> str | None:
    """The faster of packed eager and packed compiled."""
    found = [name for name in PACKED[:2] if name in row["ms"]]
    return min(found, key=row["ms"].__getitem__) if found else None


def mean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def render(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for each number of threads, geometric means, what is slower than int8."""
    parts = []
    for number in sorted({row["threads"] for row in rows}):
        head = ["network", "size", *VARIANTS, "int8 / packed", "float / packed", "best packed"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        over_int8: list[float] = []
        over_float: list[float] = []
        under_openvino: list[float] = []
        slower = []
        for row in sorted((row for row in rows if row["threads"] == number), key=lambda r: (r["size"], r["network"])):
            times, chosen = row["ms"], best(row)
            cells = [row["network"] + ("" if row["linear"] == "pointwise" else f", linear={row['linear']}")]
            cells += [
                "×".join(map(str, row["size"])),
                *(f"{times[key]:.1f}" if key in times else "–" for key in VARIANTS),
            ]
            ratios = ["", "", ""]
            if chosen is not None:
                ratios[2] = chosen.removeprefix("packed").strip() or "eager"
                if "openvino int8" in times:
                    ratio = times["openvino int8"] / times[chosen]
                    ratios[0] = f"{ratio:.2f}"
                    # A network counts once, as the defaults rewrite it.
                    over_int8 += [ratio] if row["linear"] == "pointwise" else []
                    if ratio < 1:
                        slower.append(f"{cells[0]} at {cells[1]} ({ratio:.2f})")
                if "float" in times:
                    ratio = times["float"] / times[chosen]
                    over_float += [ratio] if row["linear"] == "pointwise" else []
                    ratios[1] = f"{ratio:.2f}"
            if EXPORTED[1] in times and "openvino int8" in times and row["linear"] == "pointwise":
                under_openvino.append(times["openvino int8"] / times[EXPORTED[1]])
            lines.append("| " + " | ".join([*cells, *ratios]) + " |")
        title = f"{number} thread{'s' if number > 1 else ''}, ms"
        text = (
            f"Geometric means: {mean(over_int8):.2f} times OpenVINO int8, {mean(over_float):.2f} times float PyTorch."
        )
        text += f" Slower than int8: {', '.join(slower) or 'none'}."
        if under_openvino:
            text += f" Under OpenVINO with an int8 rest, packed is {mean(under_openvino):.2f} times its int8"
            text += f" ({len(under_openvino)} networks, the slowest {min(under_openvino):.2f})."
        parts.append("\n".join([title, "", *lines, "", text]))
    return "\n\n".join(parts)


def child(arguments: argparse.Namespace, name: str, size: tuple[int, int], number: int) -> dict[str, Any] | None:
    """A row of a process of its own, or None where it failed (and said why)."""
    command = [sys.executable, __file__, "--row", name, "--size", *map(str, size), "--threads", str(number)]
    command += ["--cache", str(arguments.cache), "--seconds", str(arguments.seconds), "--variants", *arguments.variants]
    command += ["--linear", arguments.linear, *(["--prepare"] if arguments.prepare else [])]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(arguments.cache / "inductor")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return cast(dict[str, Any], json.loads(line.removeprefix(MARK)))
    print(f"{name} {size} {number}: {done.stderr.strip().splitlines()[-1:] or done.returncode}", file=sys.stderr)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="names or patterns of networks")
    parser.add_argument("--size", type=int, nargs="+", help="height and width; default both sizes")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing per row, all variants together")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--linear", default="pointwise", help="BidensifyConfig(linear=...)")
    parser.add_argument("--cache", type=Path, default=Path("runs/suite"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "suite.json")
    parser.add_argument("--prepare", action="store_true", help="quantize and compile, time nothing")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--render", action="store_true", help="print the tables of what is there, run nothing")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.cache = arguments.cache.absolute()
    if arguments.row:
        arguments.threads = arguments.threads[0]
        print(MARK + json.dumps(measure(arguments)))
        return
    sizes = [tuple(arguments.size)] if arguments.size else list(SIZES)
    names = [name for name in NETWORKS if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.only)]
    if not names:
        parser.error(f"--only {arguments.only}: no network is called that; there are {list(NETWORKS)}")
    for name in [] if arguments.render else names:
        for size in [(SQUARE[name],) * 2] if name in SQUARE else sizes:
            for number in arguments.threads:
                place = (name, tuple(size), number, arguments.linear)
                if place in read(arguments.results) and not (arguments.again or arguments.prepare):
                    continue
                row = child(arguments, name, cast(tuple[int, int], size), number)
                if row is not None and not arguments.prepare:
                    store(arguments.results, row)
                    print(name, size, number, {key: round(value, 1) for key, value in row["ms"].items()}, flush=True)
    print(render(list(read(arguments.results).values())))


if __name__ == "__main__":
    main()
