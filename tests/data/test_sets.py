"""The benchmarks from small trees in their owners' layout, down to the metric of one epoch, and every kind of damage."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

import bidensify as bd
from bidensify.data import available_datasets, build_dataset, build_transforms, check_dataset
from bidensify.data.sets.cityscapes import IDS
from bidensify.errors import ConfigError, DataError
from bidensify.recipe import load_recipe
from bidensify.tasks import predict_image

NAMES = ("ade20k", "camvid", "cityscapes", "kitti", "nyuv2", "voc2012")


class Net(nn.Module):
    """Two convolutions: enough for an epoch."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:data")
def test_down_to_the_metric_of_one_epoch(name: str, tmp_path: Path, trees: ModuleType) -> None:
    make, train, val = trees.TREES[name]
    make(tmp_path / "data")
    is_depth = name in ("nyuv2", "kitti")
    recipe = {
        "name": name,
        "data": {
            "train": {"name": name, "split": train},
            "val": {"name": name, "split": val},
            "size": [32, 64],
            "batch_size": 2,
        }
        | {"root": str(tmp_path / "data"), "augment": {"rotate": 2.5, "color_jitter": 0.1}},
        "task": {"name": "depth", "output": "sigmoid"} if is_depth else {"name": "segmentation"},
        "stages": [{"name": "a", "binarize": "none", "epochs": 1, "lr": 1e-3}],
        "calibrate": {"batches": 0},
        "log": {"tensorboard": False},
    }
    loaded = load_recipe(recipe)
    train_data, val_data = loaded.build_datasets()
    task: Any = loaded.build_task(val_data.info)
    model = Net(task.channels)
    result = bd.finetune(
        model, recipe=loaded, train=train_data, val=val_data, run_dir=tmp_path / "run", task=task, quiet=True
    )
    # The same by other means: each image alone, at its own size.
    samples = [val_data.load(index) for index in range(len(val_data))]
    seen = [predict_image(model, task, sample["image"], val_data.transforms) for sample in samples]
    if is_depth:
        assert task.max_depth == {"nyuv2": 10, "kitti": 80}[name]
        pairs = [(p[s["depth"] > 0], s["depth"][s["depth"] > 0]) for p, s in zip(seen, samples)]
        errors = [float(((p - g).abs() / g).mean()) for p, g in pairs]
        assert result.metrics["absrel"] == pytest.approx(np.mean(errors), rel=1e-5)
        assert result.metrics["rmse"] == pytest.approx(
            np.mean([float((p - g).square().mean().sqrt()) for p, g in pairs]), rel=1e-5
        )
    else:
        jaccard = MulticlassJaccardIndex(val_data.info.num_classes, ignore_index=val_data.info.ignore_index)
        for prediction, sample in zip(seen, samples):
            jaccard.update(prediction, sample["mask"].as_subclass(torch.Tensor))
        assert result.metrics["miou"] == pytest.approx(float(jaccard.compute()), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_told_with_the_way_to_get_it(name: str, tmp_path: Path, trees: ModuleType) -> None:
    make, train, _ = trees.TREES[name]
    with pytest.raises(DataError, match=rf"(?s){tmp_path}.*Get it: "):
        build_dataset(name, train, root=str(tmp_path))
    with pytest.raises(ConfigError, match="split='tset'; the splits of .* are train, "):
        build_dataset(name, "tset", root=str(tmp_path))
    make(tmp_path)
    dataset = build_dataset(name, train, root=str(tmp_path))
    assert "published with" in dataset.notes[-1]
    victim = next(path for path in (dataset.items[0].mask, dataset.items[0].depth) if path is not None)
    victim.unlink()
    with pytest.raises(DataError, match="missing|no mask|no image"):
        build_dataset(name, train, root=str(tmp_path))
    lists = [p for p in tmp_path.rglob("*.txt") if train in p.name]
    for path in lists:
        path.unlink()
    if lists:
        with pytest.raises(DataError, match=r"(missing|no list of files).*Get it"):
            build_dataset(name, train, root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("ade20k", ("ADEChallengeData2016/images/training", "ADEChallengeData2016/annotations/training")),
        ("cityscapes", ("leftImg8bit/train", "gtFine/train")),
        ("camvid", ("CamVid/train", "CamVid/trainannot")),
        ("voc2012", ("VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt")),
        ("nyuv2", ("nyudepthv2_train_files_with_gt.txt", "sync/kitchen_0028b")),
        ("kitti", ("train_test_inputs/eigen_train_files_with_gt.txt", "data_depth_annotated/train")),
    ],
)
def test_a_split_that_is_not_there(name: str, folders: tuple[str, ...], tmp_path: Path, trees: ModuleType) -> None:
    for number, missing in enumerate(folders):
        root = tmp_path / str(number)
        trees.TREES[name][0](root)
        (root / missing).rename(tmp_path / f"gone{number}")
        with pytest.raises(DataError, match=rf"{tmp_path}"):
            build_dataset(name, "train", root=str(root))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["truncated image", "other size", "stranger"])
def test_damage_names_its_file(name: str, damage: str, tmp_path: Path, trees: ModuleType) -> None:
    make, train, _ = trees.TREES[name]
    make(tmp_path)
    item = build_dataset(name, train, root=str(tmp_path)).items[1]
    label = item.mask if item.mask is not None else item.depth
    if damage == "truncated image":
        item.image.write_bytes(item.image.read_bytes()[: item.image.stat().st_size // 2])
        wrong = item.image
    elif damage == "other size":
        trees.put(label, np.array(Image.open(label))[:-2])
        wrong = label
    elif item.mask is None:  # a depth of zero everywhere is counted
        trees.put(label, np.zeros_like(np.array(Image.open(label))))
        report = check_dataset(build_dataset(name, train, root=str(tmp_path)))
        assert "1 of" in report.warnings[-1]
        assert "no valid pixel" in report.warnings[-1]
        return
    else:
        trees.put(label, np.full(np.array(Image.open(label)).shape[:2], 200, np.uint8))
        wrong = label
    dataset = build_dataset(name, train, root=str(tmp_path))
    with pytest.raises(DataError, match=wrong.name):
        dataset[1]
    if damage != "truncated image":
        with pytest.raises(DataError, match=wrong.name if damage == "other size" else r"200 \(1 images\)"):
            check_dataset(dataset)


def columns(dataset: Any, index: int = 0) -> list[int]:
    """The labels along a row of stripes."""
    row = dataset[index]["mask"][0].tolist()
    return [label for n, label in enumerate(row) if n == 0 or row[n - 1] != label]


def test_labels_become_the_benchmarks_classes(tmp_path: Path, trees: ModuleType) -> None:
    trees.ade20k(tmp_path / "a")
    ade = build_dataset("ade20k", "val", root=str(tmp_path / "a" / "ADEChallengeData2016"))
    assert columns(ade) == [255, 0, 149, 2]
    assert (ade.info.class_names[0], ade.info.class_names[149], ade.info.palette[2]) == ("wall", "flag", (6, 230, 230))
    assert len(set(ade.info.class_names)) == len(ade.info.palette) == 150
    trees.cityscapes(tmp_path / "c")
    towns = build_dataset("cityscapes", "train", root=str(tmp_path / "c"))
    assert columns(towns) == [0, 18, 255, 13]
    assert [towns.name_of(n) for n in (0, 3)] == ["aachen/aachen_000000_000019", "bochum/bochum_000001_000019"]
    assert towns.info.class_names[IDS.index(26)] == "car"
    assert towns.info.palette[13] == (0, 0, 142)
    trees.voc(tmp_path / "v")
    objects = build_dataset("voc2012", "trainval", root=str(tmp_path / "v"))
    assert columns(objects) == [0, 15, 255, 20]
    assert len(objects) == 6
    known = {0: (0, 0, 0), 1: (128, 0, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {label: objects.info.palette[label] for label in known} == known


def test_the_extra_masks_of_sbd(tmp_path: Path, trees: ModuleType) -> None:
    trees.voc(tmp_path)
    with pytest.raises(DataError, match=r"trainaug.txt and .*SegmentationClassAug are needed.*sbd="):
        build_dataset("voc2012", "trainaug", root=str(tmp_path))
    trees.sbd(tmp_path)
    data = build_dataset("voc2012", "trainaug", root=str(tmp_path), sbd=str(tmp_path))
    # VOC's own mask wins, and 4 is of VOC's val.
    assert [(item.name[-1], item.mask.suffix) for item in data.items] == [
        ("0", ".png"), ("1", ".png"), ("2", ".png"), ("6", ".mat"), ("7", ".mat"),
    ]  # fmt: skip
    assert columns(data, 3) == [0, 7]
    base = tmp_path / "VOCdevkit" / "VOC2012"
    shutil.copytree(base / "SegmentationClass", base / "SegmentationClassAug")
    lists = base / "ImageSets" / "Segmentation"
    for text in ("2007_000001\n", "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png\n"):
        (lists / "train_aug.txt").write_text(text)
        assert (
            build_dataset("voc2012", "trainaug", root=str(tmp_path)).items[0].mask.parent.name == "SegmentationClassAug"
        )
    (tmp_path / "benchmark_RELEASE" / "dataset" / "cls" / "2007_000006.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(DataError, match=r"2007_000006\.mat' is truncated or damaged"):
        data[3]


def test_camvid_of_its_owners(tmp_path: Path, trees: ModuleType) -> None:
    trees.camvid_of_its_owners(tmp_path)
    sets = {split: build_dataset("camvid", split, root=str(tmp_path)) for split in ("train", "val", "test")}
    assert {split: [data.name_of(n) for n in range(len(data))] for split, data in sets.items()} == {
        "train": ["0001TP_006690", "0006R0_f00930", "0016E5_08161"],
        "val": ["0016E5_07959"],
        "test": ["0001TP_008550", "Seq05VD_f00000"],
    }
    # Sky, drivable markings (road), SUV (car), void, child (pedestrian).
    assert columns(sets["val"]) == [0, 3, 8, 11, 9]
    trees.photo(tmp_path / "701_StillsRaw_full" / "holiday.png")
    trees.put(tmp_path / "LabeledApproved_full" / "holiday_L.png", np.zeros((24, 32, 3), np.uint8))
    with pytest.raises(DataError, match=r"holiday\.png' is of no sequence"):
        build_dataset("camvid", "train", root=str(tmp_path))


def test_crops_of_nyu_and_kitti(tmp_path: Path, trees: ModuleType) -> None:
    trees.nyuv2(tmp_path / "n")
    train, test = (build_dataset("nyuv2", split, root=str(tmp_path / "n")) for split in ("train", "test"))
    assert train[0]["image"].shape[1:] == train[0]["depth"].shape == (427, 565)
    valid = test[0]["depth"] > 0
    assert test[0]["image"].shape[1:] == (480, 640)
    assert valid.nonzero().min(0).values.tolist() == [45, 41]
    assert valid.nonzero().max(0).values.tolist() == [470, 600]
    assert not valid[100:120].any()  # the sensor's hole
    assert float(test[0]["depth"].max()) == pytest.approx(0.5 + 8.5 * 470 / 479, abs=2e-3)
    whole = build_dataset("nyuv2", "test", root=str(tmp_path / "n"), crop="none")
    assert (whole[0]["depth"] > 0).sum() == 460 * 640
    trees.kitti(tmp_path / "k")
    test = build_dataset("kitti", "test", root=str(tmp_path / "k"))
    assert len(test) == 2
    assert "1 of 3 listed images have no depth and are left out" in test.notes[0]
    assert test[0]["image"].shape[1:] == test[0]["depth"].shape == (352, 1216)
    seen = (test[0]["depth"] > 0).nonzero()
    # Garg's crop of 375x1242 is rows 153 to 370 and columns 44 to 1196; the benchmark's begins at row 23, column 13.
    assert seen.min(0).values.tolist() == [153 - 23, 44 - 13]
    assert seen.max(0).values.tolist() == [370 - 23, 1196 - 13]
    free = build_dataset("kitti", "test", root=str(tmp_path / "k"), crop="none", kb_crop=False)
    assert free[0]["depth"].shape == (375, 1242)
    assert float(free[0]["depth"].max()) == 70


def test_the_labelled_mat(tmp_path: Path, trees: ModuleType) -> None:
    trees.nyuv2_labelled(tmp_path)
    train, test = (build_dataset("nyuv2", split, root=str(tmp_path)) for split in ("train", "test"))
    assert [data.name_of(n) for data in (train, test) for n in range(len(data))] == ["0", "3", "4", "1", "2"]
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat") as file:
        image, raw = file["images"][1].transpose(0, 2, 1), file["rawDepths"][1].T
    assert np.array_equal(test[0]["image"][:, 7:474, 7:632], image[:, 7:474, 7:632])
    assert not test[0]["image"][:, :7].any()
    assert np.allclose(test[0]["depth"][45:471, 41:601], raw[45:471, 41:601])
    assert train[0]["image"].shape == (3, 427, 565)
    copy = pickle.loads(pickle.dumps(test))  # as a worker gets it
    assert torch.equal(copy[1]["depth"], test[1]["depth"])
    report = check_dataset(test)
    assert report.count.depth_valid == 2 * int((test[0]["depth"] > 0).sum())
    (tmp_path / "splits.mat").write_bytes(b"MATLAB")
    with pytest.raises(DataError, match=r"splits\.mat beside it is damaged"):
        build_dataset("nyuv2", "train", root=str(tmp_path))
    (tmp_path / "splits.mat").unlink()
    with pytest.raises(DataError, match=r"splits\.mat is missing.*Get it"):
        build_dataset("nyuv2", "train", root=str(tmp_path))


def test_every_set_is_here_and_trains_with_its_transforms(tmp_path: Path, trees: ModuleType) -> None:
    assert set(trees.TREES) <= set(available_datasets())
    trees.ade20k(tmp_path)
    data = build_dataset("ade20k", "train", root=str(tmp_path), cache=True)
    data.transforms = build_transforms(True, (16, 16), ignore_index=255)
    assert data[0]["image"].shape == (3, 16, 16)
