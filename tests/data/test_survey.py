"""What a data set holds against what it says, before a day of training shows it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bidensify.data import Scenes, Seeded, build_dataset, build_transforms, check_dataset, survey
from bidensify.data.base import DenseDataset
from bidensify.errors import DataError


def write(root: Path, masks: list[np.ndarray], kind: str = "labels", sizes: bool = False) -> Path:
    for number, mask in enumerate(masks):
        for name, values in (("images", np.zeros((*mask.shape[:2], 3), np.uint8)), (kind, mask)):
            path = root / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    return root


def folder(root: Path, **options: object) -> DenseDataset:
    return build_dataset("image_mask_folder", "train", root=str(root), **options)


def split(low: int, high: int, shape: tuple[int, int] = (4, 6)) -> np.ndarray:
    mask = np.full(shape, low, np.uint8)
    mask[:, : shape[1] // 2] = high
    return mask


def test_masks_of_0_and_255(tmp_path: Path) -> None:
    """The ignored label swallows the foreground: training would report a perfect score."""
    root = write(tmp_path, [split(0, 255), split(0, 255)])
    with pytest.raises(
        DataError, match=r"data.train: .*class 1 \(leaf\) never occurs and 50.0%.*label_map: \{255: 1\}"
    ):
        check_dataset(folder(root, class_names=["ground", "leaf"]), "data.train")
    report = check_dataset(folder(root, classes=2, label_map={255: 1}))
    assert report is not None
    assert report.warnings == ()
    assert dict(report.count.labels) == {0: 24, 1: 24}
    # Keys that went through a recipe's JSON are texts.
    assert dict(check_dataset(folder(root, classes=2, label_map={"255": 1})).count.labels) == {0: 24, 1: 24}
    with pytest.raises(DataError, match=r"outside the classes: 255 \(2 images\).*0 and 255 need label_map: \{255: 1\}"):
        check_dataset(folder(root, classes=2, ignore_index=254))


def test_labels_that_start_at_one_and_other_strangers(tmp_path: Path) -> None:
    root = write(tmp_path, [split(1, 2), split(3, 3)])
    with pytest.raises(DataError, match=r"outside the classes: 3 \(1 images\).*start at 1 need label_map: \{1: 0"):
        check_dataset(folder(root, classes=3))
    with pytest.raises(DataError, match=r"outside the classes: 2 \(1 images\), 3 \(1 images\).*ignore_index=9"):
        check_dataset(folder(root, classes=2, ignore_index=9))


def test_what_is_odd_but_possible_is_told(tmp_path: Path) -> None:
    root = write(tmp_path, [split(0, 2), split(255, 255), split(255, 255, (8, 6))])
    report = check_dataset(folder(root, class_names=["a", "b", "c", "d"]), "data.train")
    assert report is not None
    never, ignored = report.warnings
    assert "2 of 4 classes never occur: 1 b, 3 d" in never
    assert "75.0% of the pixels are 255" in ignored
    assert report.summary == "data.train: 3 images of 4x6 to 8x6; 2 of 4 classes occur, 75.0% ignored"
    assert dict(report.count.sizes) == {(4, 6): 2, (8, 6): 1}


def test_nothing_labelled(tmp_path: Path) -> None:
    root = write(tmp_path, [split(255, 255)])
    with pytest.raises(DataError, match="not one pixel is labelled"):
        check_dataset(folder(root, classes=3))


def test_depth_of_zero(tmp_path: Path) -> None:
    empty, some = np.zeros((4, 6), np.uint16), np.full((4, 6), 2500, np.uint16)
    some[0] = 0
    root = write(tmp_path, [empty, some], "depth")
    report = check_dataset(folder(root, depth=True))
    assert report is not None
    assert "depth 2.5 to 2.5 m, valid in 37.5% of the pixels" in report.summary
    assert report.warnings == ("data: 1 of 2 depth maps have no valid pixel; they do not count",)
    with pytest.raises(DataError, match="not one of 24 pixels has a depth"):
        check_dataset(folder(write(tmp_path / "b", [empty], "depth"), depth=True))


def test_every_broken_file_is_counted(tmp_path: Path) -> None:
    root = write(tmp_path, [split(0, 1) for _ in range(9)])
    for number in range(7):
        (root / "train" / "labels" / f"{number}.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"(?s)7 of 9 samples cannot be used:.*0\.png.*and 2 more"):
        check_dataset(folder(root, classes=2))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff", ".npy"])
def test_an_image_that_was_cut_off_is_found_before_training(tmp_path: Path, suffix: str) -> None:
    root = write(tmp_path, [split(0, 1, (40, 50)) for _ in range(3)])
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    victim = root / "train" / "images" / f"1{suffix}"
    (root / "train" / "images" / "1.png").unlink()
    if suffix == ".npy":
        np.save(victim, noise)
    else:
        Image.fromarray(noise).save(victim)
    whole = victim.read_bytes()
    assert check_dataset(folder(root, classes=2)) is not None
    victim.write_bytes(whole + b"written by the camera" * 9)  # behind the end
    assert check_dataset(folder(root, classes=2)) is not None
    victim.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=rf"data: .*1{suffix}' is (truncated|not an image)"):
        check_dataset(folder(root, classes=2))


def test_a_size_that_evaluation_refuses(tmp_path: Path) -> None:
    data = folder(write(tmp_path, [split(0, 1), split(0, 1, (9, 6))]), classes=2)
    data.transforms = build_transforms(False, (8, 8), resize="pad")
    with pytest.raises(DataError, match="an image is 9x6, larger than the size 8x8"):
        check_dataset(data)


def test_the_result_is_remembered_until_a_file_or_an_option_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIDENSIFY_CACHE", str(tmp_path / "cache"))
    root = write(tmp_path / "data", [split(0, 1), split(0, 1)])
    first = survey(folder(root, classes=3))
    reads: list[int] = []
    whole = type(folder(root, classes=3)).count
    monkeypatch.setattr(
        "bidensify.data.filedata.FileDataset.count", lambda self, index: (reads.append(index), whole(self, index))[1]
    )
    assert survey(folder(root, classes=3)) == first
    assert reads == []
    assert survey(folder(root, classes=3, label_map={1: 2})).labels == {0: 24, 2: 24}
    assert len(reads) == 2
    mask = root / "train" / "labels" / "0.png"
    Image.fromarray(split(0, 2)).save(mask)
    os.utime(mask, ns=(1, 1))
    assert survey(folder(root, classes=3)).labels == {0: 24, 1: 12, 2: 12}
    assert len(reads) == 4
    for path in (tmp_path / "cache").rglob("*.json"):  # a damaged memory is no memory
        path.write_text(json.dumps({"images": 1}) if "0" in path.name else "{", encoding="utf-8")
    assert survey(folder(root, classes=3)).labels == {0: 24, 1: 12, 2: 12}


def test_generated_data_is_looked_at_in_part_and_wrappers_are_opened() -> None:
    report = check_dataset(Seeded(Scenes("val", size=(16, 16), length=100), 0), "val")
    assert report is not None
    assert report.count.images == 50
    assert "100 images (50 of them looked at) of 16x16" in report.summary
    assert check_dataset([1, 2]) is None


def test_multilabel_planes(tmp_path: Path) -> None:
    planes = np.zeros((4, 6, 3), np.uint8)
    planes[:2, :, 0] = 255
    planes[:, :3, 2] = 255
    report = check_dataset(folder(write(tmp_path, [planes]), classes=3, multilabel=True))
    assert report is not None
    assert dict(report.count.labels) == {0: 12, 2: 12}
    assert "1 of 3 classes never occur: 1 class_1" in report.warnings[0]
