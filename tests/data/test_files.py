"""Layouts of data sets that users have: sub-folders, suffixes, lists, palettes, other label numbers; and their mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bidensify.data import build_dataset
from bidensify.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)


def put(path: Path, values: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8) if values is None else values).save(path)


def labels(value: int) -> np.ndarray:
    return np.full((6, 8), value, np.uint8)


def folder(root: Path, split: str = "train", **options: object) -> object:
    return build_dataset("image_mask_folder", split, **{"root": str(root), "classes": 3, **options})


def test_sub_folders_and_suffixes(tmp_path: Path) -> None:
    for town, label in (("aachen", 1), ("bonn", 2)):
        put(tmp_path / "left" / "train" / town / "x_left.png")
        put(tmp_path / "fine" / "train" / town / "x_labels.png", labels(label))
        put(tmp_path / "fine" / "train" / town / "x_colour.png")
        (tmp_path / "left" / "train" / town / ".DS_Store").write_bytes(b"x")
    options = {"images": "left/{split}", "masks": "fine/{split}", "image_suffix": "_left", "mask_suffix": "_labels"}
    dataset = folder(tmp_path, **options)
    assert [dataset.name_of(i) for i in range(2)] == ["aachen/x", "bonn/x"]
    assert [int(dataset[i]["mask"].unique()) for i in range(2)] == [1, 2]
    with pytest.raises(DataError, match="_right"):
        folder(tmp_path, **{**options, "image_suffix": "_right"})


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    for kind, values in (("images", None), ("labels", labels(1))):
        put(tmp_path / "train" / kind / "a" / "0.png", *([] if values is None else [values]))
        put(tmp_path / "store" / kind / "1.png", *([] if values is None else [values]))
        (tmp_path / "train" / kind / "b").symlink_to(tmp_path / "store" / kind)
        (tmp_path / "store" / kind / "up").symlink_to(tmp_path / "train" / kind)
        (tmp_path / "train" / kind / "a" / "self").symlink_to(tmp_path / "train" / kind / "a")
    dataset = folder(tmp_path)
    assert [dataset.name_of(i) for i in range(len(dataset))] == ["a/0", "b/1"]


def test_list_of_stems_and_splits(tmp_path: Path) -> None:
    for stem in "abc":
        put(tmp_path / "jpeg" / f"{stem}.jpg")
        put(tmp_path / "seg" / f"{stem}.png", labels(0))
    (tmp_path / "val.txt").write_text("c\n\na\n", encoding="utf-8")
    splits = {"val": {"images": "jpeg", "masks": "seg", "stems": "val.txt"}, "all": {"images": "jpeg", "masks": "seg"}}
    dataset = folder(tmp_path, "val", splits=splits)
    assert [dataset.name_of(i) for i in range(len(dataset))] == ["c", "a"]
    assert len(folder(tmp_path, "all", splits=splits)) == 3
    with pytest.raises(ConfigError, match="'tset'.*val, all"):
        folder(tmp_path, "tset", splits=splits)
    with pytest.raises(ConfigError, match="pictures"):
        folder(tmp_path, "val", splits={"val": {"pictures": "jpeg", "masks": "seg"}})
    for content, quoted in (("z\n", "'z'"), ("\n", "empty")):
        (tmp_path / "val.txt").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=quoted):
            folder(tmp_path, "val", splits=splits)


def test_two_files_of_one_stem(tmp_path: Path) -> None:
    put(tmp_path / "train" / "images" / "a.png")
    put(tmp_path / "train" / "images" / "a.jpg")
    put(tmp_path / "train" / "labels" / "a.png", labels(0))
    with pytest.raises(DataError, match="one stem"):
        folder(tmp_path)


def test_palette_masks_grey_images_and_label_map(tmp_path: Path) -> None:
    put(tmp_path / "train" / "images" / "a.png", labels(7))
    indices = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) % 2 * 7)
    indices = indices.convert("P")
    raw = np.array(indices)
    path = tmp_path / "train" / "labels" / "a.png"
    path.parent.mkdir(parents=True)
    indices.save(path)
    dataset = folder(tmp_path, label_map={int(raw[0, 0]): 2, int(raw[0, 1]): 255})
    sample = dataset[0]
    assert sample["image"].shape == (3, 6, 8)
    assert sample["mask"].tolist() == np.where(raw == raw[0, 0], 2, 255).tolist()
    with pytest.raises(DataError, match="label_map"):
        folder(tmp_path, label_map={0: 5})[0]


def test_cached_samples_cannot_be_spoilt(tmp_path: Path) -> None:
    put(tmp_path / "train" / "images" / "a.png")
    put(tmp_path / "train" / "labels" / "a.png", labels(1))
    dataset = folder(tmp_path, cache=True)
    before = {key: value.clone() for key, value in dataset[0].items()}
    for value in dataset[0].values():
        value.zero_()
    assert all(torch.equal(dataset[0][key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"classes": None}, "classes=None"),
        ({"classes": 1}, "classes=1"),
        ({"class_names": ["a"]}, "class_names has 1"),
        ({"palette": [[0, 0, 0]]}, "palette has 1"),
        ({"depth_scale": 0}, "depth_scale=0"),
    ],
)
def test_options(tmp_path: Path, options: dict[str, object], quoted: str) -> None:
    put(tmp_path / "train" / "images" / "a.png")
    put(tmp_path / "train" / "labels" / "a.png", labels(1))
    with pytest.raises(ConfigError, match=quoted):
        folder(tmp_path, **options)


def test_images_of_more_than_8_bits(tmp_path: Path) -> None:
    put(tmp_path / "train" / "images" / "a.png", np.full((6, 8), 4095, np.uint16))
    put(tmp_path / "train" / "labels" / "a.png", labels(1))
    image = folder(tmp_path)[0]["image"]
    assert (image.shape, image.dtype) == ((3, 6, 8), torch.float32)
    assert torch.allclose(image, torch.full((3, 6, 8), 4095 / 65535))
    grey = folder(tmp_path, channels=1, image_max=4095)
    assert torch.equal(grey[0]["image"], torch.ones(1, 6, 8))
    assert (len(grey.info.mean), len(grey.info.std)) == (1, 1)
