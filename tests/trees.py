"""Small trees of the benchmarks in their owners' layout, with files that only the tests have drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

from bidensify.data.sets.voc import voc_palette

RANDOM = np.random.default_rng(0)


def put(path: Path, values: np.ndarray, palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette is not None:
        image = image.convert("P")
        image.putdata(values.ravel().tolist())
        image.putpalette(palette)
    image.save(path)


def photo(path: Path, size: tuple[int, int] = (24, 32)) -> None:
    put(path, RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8))


def labels(values: list[int], size: tuple[int, int] = (24, 32)) -> np.ndarray:
    """Stripes of the given labels."""
    return np.array(values, np.uint8)[np.arange(size[1]) * len(values) // size[1]][None].repeat(size[0], 0)


def ade20k(root: Path) -> None:
    for folder, split in (("training", "train"), ("validation", "val")):
        for number in range(1, 5):
            name = f"ADE_{split}_{number:08d}"
            photo(root / "ADEChallengeData2016" / "images" / folder / f"{name}.jpg")
            put(root / "ADEChallengeData2016" / "annotations" / folder / f"{name}.png", labels([0, 1, 150, 3 * number]))
    (root / "ADEChallengeData2016" / "objectInfo150.txt").write_text("Idx\tRatio\n")


def voc(root: Path) -> None:
    base, flat = root / "VOCdevkit" / "VOC2012", [c for colour in voc_palette(256) for c in colour]
    names = [f"2007_{number:06d}" for number in range(8)]
    for name in names:
        photo(base / "JPEGImages" / f"{name}.jpg")
    for name in names[:6]:
        put(base / "SegmentationClass" / f"{name}.png", labels([0, 15, 255, 20]), flat)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, chosen in (("train", names[:3]), ("val", names[3:6]), ("trainval", names[:6])):
        (lists / f"{split}.txt").write_text("\n".join(chosen) + "\n")


def sbd(root: Path) -> None:
    """SBD knows VOC's images too: those of its val must stay out."""
    base = root / "benchmark_RELEASE" / "dataset"
    (base / "cls").mkdir(parents=True)
    for number in (1, 4, 6, 7):
        mask = np.empty((1, 1), object)
        mask[0, 0] = labels([0, 7])
        savemat(
            base / "cls" / f"2007_{number:06d}.mat", {"GTcls": {"Segmentation": labels([0, 7]), "Boundaries": mask}}
        )
    (base / "train.txt").write_text("2007_000001\n2007_000006\n")
    (base / "val.txt").write_text("2007_000004\n2007_000007\n")


def cityscapes(root: Path) -> None:
    for split, town in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        for number in range(2):
            name = f"{town}_{number:06d}_000019"
            photo(root / "leftImg8bit" / split / town / f"{name}_leftImg8bit.png")
            put(root / "gtFine" / split / town / f"{name}_gtFine_labelIds.png", labels([7, 33, 0, 29, 26]))
            put(root / "gtFine" / split / town / f"{name}_gtFine_instanceIds.png", labels([7]))
            photo(root / "gtFine" / split / town / f"{name}_gtFine_color.png")


def camvid(root: Path) -> None:
    for split, names in (("train", ("0001TP_006690", "0006R0_f00930")), ("val", ("0016E5_07959",))):
        for name in names:
            photo(root / "CamVid" / split / f"{name}.png")
            put(root / "CamVid" / f"{split}annot" / f"{name}.png", labels([0, 3, 8, 11]))


def camvid_of_its_owners(root: Path) -> None:
    colours = np.array([[128, 128, 128], [128, 0, 192], [64, 128, 192], [0, 0, 0], [192, 128, 64]], np.uint8)
    for name in ("0001TP_006690", "0001TP_008550", "0006R0_f00930", "0016E5_07959", "0016E5_08161", "Seq05VD_f00000"):
        photo(root / "701_StillsRaw_full" / f"{name}.png")
        put(root / "LabeledApproved_full" / f"{name}_L.png", colours[labels([0, 1, 2, 3, 4])])


def depth(path: Path, size: tuple[int, int], low: int, high: int, hole: tuple[slice, slice] | None = None) -> None:
    steps = np.linspace(low, high, size[0]).astype(np.uint16)[:, None].repeat(size[1], 1)
    if hole is not None:
        steps[hole] = 0
    put(path, steps)


def nyuv2(root: Path) -> None:
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for split, folder, scenes in (
        ("train", "sync", ("/kitchen_0028b", "/cafe_0001a")),
        ("test", "official_splits/test", ("bath",)),
    ):
        for scene in scenes:
            for number in range(2):
                names = [f"{scene}/rgb_{number:05d}.jpg", f"{scene}/sync_depth_{number:05d}.png"]
                photo(root / folder / names[0].lstrip("/"), (480, 640))
                depth(root / folder / names[1].lstrip("/"), (480, 640), 500, 9000, (slice(100, 120), slice(0, 640)))
                lines[split].append(" ".join([*names, "518.8579"]))
    for split, content in lines.items():
        (root / f"nyudepthv2_{split}_files_with_gt.txt").write_text("\n".join(content))


def nyuv2_labelled(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        rows = np.linspace(0.5, 9, 480, dtype=np.float32)
        file["images"] = RANDOM.integers(0, 256, (5, 3, 640, 480), dtype=np.uint8)
        file["depths"] = np.full((5, 640, 480), 1, np.float32)
        file["rawDepths"] = np.broadcast_to(rows, (5, 640, 480)) * (np.arange(640) % 10 > 0)[None, :, None]
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [4], [5]]), "testNdxs": np.array([[2], [3]])})


def kitti(root: Path) -> None:
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for split, drive, gt in (("train", "0057", "train"), ("test", "0002", "val")):
        for number in range(4 if split == "train" else 3):
            day, file = f"2011_09_26/2011_09_26_drive_{drive}_sync", f"image_02/data/{number:010d}.png"
            truth = f"2011_09_26_drive_{drive}_sync/proj_depth/groundtruth/image_02/{number:010d}.png"
            photo(root / day / file, (375, 1242))
            depth(
                root / "data_depth_annotated" / gt / truth,
                (375, 1242),
                256,
                70 * 256,
                (slice(0, 375), slice(0, None, 3)),
            )
            lines[split].append(f"{day}/{file} {truth} 721.5377")
    lines["test"][2] = f"{lines['test'][2].split()[0]} None 721.5377"
    (root / "train_test_inputs").mkdir()
    for split, content in lines.items():
        (root / "train_test_inputs" / f"eigen_{split}_files_with_gt.txt").write_text("\n".join(content) + "\n")


def folders(root: Path, labels_as: str, values: np.ndarray) -> None:
    """{train,val}/{images,``labels_as``}: what recipes for a folder of one's own read."""
    for split in ("train", "val"):
        for number in range(4):
            photo(root / split / "images" / f"{number}.jpg", values.shape)  # type: ignore[arg-type]
            put(root / split / labels_as / f"{number}.png", values)


TREES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "ade20k": (ade20k, "train", "val"),
    "voc2012": (voc, "train", "val"),
    "cityscapes": (cityscapes, "train", "val"),
    "camvid": (camvid, "train", "val"),
    "nyuv2": (nyuv2, "train", "test"),
    "kitti": (kitti, "train", "test"),
}
