"""The demo's report page: figures, checks, learning curves, and pictures of every network beside the ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bidensify.compare import Card, Check, Facts, ImageGrid, Report, RunRecord, Table, write_report
from bidensify.compare.images import png
from bidensify.compare.runs import learning_curves, metrics_table

if TYPE_CHECKING:
    from bidensify.data import DataInfo
    from bidensify.recipe import Recipe

__all__ = ["picture_rows", "write_page"]

_ROWS = 5
_ZOOM = 2


def _image(sample: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (3, H, W) of a normalised image."""
    scale, shift = torch.tensor(std)[:, None, None], torch.tensor(mean)[:, None, None]
    return ((sample["image"] * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)


def _enlarged(picture: Tensor) -> Tensor:
    return picture.repeat_interleave(_ZOOM, 1).repeat_interleave(_ZOOM, 2)


def picture_rows(
    recipe: Recipe, info: DataInfo, models: Mapping[str, nn.Module], samples: Sequence[Mapping[str, Tensor]]
) -> list[list[Tensor]]:
    """Rows of uint8 pictures (3, H, W): image, ground truth, then one per network.

    The samples with the most classes in them are shown: they are the ones that tell networks apart.
    """
    task = recipe.build_task(info)
    mean, std = recipe.data.mean or info.mean, recipe.data.std or info.std
    order = sorted(range(len(samples)), key=lambda i: -len(torch.unique(samples[i]["mask"])))[:_ROWS]
    rows = []
    for index in order:
        sample = samples[index]
        image = _image(sample, mean, std)
        row = [image, task.picture(image, dict(sample))]
        with torch.no_grad():
            row += [task.picture(image, model.eval()(sample["image"][None])) for model in models.values()]
        rows.append([_enlarged(picture) for picture in row])
    return rows


def _css(colour: Sequence[int]) -> str:
    return f"rgb({colour[0]}, {colour[1]}, {colour[2]})"


def _sizes(results: Mapping[str, Any]) -> Table:
    columns = ["student", "binary weights", "other parameters", "fp32 bytes", "packed bytes", "smaller by", "agreement"]
    rows = []
    for method, figures in results["students"].items():
        rows.append([
            method, f"{figures['binary_weights']:,}", f"{figures['other_parameters']:,}", f"{figures['latent_bytes']:,}",
            f"{figures['packed_bytes']:,}", f"{figures['latent_bytes'] / figures['packed_bytes']:.1f}×",
            f"{100 * figures['agreement']:.3f} %",
        ])  # fmt: skip
    return Table("Packed to bits", columns, rows, note="Agreement: pixels on which the reloaded packed network and the "
                 "latent one give the same class.")  # fmt: skip


def write_page(
    out: Path,
    results: Mapping[str, Any],
    records: Mapping[str, RunRecord],
    recipe: Recipe,
    info: DataInfo,
    models: Mapping[str, nn.Module],
    samples: Sequence[Mapping[str, Tensor]],
) -> Path:
    """Writes ``report.html`` into ``out``."""
    figures = results["students"]["bidense"]
    miou = results["miou"]
    cards = [
        Card("mIoU of the 1-bit student", f"{100 * miou['bidense']:.1f} %", f"teacher {100 * miou['teacher']:.1f} %, "
             f"bnn {100 * miou['bnn']:.1f} %"),
        Card("of the teacher's mIoU", f"{100 * results['student_over_teacher']:.0f} %", "bidense"),
        Card("packed file", f"{figures['packed_bytes'] / 1e3:.0f} kB",
             f"{figures['latent_bytes'] / figures['packed_bytes']:.0f}× smaller than fp32"),
        Card("packed = latent", f"{100 * results['agreement']:.2f} %", "of pixels, read back from disk"),
    ]  # fmt: skip
    checks = []
    for check in results["checks"]:
        target = f"≥ {check['low']:g}" if check["low"] is not None else f"≤ {check['high']:g}"
        checks.append(Check(check["text"], f"{check['measured']:.4f}", target, check["passed"], check["enforced"]))
    rows = picture_rows(recipe, info, models, samples)
    names = info.class_names
    grid = ImageGrid(
        "Validation images",
        ["image", "ground truth", *(name if name == "teacher" else f"{name}, packed" for name in models)],
        [[png(picture) for picture in row] for row in rows],
        legend=[(name, _css(colour)) for name, colour in zip(names, info.palette)],
        note="The images with the most classes. Students run from their packed files.",
    )
    runs = list(records.values())
    facts = {
        "processor": results["machine"]["cpu"],
        "threads": str(results["machine"]["threads"]),
        "torch": results["versions"]["torch"],
        "bidensify": results["versions"]["bidensify"],
        "seed": str(results["seed"]),
        "size": "quick" if results["quick"] else "full",
        "whole job": f"{results['seconds']:.0f} s",
    }
    report = Report(
        "bidensify demo",
        "A small U-Net is trained on generated scenes, rewritten to 1 bit with two methods, distilled under one recipe, "
        "packed, read back and compared.",
        cards=cards,
        checks=checks,
        sections=[grid, metrics_table(runs), _sizes(results), learning_curves(runs), Facts("Machine", facts)],
        status="passed" if results["passed"] else "failed",
    )
    return write_report(report, out / "report.html")
