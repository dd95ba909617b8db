"""What people's files are like: turned, grey, of 16 bits, of many bands, in colours, damaged."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path

import h5py  # noqa: F401  # the extra that reads labelled .mat files; its absence here is a broken test environment
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from bidensify.data import Files, ImageReader, build_dataset
from bidensify.data.files import image_size, open_image
from bidensify.data.readers import DepthReader, MaskReader, colour_map, integer_map
from bidensify.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)
# EXIF orientation -> how the sensor's rows and columns lie beside the upright picture.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 3),
}


def turned(path: Path, upright: np.ndarray, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(TURNS[orientation](upright))).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff"])
def test_orientation_of_every_reader(tmp_path: Path, orientation: int, suffix: str) -> None:
    colours = RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    if suffix == ".webp":
        colours[:] = (np.arange(6)[:, None, None] * 40).astype(np.uint8)  # lossy: rows of one grey each
    path = turned(tmp_path / f"a{suffix}", colours, orientation)
    assert image_size(path, "image") == (6, 9)
    assert np.abs(ImageReader()(path).astype(int) - colours).max() <= (0 if suffix != ".webp" else 8)
    if suffix != ".webp":
        labels = RANDOM.integers(0, 3, (6, 9), dtype=np.uint8)
        assert np.array_equal(MaskReader(3)(turned(tmp_path / f"b{suffix}", labels, orientation)), labels)
        depth = RANDOM.integers(1, 60000, (6, 9), dtype=np.uint16)
        assert np.array_equal(DepthReader(1.0)(turned(tmp_path / f"c{suffix}", depth, orientation)), depth)


@pytest.mark.parametrize("orientation", [3, 6])
def test_photograph_and_upright_mask_agree(tmp_path: Path, orientation: int) -> None:
    for folder in ("images", "labels"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    bright, mask = np.zeros((24, 40, 3), np.uint8), np.zeros((24, 40), np.uint8)
    bright[:8], mask[:8] = 250, 1
    turned(tmp_path / "train" / "images" / "a.jpg", bright, orientation)
    Image.fromarray(mask).save(tmp_path / "train" / "labels" / "a.png")
    dataset = build_dataset("image_mask_folder", "train", root=str(tmp_path), classes=2)
    sample = dataset[0]
    assert torch.equal(sample["image"].float().mean(0) > 128, sample["mask"] == 1)
    lying = np.ascontiguousarray(np.rot90(mask))  # a mask of the sensor's own layout
    Image.fromarray(lying).save(tmp_path / "train" / "labels" / "a.png")
    with pytest.raises(DataError, match=r"a\.png' is 24x40 pixels.*is 40x24, both upright \(each as its EXIF"):
        dataset[0]


def test_channels(tmp_path: Path) -> None:
    colour = RANDOM.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    rgba, grey = tmp_path / "rgba.png", tmp_path / "grey.png"
    Image.fromarray(colour).save(rgba)
    Image.fromarray(colour[..., 0]).save(grey)
    assert np.array_equal(ImageReader(3)(rgba), colour[..., :3])
    assert np.array_equal(ImageReader(4)(rgba), colour)
    assert np.array_equal(ImageReader(1)(grey), colour[..., :1])
    assert np.array_equal(ImageReader(3)(grey), np.repeat(colour[..., :1], 3, 2))
    luma = Image.fromarray(colour[..., :3]).convert("L")
    Image.fromarray(colour[..., :3]).save(tmp_path / "rgb.png")
    assert np.array_equal(ImageReader(1)(tmp_path / "rgb.png")[..., 0], np.array(luma))
    with pytest.raises(DataError, match=r"bands 'RGB'; channels=4"):
        ImageReader(4)(tmp_path / "rgb.png")
    with pytest.raises(DataError, match=r"bands 'L'; channels=2"):
        ImageReader(2)(grey)
    palette = Image.fromarray(colour[..., 0] % 4).convert("P")
    palette.putpalette([9, 9, 9, 50, 60, 70, 1, 2, 3, 200, 100, 0])
    palette.save(tmp_path / "p.png", transparency=b"\xff\x00\xff\xff")
    table = np.array([[9, 9, 9], [50, 60, 70], [1, 2, 3], [200, 100, 0]])
    assert np.array_equal(ImageReader(3)(tmp_path / "p.png"), table[np.array(palette)])


@pytest.mark.parametrize("bands", [2, 5])
@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_many_bands(tmp_path: Path, bands: int, layout: str, suffix: str) -> None:
    values = RANDOM.integers(0, 4096, (6, 9, bands), dtype=np.uint16)
    stored = values if layout == "hwc" else np.moveaxis(values, -1, 0)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, stored)
    else:
        planes = {"planarconfig": "separate"} if layout == "chw" else {}
        tifffile.imwrite(path, stored, photometric="minisblack", **planes)
    got = ImageReader(bands, image_max=4095).tensor(path)
    assert got.shape == (bands, 6, 9)
    assert torch.allclose(got, torch.from_numpy(values.astype(np.float32) / 4095).permute(2, 0, 1))
    assert image_size(path, "image", bands) == (6, 9)
    with pytest.raises(DataError, match=rf"a{suffix}.*images of 7 bands"):
        ImageReader(7)(path)


def test_values_above_8_bits_have_a_rule(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.full((4, 4), 1.5, np.float64))
    with pytest.raises(DataError, match=r"values from 1.5 to 1.5 of type float64.*image_max"):
        ImageReader(1)(tmp_path / "f.npy")
    assert ImageReader(1, image_max=1)(tmp_path / "f.npy").max() == np.float32(1.5)
    np.save(tmp_path / "n.npy", np.full((4, 4), np.nan))
    with pytest.raises(DataError, match="values from nan"):
        ImageReader(1)(tmp_path / "n.npy")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"o\.npy.*allow_pickle=False"):
        ImageReader(1)(tmp_path / "o.npy")


def png(path: Path, depth: int, colour: int, row: bytes) -> Path:
    """A PNG of 2x2 pixels by its specification."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 2, depth, colour, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress((b"\0" + row) * 2)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


@pytest.mark.parametrize(("colour", "bands"), [(2, 3), (4, 2), (6, 4)])
def test_colours_of_16_bits_are_refused_and_grey_is_read(tmp_path: Path, colour: int, bands: int) -> None:
    value = struct.pack(">H", 4000)
    with pytest.raises(DataError, match=r"colour\.png.*several channels of 16 bits"):
        ImageReader(3, 4095)(png(tmp_path / "colour.png", 16, colour, value * bands * 2))
    assert ImageReader(3)(png(tmp_path / "small.png", 8, colour, b"\xc8" * bands * 2)).max() == 200
    grey = ImageReader(1, 4000)(png(tmp_path / "grey.png", 16, 0, value * 2))
    assert (grey == 1).all()


def test_files_of_8_bits_have_their_own_largest_value(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4, 3), 200, np.uint8)).save(tmp_path / "a.png")
    read = ImageReader(3, image_max=4095)(tmp_path / "a.png")
    assert (read.dtype, read.max()) == (np.uint8, 200)


def test_masks_of_16_bits_and_npy(tmp_path: Path) -> None:
    labels = RANDOM.integers(0, 300, (5, 7)).astype(np.uint16)
    Image.fromarray(labels).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", labels.astype(np.int64))
    for name in ("a.png", "a.npy"):
        assert np.array_equal(MaskReader(300, 65535)(tmp_path / name), labels)
    np.save(tmp_path / "f.npy", labels.astype(np.float32))
    with pytest.raises(DataError, match="float32; a mask holds one integer"):
        MaskReader(300)(tmp_path / "f.npy")
    Image.fromarray(labels < 100).save(tmp_path / "bits.png")
    assert np.array_equal(MaskReader(2)(tmp_path / "bits.png"), labels < 100)


def test_masks_in_colours(tmp_path: Path) -> None:
    truth = RANDOM.integers(0, 3, (5, 7))
    table = np.array([[128, 64, 128], [0, 0, 0], [255, 0, 10]], np.uint8)
    drawn = Image.fromarray(table[truth])
    drawn.save(tmp_path / "rgb.png")
    drawn.convert("RGBA").save(tmp_path / "rgba.png")
    # An editor's palette numbers the colours in an order of its own.
    drawn.quantize(3).save(tmp_path / "p.png")
    by_list = MaskReader(3, colours=colour_map(table.tolist()))
    by_name = MaskReader(2, colours=colour_map({"128,64,128": 0, "black": 1, "#ff000a": 255}))
    for name in ("rgb.png", "rgba.png", "p.png"):
        assert np.array_equal(by_list(tmp_path / name), truth)
        assert np.array_equal(by_name(tmp_path / name), np.where(truth == 2, 255, truth))
    with pytest.raises(DataError, match=r"rgb\.png' is in colours.*mask_colours"):
        MaskReader(3)(tmp_path / "rgb.png")
    with pytest.raises(DataError, match=r"has the colour \(255, 0, 10\) at row \d, column \d.*2 of mask_colours"):
        MaskReader(2, colours=colour_map(table[:2].tolist()))(tmp_path / "rgb.png")
    Image.fromarray(np.repeat(truth[..., None], 3, 2).astype(np.uint8)).save(tmp_path / "grey.png")
    assert np.array_equal(MaskReader(3)(tmp_path / "grey.png"), truth)


@pytest.mark.parametrize(
    "given", [[[1, 2]], [[1, 2, 300]], {"mauve-ish": 1}, {"1,2,3": "road"}, [[1, 2, 3], [1, 2, 3]]]
)
def test_colours_that_are_none(given: object) -> None:
    with pytest.raises(ConfigError, match="mask_colours"):
        colour_map(given)  # type: ignore[arg-type]


def test_label_map_is_of_whole_numbers() -> None:
    assert integer_map("label_map", {"255": 1, 3: "0"}) == {255: 1, 3: 0}
    for given in ({"road": 1}, {1.5: 0}, [1, 2]):
        with pytest.raises(ConfigError, match=r"label_map=.*\{255: 1\}"):
            integer_map("label_map", given)  # type: ignore[arg-type]


def test_remedies_are_proposed(tmp_path: Path) -> None:
    truth = np.array([[0, 255]], np.uint8)
    Image.fromarray(truth).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"label_map: \{255: 1\}"):
        MaskReader(2, ignore_index=254)(tmp_path / "a.png")
    Image.fromarray(np.array([[1, 2, 3]], np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"label 3 at row 0, column 2.*start at 1"):
        MaskReader(3)(tmp_path / "b.png")
    Image.fromarray(RANDOM.integers(0, 2, (16, 16), dtype=np.uint8) * 90).save(tmp_path / "c.jpg")
    with pytest.raises(DataError, match="JPEG changes labels"):
        MaskReader(91)(tmp_path / "c.jpg")


def test_multilabel_masks(tmp_path: Path) -> None:
    planes = RANDOM.integers(0, 2, (5, 6, 7), dtype=np.uint8)
    np.save(tmp_path / "a.npy", planes)
    assert np.array_equal(MaskReader(5, multilabel=True)(tmp_path / "a.npy"), planes)
    Image.fromarray(np.moveaxis(planes[:3], 0, -1) * 255).save(tmp_path / "a.png")
    assert np.array_equal(MaskReader(3, multilabel=True)(tmp_path / "a.png"), planes[:3])
    with pytest.raises(DataError, match="3 bands.*one per class"):
        MaskReader(4, multilabel=True)(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", planes * 7)
    with pytest.raises(DataError, match=r"values \[0, 7\]"):
        MaskReader(5, multilabel=True)(tmp_path / "b.npy")


@pytest.mark.parametrize("suffix", [".png", ".npy", ".tiff"])
def test_depth_with_invalid_pixels(tmp_path: Path, suffix: str) -> None:
    steps = np.array([[0, 1, 65535], [500, 2000, 40000]], np.uint16)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, steps)
    else:
        Image.fromarray(steps).save(path)
    got = DepthReader(0.001, (65535,))(path)
    assert got.dtype == np.float32
    assert np.allclose(got, [[0, 0.001, 0], [0.5, 2, 40]])


def test_depth_in_floats(tmp_path: Path) -> None:
    metres = np.array([[np.nan, np.inf, -1], [0, 2.5, 7]], np.float32)
    Image.fromarray(metres).save(tmp_path / "a.tiff")
    assert DepthReader(1.0)(tmp_path / "a.tiff").tolist() == [[0, 0, 0], [0, 2.5, 7]]
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"shape \(4, 4, 3\).*one number per pixel"):
        DepthReader(1.0)(tmp_path / "b.png")


def test_files_that_cannot_be_opened_are_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RANDOM.integers(0, 256, (40, 40), dtype=np.uint8)).save(path)
    whole = path.read_bytes()

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        with pytest.raises(DataError, match=r"a\.png' cannot be opened \(Permission denied\)"):
            open_image(path, "image")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.png' is truncated or damaged.*Fetch it again"):
        open_image(path, "image")
    path.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"a\.png' is not an image that can be read \(12 bytes\)"):
        open_image(path, "image")
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png' cannot be opened \(No such file"):
        open_image(path, "image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="too large.*MAX_IMAGE_PIXELS"):
        open_image(path, "image")


def test_targets_of_restoration(tmp_path: Path) -> None:
    for kind in ("noisy", "clean"):
        (tmp_path / kind).mkdir()
        for name in "ab":
            values = RANDOM.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / kind / f"{name}.png")
    dataset = build_dataset("image_mask_folder", "train", root=str(tmp_path), images="noisy", targets="clean")
    assert np.array_equal(dataset[1]["target"].permute(1, 2, 0), np.array(Image.open(tmp_path / "clean" / "b.png")))
    assert dataset.items[1] == Files(
        "b", tmp_path / "noisy" / "b.png", target=tmp_path / "clean" / "b.png"
    )  # fmt: skip
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(tmp_path / "clean" / "b.png")
    with pytest.raises(DataError, match=r"b\.png' is 7x5.*6x5"):
        dataset[1]
