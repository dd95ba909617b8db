"""Predictions are written whole, at the image's own size, and in a type that holds their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from typer.testing import CliRunner

from bidensify.cli.app import app
from bidensify.cli.predict import named_images, refuse_overwriting, write_values
from bidensify.errors import ConfigError, DataError
from bidensify.tasks import BinaryTask, DepthTask, SegmentationTask, predict_image
from bidensify.train import load_run


def save(path: Path, width: int = 24, height: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
    return path


def predict(source: Path, *arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["predict", str(source), *map(str, arguments)])
    return result.exit_code, result.output


def test_the_values_have_the_image_s_size(work: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "photo.png", 47, 33)
    for source in ("run", "packed"):
        code, text = predict(work / source, image, "--out", tmp_path / source)
        assert code == 0, text
        assert Image.open(tmp_path / source / "photo.labels.png").size == (47, 33)
        assert Image.open(tmp_path / source / "photo.png").size == (47, 33)


def test_a_packed_folder_predicts_where_its_data_is_not(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: object, **kwargs: object) -> None:
        raise DataError("the data is not here")

    monkeypatch.setattr("bidensify.data.build_dataset", gone)
    code, text = predict(work / "packed", save(tmp_path / "photo.png"), "--out", tmp_path / "out")
    assert code == 0, text


def test_photos_are_upright_and_sixteen_bits_are_read(work: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # people see it turned by a quarter
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(tmp_path / "photo.jpg", exif=exif)
    Image.fromarray(np.full((20, 24), 30000, np.uint16)).save(tmp_path / "deep.png")
    code, text = predict(work / "run", tmp_path / "photo.jpg", tmp_path / "deep.png", "--out", tmp_path / "out")
    assert code == 0, text
    assert Image.open(tmp_path / "out" / "photo.labels.png").size == (60, 40)
    assert Image.open(tmp_path / "out" / "deep.labels.png").size == (24, 20)


def test_a_folder_and_what_cannot_be_read(work: Path, tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png")
    save(tmp_path / "photos" / "street" / "b.jpg")
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG no more")
    (tmp_path / "photos" / "empty.jpg").touch()
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    code, text = predict(work / "run", tmp_path / "photos", "--out", tmp_path / "out")
    assert code == 1
    assert "broken.png" in text
    assert "--skip-bad" in text
    code, text = predict(work / "run", tmp_path / "photos", "--out", tmp_path / "out", "--skip-bad")
    assert code == 0, text
    assert "2 predictions in" in text
    assert "2 of 4 images skipped" in text
    assert "broken.png" in text
    assert "empty.jpg" in text
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert written == ["a.labels.png", "a.png", "street/b.labels.png", "street/b.png"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one" / "a.png"), save(tmp_path / "two" / "a.png")
    with pytest.raises(ConfigError, match=r"one.*and.*two.*are both called 'a'"):
        named_images([one, two])
    with pytest.raises(ConfigError, match="is an image that was given; write to another folder"):
        refuse_overwriting(named_images([one]), tmp_path / "one")
    labels = save(tmp_path / "one" / "a.labels.png")
    with pytest.raises(ConfigError, match=r"'a.labels.png' would be written for .*a.* and for .*a.labels"):
        refuse_overwriting(named_images([one, labels]), tmp_path / "out")
    with pytest.raises(ConfigError, match="is an image that was given"):
        refuse_overwriting(named_images([two, labels]), tmp_path / "one")


@pytest.mark.parametrize(
    ("classes", "highest", "mode"), [(2, 1, "P"), (256, 255, "P"), (257, 256, "I;16"), (300, 290, "I;16")]
)
def test_class_indices_do_not_wrap(tmp_path: Path, classes: int, highest: int, mode: str) -> None:
    values = torch.tensor([[0, 1], [highest, highest - 1]])
    write_values(tmp_path, "x", values, SegmentationTask(classes))
    image = Image.open(tmp_path / "x.labels.png")
    assert image.mode == mode
    assert np.array_equal(np.asarray(image).astype(np.int64), values.numpy())


@pytest.mark.parametrize(
    "task", [SegmentationTask(2, palette=[[0, 0, 0], [255, 9, 0]]), BinaryTask(colour=(255, 9, 0))], ids=["two", "one"]
)
def test_class_indices_show_in_the_palettes_colours(task: object, tmp_path: Path) -> None:
    write_values(tmp_path, "c", torch.tensor([[1, 0]]), task)
    coloured = Image.open(tmp_path / "c.labels.png")
    assert np.array(coloured).tolist() == [[1, 0]]
    assert np.array(coloured.convert("RGB")).tolist() == [[[255, 9, 0], [0, 0, 0]]]


def test_depths_are_written_whole(tmp_path: Path) -> None:
    near = torch.tensor([[0.5, 1.2345], [9.9999, 0.001]])
    write_values(tmp_path, "near", near, DepthTask(max_depth=10.0))
    assert np.asarray(Image.open(tmp_path / "near.depth.png")).tolist() == [[500, 1234], [10000, 1]]
    far = torch.tensor([[0.5, 79.5], [65.6, 80.0]])
    write_values(tmp_path, "far", far, DepthTask(max_depth=300.0))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "far.depth.tiff")), far.numpy())
    with pytest.raises(DataError, match="do not fit"):
        write_values(tmp_path, "x", torch.zeros(2, 2, dtype=torch.int64), SegmentationTask(70000))
    flow = torch.randn(2, 3, 4)
    write_values(tmp_path, "flow", flow, DepthTask())
    assert np.array_equal(np.load(tmp_path / "flow.values.npy"), flow.numpy())


def test_a_photograph_is_seen_upright_and_unsquashed(work: Path, tmp_path: Path) -> None:
    """The prediction on a turned file is that on the upright one, and it is the image's that evaluation would measure."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(colours))).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(colours).save(tmp_path / "upright.png")
    code, text = predict(work / "run", tmp_path / "turned.png", tmp_path / "upright.png", "--out", tmp_path / "out")
    assert code == 0, text
    turned, upright = (np.array(Image.open(tmp_path / "out" / f"{n}.labels.png")) for n in ("turned", "upright"))
    assert np.array_equal(turned, upright)
    model, recipe = load_run(work / "run")
    reader, transforms = recipe.image_input()
    image = reader.tensor(tmp_path / "upright.png")
    assert np.array_equal(upright, predict_image(model, recipe.build_task(), image, transforms).numpy())
    extent = transforms({"image": tv_tensors.Image(image)})["extent"].tolist()
    assert extent[0] / extent[1] == pytest.approx(20 / 60, rel=0.1)
