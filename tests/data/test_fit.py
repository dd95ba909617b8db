"""Evaluation images of any size: how they come to the network's size, and how predictions come back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import tv_tensors

from bidensify.data import DataInfo, DenseDataset, Fit, Sample, build_transforms
from bidensify.errors import ConfigError, DataError
from bidensify.tasks import SegmentationTask, predict_image, restore
from bidensify.train.evaluation import evaluate

MODES = ("letterbox", "pad", "native", "cover", "squash")
SIZES = [(40, 50), (64, 64), (50, 40), (60, 30), (33, 47)]


def fit(mode: str, size: tuple[int, int] = (64, 64), multiple: int = 16) -> Fit:
    return build_transforms(False, size, (0.5,) * 3, (0.5,) * 3, resize=mode, multiple=multiple)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("mode", "size", "inner", "outer"),
    [
        ("letterbox", (90, 30), (64, 21), (64, 64)),
        ("letterbox", (10, 40), (16, 64), (64, 64)),
        ("letterbox", (1, 1000), (1, 64), (64, 64)),
        ("squash", (90, 30), (64, 64), (64, 64)),
        ("native", (90, 30), (90, 30), (96, 32)),
        ("pad", (60, 30), (60, 30), (64, 64)),
    ],
)
def test_sizes(mode: str, size: tuple[int, int], inner: tuple[int, int], outer: tuple[int, int]) -> None:
    sample = {"image": tv_tensors.Image(torch.full((3, *size), 255, dtype=torch.uint8))}
    out = fit(mode)(sample)
    assert out["extent"].tolist() == [*inner, *outer]
    assert out["image"].shape == (3, *outer)
    assert torch.equal(out["image"][:, : inner[0], : inner[1]], torch.ones(3, *inner))
    # Padding has the mean colour: 0 after normalisation.
    assert out["image"].sum() == 3 * inner[0] * inner[1]


def test_options_that_cannot_be() -> None:
    with pytest.raises(DataError, match="65x3, larger than the size 64x64.*letterbox or native"):
        fit("pad")({"image": tv_tensors.Image(torch.zeros(3, 65, 3, dtype=torch.uint8))})
    with pytest.raises(ConfigError, match="resize='stretch'.*letterbox, pad, native, cover, squash"):
        fit("stretch")
    with pytest.raises(ConfigError, match="multiple=0"):
        fit("native", multiple=0)
    with pytest.raises(DataError, match="4 channels, mean and std have 3 entries"):
        fit("native")({"image": tv_tensors.Image(torch.zeros(4, 8, 8, dtype=torch.uint8))})


@settings(max_examples=60, deadline=None)
@given(
    st.integers(8, 70), st.integers(8, 70), st.sampled_from(("letterbox", "native", "squash")), st.sampled_from((1, 4))
)
def test_a_ramp_comes_back_as_the_ramp_of_the_image(height: int, width: int, mode: str, stride: int) -> None:
    """Bilinear resizing keeps straight lines, so every pixel's place in the image has to return to that pixel."""
    inner, outer = fit(mode).sizes(height, width)

    def ramp(lengths: tuple[int, int], grid: tuple[int, int], step: int) -> Tensor:
        axes = [((torch.arange(n // step).double() + 0.5) * step / length) for n, length in zip(grid, lengths)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]

    back = restore(ramp(inner, outer, stride), torch.tensor([[*inner, *outer]]), (height, width))
    wanted = ramp((height, width), (height, width), 1)
    # At a border, interpolation holds the outermost value instead of the line: half a step of the coarse grid.
    slack = max(stride / inner[0], stride / inner[1], 1 / height, 1 / width)
    assert (back - wanted).abs().max() <= slack / 2 + 1e-9
    middle = (slice(None), slice(None), slice(height // 3, height - height // 3), slice(width // 3, width - width // 3))
    if min(inner) > 6 * stride:
        assert (back - wanted)[middle].abs().max() < 1e-9


def test_no_extent_means_the_whole_input_and_batches_may_mix() -> None:
    prediction = torch.rand(2, 3, 8, 8)
    assert torch.equal(restore(prediction, None, (8, 8)), prediction)
    extent = torch.tensor([[8, 8, 8, 8], [4, 8, 8, 8]])
    both = restore(prediction, extent, (8, 8))
    assert torch.equal(both[0], prediction[0])
    assert torch.equal(both[1:], nn.functional.interpolate(prediction[1:, :, :4], (8, 8), mode="bilinear"))


class Blocks(DenseDataset):
    """Images of several sizes in which red is one class and green the other."""

    info = DataInfo(2, ("red", "green"), ((255, 0, 0), (0, 255, 0)), mean=(0.5,) * 3, std=(0.5,) * 3)

    def __len__(self) -> int:
        return len(SIZES)

    def load(self, index: int) -> Sample:
        height, width = SIZES[index]
        mask = torch.zeros(height, width, dtype=torch.int64)
        mask[height // 4 : height // 2, width // 3 :] = 1
        image = torch.stack([(1 - mask) * 255, mask * 255, mask * 0]).to(torch.uint8)
        return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask)}


class Seer(nn.Module):
    """Scores are the colours themselves, at 1/2 of the input's size if asked; padding is called green."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        scores = x[:, :2] + torch.tensor([0.0, 0.5]).view(1, 2, 1, 1) * (x[:, :2].abs().sum(1, keepdim=True) == 0)
        return nn.functional.avg_pool2d(scores, self.stride)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_of_several_sizes_at_the_images_own(mode: str, workers: int) -> None:
    data = Blocks(fit(mode))
    got = evaluate(Seer(1), SegmentationTask(2), data, batch_size=3, workers=workers)
    half = evaluate(Seer(2), SegmentationTask(2), data, batch_size=3)
    # One pixel's border of the green block may go either way where pixels are resized.
    assert got["miou"] == 1 if mode in ("pad", "native") else got["miou"] > 0.93
    assert half["miou"] > 0.9
    for index, (height, width) in enumerate(SIZES):
        sample = data.load(index)
        values = predict_image(Seer(1), SegmentationTask(2), sample["image"], fit(mode))
        assert values.shape == (height, width)
        assert (values == sample["mask"]).float().mean() > 0.97
