"""Generated scenes: seeded, any size, three kinds of truth that agree, and too hard for a linear model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bidensify.data import build_dataset
from bidensify.errors import BidensifyError


def scenes(split: str = "train", **options: object) -> object:
    return build_dataset("scenes", split, **{"size": (48, 64), "length": 24, "seed": 0, **options})


def test_same_seed_same_scene_and_splits_differ() -> None:
    first, second = scenes(), scenes()
    for key in ("image", "mask", "depth"):
        assert torch.equal(first[5][key], second[5][key])
    assert not torch.equal(first[5]["image"], scenes("val")[5]["image"])
    assert not torch.equal(first[5]["image"], scenes(seed=1)[5]["image"])
    assert torch.equal(first[3]["image"], scenes(length=4)[3]["image"])


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (65, 33)])
def test_any_size(size: tuple[int, int]) -> None:
    sample = scenes(size=size, length=2)[1]
    assert sample["image"].shape == (3, *size)
    assert sample["image"].dtype == torch.uint8
    assert sample["mask"].shape == size
    assert sample["mask"].dtype == torch.int64
    assert sample["depth"].shape == size
    assert sample["depth"].dtype == torch.float32
    assert torch.isfinite(sample["depth"]).all()


def test_all_classes_occur_and_objects_stand_before_the_sky() -> None:
    dataset = scenes(length=60)
    masks = torch.stack([dataset[i]["mask"] for i in range(60)])
    depths = torch.stack([dataset[i]["depth"] for i in range(60)])
    assert set(masks.unique().tolist()) == set(range(dataset.info.num_classes))
    names = list(dataset.info.class_names)
    sky, thing = names.index("sky"), names.index("crate")
    # Sky has no distance: it is invalid (0) or the farthest there is.
    beyond = depths[masks == sky]
    assert (beyond == 0).all() or beyond.min() >= depths[masks == thing].max()


def test_a_linear_model_fails() -> None:
    """A linear classifier per pixel on colour and place: what it reaches, a network has to beat clearly."""
    dataset = scenes(length=60)
    y, x = np.mgrid[0:48, 0:64] / 48

    def features(index: int) -> tuple[np.ndarray, np.ndarray]:
        image = dataset[index]["image"].numpy().reshape(3, -1) / 255
        rows = np.concatenate([image, y.reshape(1, -1), x.reshape(1, -1), np.ones((1, image.shape[1]))])
        return rows.T, dataset[index]["mask"].numpy().ravel()

    train = [features(i) for i in range(40)]
    inputs, labels = np.concatenate([t[0] for t in train]), np.concatenate([t[1] for t in train])
    classes = dataset.info.num_classes
    weights = np.linalg.lstsq(inputs, np.eye(classes)[labels], rcond=None)[0]
    test = [features(i) for i in range(40, 60)]
    truth = np.concatenate([t[1] for t in test])
    guess = (np.concatenate([t[0] for t in test]) @ weights).argmax(1)
    ious = [((guess == c) & (truth == c)).sum() / max(1, ((guess == c) | (truth == c)).sum()) for c in np.unique(truth)]
    assert np.mean(ious) < 0.25


@pytest.mark.parametrize("options", [{"size": (0, 4)}, {"length": 0}, {"sizes": (8, 8)}])
def test_mistakes(options: dict[str, object]) -> None:
    with pytest.raises(BidensifyError, match=next(iter(options))):
        scenes(**options)
    with pytest.raises(BidensifyError, match="tset"):
        scenes("tset")
