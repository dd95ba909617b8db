"""Augmentation: image, mask and depth stay aligned, borders are filled by kind, depth follows the zoom."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

from bidensify.data import Depth, build_transforms, denormalise
from bidensify.data.fit import resize
from bidensify.data.transforms import RandomScaleCrop
from bidensify.errors import ConfigError


def sample(height: int, width: int, blocks: int = 4) -> dict[str, Tensor]:
    """Blocks of one label each; the image's three channels and the depth are functions of the label."""
    rows = torch.arange(height) * blocks // height
    columns = torch.arange(width) * blocks // width
    mask = rows[:, None] * blocks + columns
    image = (mask * 10 + 20).to(torch.uint8).expand(3, height, width).contiguous()
    return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask), "depth": Depth(mask.float() + 1)}


def plain(values: Tensor) -> Tensor:
    return values.as_subclass(Tensor)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000), st.tuples(st.integers(12, 60), st.integers(12, 60)), st.sampled_from([(24, 32), (33, 17)])
)
@example(0, (12, 12), (33, 17))
def test_mask_and_image_stay_aligned(seed: int, source: tuple[int, int], size: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    step = RandomScaleCrop(size, (0.4, 2.5), fill=[0, 0, 0], ignore_index=255)
    out = step(sample(*source))
    image, mask, depth = plain(out["image"]), plain(out["mask"]), plain(out["depth"])
    assert image.shape == (3, *size)
    assert mask.shape == depth.shape == size
    inside = mask != 255
    assert torch.equal(inside, depth > 0)
    assert torch.equal(inside, image[0] > 0)
    # Labels are never mixed: what is inside is a label of the source, and depth / (label + 1) is one factor throughout.
    assert set(mask[inside].tolist()) <= set(range(16))
    factors = depth[inside] / (mask[inside] + 1)
    assert torch.allclose(factors, factors[0].expand_as(factors), rtol=1e-5)
    assert 1 / 2.5 - 1e-4 <= float(factors[0]) <= 1 / 0.4 + 1e-4
    # Away from block borders the image shows the label's own grey: a resize mixes pixels half a source pixel to either side, or
    # a whole one of the output's where that is more; each side is rounded to whole pixels by itself.
    enlarged = max(size[0] / source[0], size[1] / source[1]) / float(factors[0])
    reach = 2 + math.ceil(max(enlarged / 2, 1))
    padded = torch.nn.functional.unfold(
        torch.nn.functional.pad(mask.float()[None, None], [reach] * 4, value=-1), 2 * reach + 1
    ).view(-1, *size)
    flat = (padded == mask).all(0) & inside
    assert torch.equal(image[0][flat].long(), mask[flat] * 10 + 20)


@pytest.mark.parametrize(("zoom", "inside"), [(0.5, 0.25), (1.0, 1.0), (2.0, 1.0)])
def test_zoom_decides_how_much_of_the_crop_is_image(zoom: float, inside: float) -> None:
    step = RandomScaleCrop((32, 32), (zoom, zoom), fill=[0, 0, 0], ignore_index=99)
    out = step(sample(64, 64))
    assert (plain(out["mask"]) != 99).float().mean().item() == pytest.approx(inside, abs=0.02)
    labels = plain(out["mask"])
    assert torch.allclose(plain(out["depth"])[labels != 99], (labels[labels != 99] + 1) / zoom)


def test_flip_moves_image_mask_and_depth_together() -> None:
    transforms = build_transforms(
        True, (16, 16), hflip=True, scale=(1, 1), color_jitter=0, mean=(0, 0, 0), std=(1, 1, 1)
    )
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        out = transforms(sample(16, 16))
        flipped = bool(out["mask"][0, 0] != 0)
        seen.add(flipped)
        expected = sample(16, 16)["mask"].as_subclass(Tensor)
        expected = expected.flip(1) if flipped else expected
        assert torch.equal(out["mask"], expected)
        assert torch.equal(out["depth"], expected.float() + 1)
        assert torch.allclose(out["image"][0] * 255, expected * 10.0 + 20, atol=1e-3)
    assert seen == {True, False}


def test_evaluation_resizes_and_normalises() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    out = build_transforms(False, (8, 8), mean, std)(sample(16, 16))
    assert {type(value) for value in out.values()} == {Tensor}
    assert out["image"].dtype == torch.float32
    assert out["mask"].dtype == torch.int64
    assert out["mask"].shape == out["depth"].shape == (16, 16)
    grey = (sample(8, 8)["mask"].double() * 10 + 20) / 255
    for channel in range(3):
        centre = (grey[0, 0] - mean[channel]) / std[channel]
        assert out["image"][channel, 0, 0].item() == pytest.approx(centre.item(), abs=1e-5)
    back = denormalise(out["image"], mean, std)
    assert back.dtype == torch.uint8
    assert back[0, 0, 0] == 20


@settings(max_examples=30, deadline=None)
@given(*(st.integers(1, 20) for _ in range(4)))
def test_masks_take_the_nearest_pixel_centre(h: int, w: int, out_h: int, out_w: int) -> None:
    mask = tv_tensors.Mask(torch.arange(h * w).view(h, w))
    got = resize(mask, (out_h, out_w))
    assert isinstance(got, tv_tensors.Mask)
    for i in range(out_h):
        for j in range(out_w):
            # floor((i + 1/2) h / out): the source pixel that holds the centre of the output's.
            assert int(got[i, j]) == ((2 * i + 1) * h // (2 * out_h)) * w + (2 * j + 1) * w // (2 * out_w)


def test_colour_jitter_changes_the_image_alone() -> None:
    transforms = build_transforms(True, (16, 16), hflip=False, scale=(1, 1), color_jitter=0.5)
    torch.manual_seed(0)
    one, two = transforms(sample(16, 16)), transforms(sample(16, 16))
    assert not torch.equal(one["image"], two["image"])
    assert torch.equal(one["mask"], two["mask"])


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"size": (0, 8)}, "size"),
        ({"scale": (2.0, 1.0)}, "scale"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"color_jitter": 1.0}, "color_jitter"),
        ({"std": (0.0, 1.0, 1.0)}, "std"),
        ({"mean": (0.5,)}, "mean"),
    ],
)
def test_mistakes(options: dict[str, object], quoted: str) -> None:
    with pytest.raises(ConfigError, match=quoted):
        build_transforms(True, **{"size": (8, 8), **options})


def test_sizes_of_a_sample_must_agree() -> None:
    broken = sample(16, 16) | {"mask": tv_tensors.Mask(torch.zeros(8, 16, dtype=torch.int64))}
    with pytest.raises(ConfigError, match="must agree"):
        build_transforms(True, (8, 8))(broken)
