"""Pictures of a report lie on their images, also where evaluation pads."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from bidensify.compare.images import png
from bidensify.compare.pictures import error_map, sheet, shots
from bidensify.compare.report import Shot
from bidensify.data import DataInfo, DenseDataset, Sample, build_transforms
from bidensify.tasks import SegmentationTask, build_task

HALF = (0.5, 0.5, 0.5)


class Halves(DenseDataset):
    """The right half is class 1, and white."""

    info = DataInfo(2, ("left", "right"), ((0, 0, 0), (255, 255, 255)), mean=HALF, std=HALF)

    def __len__(self) -> int:
        return 1

    def load(self, index: int) -> Sample:
        mask = torch.zeros(40, 20, dtype=torch.int64)
        mask[:, 10:] = 1
        return {
            "image": tv_tensors.Image((mask * 255).to(torch.uint8).expand(3, -1, -1)),
            "mask": tv_tensors.Mask(mask),
        }


class Bright(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-x[:, :1], x[:, :1]], 1)


@pytest.mark.parametrize("resize", ["letterbox", "native", "pad", "squash"])
def test_image_truth_and_prediction_agree(resize: str) -> None:
    val = Halves(build_transforms(False, (48, 48), HALF, HALF, resize=resize))  # type: ignore[arg-type]
    shot = shots(SegmentationTask(2, palette=Halves.info.palette), val, {"net": Bright()}, 1, (HALF, HALF))[0]
    pictures = {name: np.array(Image.open(io.BytesIO(data)).convert("L")) > 127 for name, data in shot.pictures.items()}
    sizes = {name: picture.shape for name, picture in pictures.items()}
    assert len(set(sizes.values())) == 1, sizes
    truth = pictures["net"]
    for name, picture in pictures.items():
        assert (picture == truth).mean() > 0.95, name
    assert 0.4 < truth.mean() < 0.6
    wrong = np.array(Image.open(io.BytesIO(shot.errors["net"])))
    assert len(np.unique(wrong.reshape(-1, 3), axis=0)) <= 2


def test_the_sheet_has_a_row_for_each_network_and_a_column_for_each_image() -> None:
    def plain(red: int) -> bytes:
        picture = torch.zeros(3, 20, 40, dtype=torch.uint8)
        picture[0] = red
        return png(picture)

    shown = [
        Shot(f"{column}", {f"net $_{row}": plain(60 * column + 20 * row + 40) for row in range(3)})
        for column in range(2)
    ]
    page = np.array(Image.open(io.BytesIO(sheet(shown, width=80))).convert("RGB"))
    assert page.shape[0] == 3 * 44
    side = page.shape[1] - 2 * 84
    assert side > 40
    for row in range(3):
        for column in range(2):
            middle = page[row * 44 + 20, side + column * 84 + 40]
            assert middle.tolist() == pytest.approx([60 * column + 20 * row + 40, 0, 0], abs=3)
        assert page[row * 44 : row * 44 + 40, :side].min() < 100  # its name


def test_the_map_of_errors_reads_masks_with_a_channel_and_planes_of_labels() -> None:
    prediction, mask = torch.randint(0, 3, (8, 8)), torch.randint(0, 3, (8, 8))
    mask[0] = 255
    task = SegmentationTask(3)
    plain, planed = (error_map(task, prediction, {"mask": m}) for m in (mask, mask[None]))
    assert plain is not None
    assert planed is not None
    assert torch.equal(plain, planed)
    truth = torch.zeros(3, 2, 2, dtype=torch.int64)
    truth[:, 0, 0] = 255  # no label counts
    truth[0, 0, 1] = 255  # one does not count, and it is the only one that differs
    labels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    labels[:, 0, 0], labels[0, 0, 1], labels[2, 1, 0] = 1, 1, 1
    found = error_map(build_task("multilabel", num_classes=3), labels, {"mask": truth})
    assert found is not None
    right, wrong, unknown = (44, 52, 64), (236, 72, 60), (120, 126, 136)
    assert [tuple(found[:, y, x].tolist()) for y in (0, 1) for x in (0, 1)] == [unknown, right, wrong, right]
