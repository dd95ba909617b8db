"""How far trained networks without PyTorch agree with the packed network in PyTorch: arg-max per pixel.

    python benchmarks/deployed.py runs/scenes --formats pte xml --images 24 --out deployed.json

Each RUN is a folder that `bidensify finetune` wrote (a student's). It is packed and exported with a float rest and, with
`--int8-rest`, with an int8 rest too, calibrated on 16 training images; the validation images of its recipe then go through each
file, in a process without torch, and through the packed network. Columns: share of pixels with the same arg-max over all images
and on the worst one (of a depth network: mean relative difference and the largest), the mIoU (or RMSE) of both, and, for the
int8 rest, what it costs. The float rest must agree on 99.9 % of pixels: the exit code is 1 where it does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bidensify as bd
from bidensify._util.files import atomic_write
from bidensify._util.machine import cpu_name
from bidensify.cli.sources import load_source
from bidensify.deploy.executorch import program as pte_program
from bidensify.deploy.openvino import program as ir_program
from bidensify.deploy.runtimes.again import run_again
from bidensify.deploy.runtimes.build import EXECUTORCH, OPENVINO
from bidensify.tasks.outputs import restore

PROGRAMS = {"pte": (EXECUTORCH, pte_program.__file__), "xml": (OPENVINO, ir_program.__file__)}
WANTED = 0.999


def iou(predictions: list[Tensor], masks: list[Tensor], classes: int) -> float:
    """Mean IoU over the classes that occur, of all images together; labels outside the classes do not count."""
    table = torch.zeros(classes, classes, dtype=torch.int64)
    for prediction, mask in zip(predictions, masks, strict=True):
        valid = (mask >= 0) & (mask < classes)
        table += torch.bincount(mask[valid] * classes + prediction[valid], minlength=classes**2).view(classes, classes)
    union = table.sum(0) + table.sum(1) - table.diag()
    found = union > 0
    return float((table.diag()[found] / union[found]).mean())


def _classes(logits: list[Tensor], samples: list[Any]) -> list[Tensor]:
    """The class of each pixel at the size of each image's own mask, as evaluation takes it."""
    pairs = zip(logits, samples, strict=True)
    return [restore(y, one.get("extent"), tuple(one["mask"].shape[-2:])).argmax(1)[0] for y, one in pairs]


def measure(folder: Path, formats: list[str], images: int, int8: bool) -> list[dict[str, Any]]:
    """One row for each file."""
    loaded = load_source(folder, None, trust=False)
    assert loaded.recipe is not None
    packed = bd.pack(loaded.model.eval())
    data = loaded.recipe.build_dataset("val")
    count = min(len(data), images)
    samples = [data[i] for i in range(count)]
    given = [sample["image"][None] for sample in samples]
    with torch.inference_mode():
        wanted = [packed(x.contiguous(memory_format=torch.channels_last)) for x in given]
    wanted = [y if isinstance(y, Tensor) else next(iter(y.values())) for y in wanted]
    calibration = loaded.recipe.calibration_images((given[0].shape[-2], given[0].shape[-1])) if int8 else None
    rows = []
    for ending in formats:
        for rest in ("float", "int8") if int8 else ("float",):
            with tempfile.TemporaryDirectory() as place:
                file = Path(place) / f"net.{ending}"
                bd.export(packed, file, example_inputs=given[0], int8_rest=calibration if rest == "int8" else None)
                runtime, program = PROGRAMS[ending]
                outputs = run_again(runtime, program, file, [[x] for x in given])
            if isinstance(outputs, str):
                raise SystemExit(f"{runtime.name}: {outputs}")
            row: dict[str, Any] = {
                "run": folder.name,
                "model": loaded.recipe.model.source,
                "file": ending,
                "rest": rest,
            }
            row |= {"images": count, "size": list(given[0].shape[-2:])}
            got = [each[0] for each in outputs]
            if wanted[0].shape[1] > 1:
                classes = wanted[0].shape[1]
                shares = [float((a.argmax(1) == b.argmax(1)).float().mean()) for a, b in zip(got, wanted, strict=True)]
                row |= {"agreement": sum(shares) / count, "worst": min(shares)}
                masks = [sample["mask"].long() for sample in samples]
                ours, theirs = (_classes(each, samples) for each in (got, wanted))
                row |= {"miou": iou(ours, masks, classes), "miou in PyTorch": iou(theirs, masks, classes)}
            else:
                found = [float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(got, wanted, strict=True)]
                row |= {"difference": sum(found) / count, "largest": max(found)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--formats", nargs="+", choices=tuple(PROGRAMS), default=["pte"])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--int8-rest", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    rows = []
    for folder in arguments.runs:
        rows += measure(folder, arguments.formats, arguments.images, arguments.int8_rest)
        if arguments.out is not None:
            text = json.dumps({"cpu": cpu_name(), "torch": torch.__version__, "rows": rows}, indent=1)
            with atomic_write(arguments.out) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
    low = [row for row in rows if row["rest"] == "float" and row.get("agreement", 1.0) < WANTED]
    raise SystemExit(f"less than {WANTED}: {low}" if low else 0)


if __name__ == "__main__":
    main()
