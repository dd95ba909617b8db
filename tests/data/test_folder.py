"""``image_mask_folder``: what it reads, and an error for every kind of broken data set."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bidensify.data import Seeded, build_dataset, build_transforms
from bidensify.errors import BidensifyError, DataError


def write(folder: Path, count: int = 3, size: tuple[int, int] = (12, 16)) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    masks = {}
    for kind in ("images", "labels"):
        (folder / "train" / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        masks[f"s{number}"] = random.integers(0, 4, size, dtype=np.uint8)
        Image.fromarray(image).save(folder / "train" / "images" / f"s{number}.png")
        Image.fromarray(masks[f"s{number}"]).save(folder / "train" / "labels" / f"s{number}.png")
    return masks


def build(folder: Path, **options: object) -> object:
    return build_dataset("image_mask_folder", "train", **{"root": str(folder), "classes": 4, **options})


@pytest.mark.parametrize("cache", [False, True])
def test_reads_what_is_there(tmp_path: Path, cache: bool) -> None:
    masks = write(tmp_path)
    dataset = build(tmp_path, cache=cache)
    assert len(dataset) == 3
    for index in range(3):
        sample = dataset[index]
        assert sample["image"].dtype == torch.uint8
        assert sample["image"].shape == (3, 12, 16)
        assert np.array_equal(sample["mask"].numpy(), masks[dataset.name_of(index)])


def broken(folder: Path, kind: str) -> str:
    """Breaks a data set in one way; returns what the error has to name."""
    train = folder / "train"
    mask, image = train / "labels" / "s1.png", train / "images" / "s1.png"
    if kind == "label outside the classes":
        Image.fromarray(np.full((12, 16), 9, np.uint8)).save(mask)
        return "9"
    if kind == "mask of another size":
        Image.fromarray(np.zeros((12, 15), np.uint8)).save(mask)
        return "15"
    if kind == "missing mask":
        mask.unlink()
        return "s1"
    if kind == "mask without image":
        image.unlink()
        return "s1"
    if kind == "empty file":
        image.write_bytes(b"")
        return "s1"
    if kind == "truncated file":
        image.write_bytes(image.read_bytes()[:60])
        return "s1"
    if kind == "colour mask":
        Image.fromarray(np.full((12, 16, 3), (0, 0, 200), np.uint8)).save(mask)
        return r"s1\.png.*\(0, 0, 200\).*mask_colours"
    for path in (train / "images").iterdir():
        path.unlink()
    return "images"


@pytest.mark.parametrize(
    "kind",
    [
        "label outside the classes", "mask of another size", "missing mask", "mask without image", "empty file",
        "truncated file", "colour mask", "empty folder",
    ],
)  # fmt: skip
@pytest.mark.parametrize("cache", [False, True])
def test_broken_data_sets_are_named(tmp_path: Path, kind: str, cache: bool) -> None:
    write(tmp_path)
    word = broken(tmp_path, kind)
    with pytest.raises(DataError, match=word):
        dataset = build(tmp_path, cache=cache)
        for index in range(len(dataset)):
            dataset[index]


def test_missing_root_and_unknown_options(tmp_path: Path) -> None:
    with pytest.raises(BidensifyError, match="is not a folder"):
        build(tmp_path / "none")
    write(tmp_path)
    with pytest.raises(BidensifyError, match="clases"):
        build(tmp_path, clases=4)
    with pytest.raises(BidensifyError, match="scenery"):
        build_dataset("scenery", "train")


def test_depth_maps_are_scaled_and_zero_is_invalid(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train" / "depth").mkdir()
    steps = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16)
    for number in range(3):
        Image.fromarray(steps).save(tmp_path / "train" / "depth" / f"s{number}.png")
    dataset = build_dataset("image_mask_folder", "train", root=str(tmp_path), depth=True, depth_scale=0.5)
    assert np.allclose(dataset[0]["depth"].numpy(), steps * 0.5)
    assert dataset[0]["depth"][0, 0] == 0


def test_seeded_samples_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = build(tmp_path)
    dataset.transforms = build_transforms(True, (8, 8), ignore_index=255)
    first, second = Seeded(dataset, 3), Seeded(dataset, 3)
    torch.manual_seed(1)
    a = [first[i]["image"] for i in (0, 1, 2)]
    torch.manual_seed(2)
    b = [second[i]["image"] for i in (2, 1, 0)][::-1]
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    second.set_epoch(1)
    assert not torch.equal(second[0]["image"], a[0])
    assert not torch.equal(Seeded(dataset, 4)[0]["image"], a[0])


def shared(name: str) -> Path:
    places = [Path(os.environ["BIDENSIFY_DATA"])] if "BIDENSIFY_DATA" in os.environ else []
    places.append(Path(__file__).parents[3] / "shared" / "data")
    for place in places:
        if (place / name).is_dir():
            return place / name
    pytest.skip(f"{name} is not here (looked for a shared/data folder beside the checkout and in BIDENSIFY_DATA)")


def test_camvid() -> None:
    dataset = build_dataset(
        "image_mask_folder", "val", root=str(shared("camvid")), masks="{split}/labels", classes=11, ignore_index=11
    )
    assert len(dataset) == 101
    sample = dataset[0]
    assert sample["image"].shape == (3, 360, 480)
    assert set(sample["mask"].unique().tolist()) <= set(range(12))


def test_nyuv2() -> None:
    dataset = build_dataset("image_mask_folder", "val", root=str(shared("nyuv2")), depth=True, depth_scale=1 / 255)
    assert len(dataset) == 99
    assert 0 <= dataset[0]["depth"].min() <= dataset[0]["depth"].max() <= 1
