"""Images to calibrate an int8 rest with are those of the file, or refused before anything long begins."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from bidensify.deploy.export.several import calibration
from bidensify.errors import ConfigError

X = torch.zeros(1, 3, 32, 48)


@pytest.mark.parametrize(
    "images", [[X], [X, (X,)], [{"x": X}], [[X]]], ids=["a tensor", "a tuple", "keywords", "a list"]
)
def test_images_of_the_files_shape_are_taken(images: list[Any]) -> None:
    calibration(images, (X,), {}, fixed=True)
    calibration(images, (X,), {}, fixed=False)


@pytest.mark.parametrize(
    ("image", "fixed", "said"),
    [
        (
            X[..., :24],
            True,
            "int8_rest[1] has the shape [1, 3, 32, 24], and the file is for [1, 3, 32, 48]: give images of that",
        ),
        (X.expand(2, -1, -1, -1), True, "[2, 3, 32, 48]"),
        (
            X[:, :1],
            False,
            "[1, 1, 32, 48], and the file is for [1, 3, 32, 48]: give images of as many dimensions and channels",
        ),
        ((X, X), False, "has the shape [1, 3, 32, 48], [1, 3, 32, 48], and"),
    ],
)
def test_others_are_refused(image: Any, fixed: bool, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        calibration([X, image], (X,), {}, fixed=fixed)


def test_sizes_may_differ_where_they_vary() -> None:
    calibration([X, X[..., :24]], (X,), {}, fixed=False)


def test_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs example inputs to calibrate with, at least one"):
        calibration([], (X,), {}, fixed=True)


def test_named_inputs_come_in_the_files_order_and_others_are_refused() -> None:
    kwargs = {"image": X, "depth": X + 1}
    (ordered,) = calibration([{"depth": X + 3, "image": X + 2}], (), kwargs, fixed=True)
    assert list(ordered) == ["image", "depth"]
    assert ordered["image"].max() == 2
    for names in (("image",), ("image", "depth", "mask"), ("image", "dept")):
        with pytest.raises(ConfigError, match="and the file's are 'image', 'depth': give these"):
            calibration([kwargs, dict.fromkeys(names, X)], (), kwargs, fixed=True)
