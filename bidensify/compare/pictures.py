"""The same images under every network: pictures, error maps, and a sheet of them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bidensify.compare.images import png
from bidensify.compare.report import Shot
from bidensify.data import denormalise
from bidensify.tasks import predict_restored

if TYPE_CHECKING:
    from bidensify.data import DenseDataset
    from bidensify.tasks import Task

__all__ = ["INPUT", "TRUTH", "error_map", "pick", "sheet", "shots"]

INPUT, TRUTH = "input", "ground truth"
_RIGHT, _WRONG, _UNKNOWN = (44, 52, 64), (236, 72, 60), (120, 126, 136)
_LOOKED_AT = 200
# |ln(prediction / truth)| that is drawn as fully wrong: a factor of 1.25 cubed, delta3's.
_FAR = 3 * math.log(1.25)


def pick(val: DenseDataset, number: int) -> list[int]:
    """Returns the samples to show: those with the most classes, else evenly spaced ones."""
    length = min(len(val), _LOOKED_AT)
    even = [round(place * (length - 1) / max(1, number - 1)) for place in range(min(number, length))]
    first = val[0]
    if "mask" not in first:
        return list(dict.fromkeys(even))
    classes = {index: len(torch.unique(val[index]["mask"])) for index in range(length)}
    return sorted(sorted(classes, key=lambda index: -classes[index])[:number])


def error_map(task: Task, prediction: Tensor, truth: Mapping[str, Tensor]) -> Tensor | None:
    """Returns where a prediction (H, W), or (labels, H, W), is wrong: uint8 (3, H, W); None where the task has no such map.

    Segmentation: right dark, wrong red, unlabelled grey; of several labels one that is wrong is enough, and a pixel is
    unlabelled where none counts. Depth: from dark (right) to red (wrong by a factor of 1.25³ or
    more), scaled by the ratio of medians where the task is.
    """
    table = torch.tensor([_RIGHT, _WRONG, _UNKNOWN], dtype=torch.float32)
    if not prediction.is_floating_point() and "mask" in truth:
        planes = prediction.reshape(-1, *prediction.shape[-2:])
        mask = truth["mask"].as_subclass(Tensor).reshape(planes.shape)
        counts = mask != getattr(task, "ignore_index", -1)
        state = ((planes != mask) & counts).any(0).long()
        state[~counts.any(0)] = 2
        return table[state].permute(2, 0, 1).to(torch.uint8)
    if prediction.is_floating_point() and "depth" in truth:
        depth = truth["depth"].as_subclass(Tensor).reshape(prediction.shape)
        valid = torch.isfinite(depth) & (depth > 0) & (prediction > 0)
        if not valid.any():
            return table[torch.full(prediction.shape, 2)].permute(2, 0, 1).to(torch.uint8)
        if getattr(task, "median_scaling", False):
            prediction = prediction * (depth[valid].median() / prediction[valid].median())
        wrong = ((prediction.clamp_min(1e-9) / depth.clamp_min(1e-9)).log().abs() / _FAR).clamp(0, 1)[..., None]
        mixed = table[0] * (1 - wrong) + table[1] * wrong
        return torch.where(valid[..., None], mixed, table[2]).permute(2, 0, 1).round().to(torch.uint8)
    return None


def shots(
    task: Task,
    val: DenseDataset,
    models: Mapping[str, nn.Module],
    number: int,
    normalisation: tuple[Sequence[float], Sequence[float]],
) -> list[Shot]:
    """Runs every network on the same images.

    Args:
        task: draws the pictures.
        val: with its evaluation transforms.
        models: networks by name, in evaluation mode.
        number: of images.
        normalisation: mean and std that ``val`` applies.
    """
    found = []
    for index in pick(val, number):
        sample = val[index]
        height, width = sample["extent"][:2].tolist() if "extent" in sample else sample["image"].shape[-2:]
        image = denormalise(sample["image"].as_subclass(Tensor), *normalisation)[:, :height, :width]
        truth = {key: value for key, value in sample.items() if key in ("mask", "depth")}
        size = _size(truth, image)
        options: dict[str, Any] = {}
        if task.name == "depth" and "depth" in truth:
            from bidensify.tasks.pictures import depth_limits

            # One scale for all, so that colours can be compared.
            options["limits"] = depth_limits(truth["depth"])
        pictures = {INPUT: png(_rgb(image)), TRUTH: png(task.picture(_rgb(image), dict(sample), **options))}
        errors: dict[str, bytes] = {}
        for name, model in models.items():
            with torch.no_grad():
                output = model(sample["image"][None].as_subclass(Tensor))
            values = predict_restored(task, output, sample.get("extent"), size)[0].cpu()
            pictures[name] = png(task.picture(_rgb(image), values, **options))
            wrong = error_map(task, values, truth)
            if wrong is not None:
                errors[name] = png(wrong)
        name = val.name_of(index)
        found.append(Shot(f"image {name}" if name.isdigit() else name, pictures, errors))
    return found


def sheet(shown: Sequence[Shot], width: int = 144) -> bytes:
    """One PNG of the images under every network, a row for each network, as papers print them.

    Args:
        shown: at least one.
        width: of a picture, in pixels; all of one row's are as high as the first image is.
    """
    from PIL import Image, ImageDraw, ImageFont

    names = list(shown[0].pictures)
    font = ImageFont.load_default(13)
    side = 12 + max(int(font.getlength(name)) for name in names)
    first = Image.open(io.BytesIO(shown[0].pictures[names[0]]))
    height, gap = max(1, round(width * first.height / first.width)), 4
    page = Image.new("RGB", (side + (width + gap) * len(shown), (height + gap) * len(names)), "white")
    draw = ImageDraw.Draw(page)
    for row, name in enumerate(names):
        top = row * (height + gap)
        draw.text((6, top + height // 2), name, "#1b1f27", font, anchor="lm")
        for column, shot in enumerate(shown):
            picture = Image.open(io.BytesIO(shot.pictures[name])).convert("RGB")
            page.paste(picture.resize((width, height)), (side + column * (width + gap), top))
    buffer = io.BytesIO()
    page.quantize(128).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _size(truth: Mapping[str, Tensor], image: Tensor) -> tuple[int, int]:
    shape = next(iter(truth.values())).shape if truth else image.shape
    return int(shape[-2]), int(shape[-1])


def _rgb(image: Tensor) -> Tensor:
    """uint8 (3, H, W) of an image with any number of channels: the first three, or the first one thrice."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1).contiguous()
