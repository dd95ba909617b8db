"""What a recipe says about images: how files are read, how they come to the network, what goes along with a packed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import tv_tensors

from bidensify.errors import ConfigError
from bidensify.recipe import Recipe, load_recipe
from bidensify.recipe.portable import portable
from bidensify.train import run_recipe


def recipe(root: Path, **data: Any) -> Recipe:
    folder = {"name": "image_mask_folder", "class_names": ["ground", "leaf"], "image_max": 4095, "cache": True}
    return load_recipe({
        "name": "deep", "task": {"name": "binary"}, "evaluate": {"resize": "native", "multiple": 8},
        "data": {"val": {**folder, "split": "val"}, "root": str(root), "size": [16, 16], "in_channels": 1, **data},
        "stages": [{"name": "a", "binarize": "none", "epochs": 1, "lr": 0.1}],
    })  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for kind, values in (("images", np.full((9, 17), 2048, np.uint16)), ("labels", np.ones((9, 17), np.uint8))):
        (tmp_path / "val" / kind).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / "val" / kind / "a.png")
    return tmp_path


def test_files_are_read_as_the_data_set_reads_them(root: Path) -> None:
    loaded = recipe(root)
    reader, transforms = loaded.image_input()
    image = reader.tensor(root / "val" / "images" / "a.png")
    assert torch.allclose(image, torch.full((1, 9, 17), 2048 / 4095))
    sample, own = transforms({"image": tv_tensors.Image(image)}), loaded.build_dataset("val")[0]
    assert torch.equal(sample["image"], own["image"])
    assert sample["extent"].tolist() == own["extent"].tolist() == [9, 17, 16, 24]


def test_a_network_on_its_own_knows_its_input_and_its_task(root: Path, tmp_path: Path) -> None:
    kept = load_recipe(portable(recipe(root)))
    assert kept.data.root is None
    reader, transforms = kept.image_input()
    image = reader.tensor(root / "val" / "images" / "a.png")
    wanted = recipe(root).build_dataset("val")[0]["image"]
    assert torch.equal(transforms({"image": tv_tensors.Image(image)})["image"], wanted)
    assert kept.build_task().class_names == ("leaf",)  # type: ignore[attr-defined]


def test_mean_says_how_many_channels(root: Path) -> None:
    loaded = recipe(root, in_channels=None, mean=[0.5], std=[0.2])
    assert loaded.build_dataset("val")[0]["image"].shape == (1, 16, 24)
    assert loaded.image_input()[0].channels == 1


def test_recipes_from_before_metrics_at_the_labels_own_size() -> None:
    data = {
        "name": "old",
        "task": {"name": "depth"},
        "stages": [{"name": "a", "binarize": "none", "epochs": 1, "lr": 0.1}],
    }
    assert load_recipe({**data, "data": {"keep_target_size": True}}).evaluate.resize == "letterbox"
    with pytest.warns(UserWarning, match="keep_target_size is gone.*evaluate.resize is squash"):
        load_recipe({**data, "data": {"keep_target_size": False}})
    with pytest.raises(ConfigError, match="evaluate.resize"):
        load_recipe({**data, "evaluate": {"resize": "stretch"}})


@pytest.mark.parametrize("bands", [1, 5])
def test_networks_of_other_channels_train_from_a_recipe(bands: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split, sizes in (("train", [(20, 30)] * 4), ("val", [(20, 30), (31, 17)])):
        for kind in ("images", "labels"):
            (tmp_path / split / kind).mkdir(parents=True)
        for number, size in enumerate(sizes):
            values = random.integers(0, 4096, (*size, bands), dtype=np.uint16)
            np.save(tmp_path / split / "images" / f"{number}.npy", values)
            Image.fromarray((values[..., 0] > 2000).astype(np.uint8)).save(
                tmp_path / split / "labels" / f"{number}.png"
            )
    folder = {"name": "image_mask_folder", "classes": 2, "image_max": 4095}
    loaded = load_recipe({
        "name": "bands", "model": {"source": "demo:unet", "options": {"num_classes": 2, "width": 4, "in_channels": bands}},
        "data": {"train": {**folder, "split": "train"}, "val": {**folder, "split": "val"}, "root": str(tmp_path)}
        | {"size": [16, 16], "batch_size": 2, "in_channels": bands},
        "teacher": {"stages": [{"name": "t", "binarize": "none", "epochs": 1, "lr": 1e-3}]},
        "task": {"name": "segmentation"}, "log": {"tensorboard": False}, "calibrate": {"batches": 1},
        "stages": [{"name": "s", "binarize": "all", "epochs": 1, "lr": 1e-3, "losses": {"task": 1, "kl": 1}}],
    })  # fmt: skip
    run_recipe(loaded, tmp_path / "teacher", role="teacher", quiet=True)
    result = run_recipe(loaded, tmp_path / "student", teacher_weights=tmp_path / "teacher", quiet=True)
    assert 0 <= result.metrics["miou"] <= 1


@pytest.mark.parametrize("resize", ["letterbox", "native", "squash"])
def test_calibration_sees_what_inference_sees(resize: str, recipe_text: str) -> None:
    """Training crops have another size than images at inference, and are mirrored and coloured at random."""
    text = recipe_text.replace(
        "size: [32, 32]", "size: [32, 64]\n  train_size: [16, 16]\n  augment: {color_jitter: 0.9}"
    )
    loaded = load_recipe({**yaml.safe_load(text), "evaluate": {"resize": resize}})
    images = loaded.calibration_images((32, 64), 3)
    assert [tuple(image.shape) for image in images] == [(1, 3, 32, 64)] * 3
    # Images of the data set come at this size: each way of fitting leaves them as they are, like evaluation's.
    plain = loaded.build_dataset("train")
    plain.transforms = loaded.build_dataset("val").transforms
    assert all(torch.equal(image[0], plain[2 * i]["image"]) for i, image in enumerate(images))
