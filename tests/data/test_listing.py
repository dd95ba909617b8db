"""Lists of samples as people have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bidensify.data import build_dataset
from bidensify.data.listing import read_lines
from bidensify.errors import DataError

NAMES = ("a", "b", "Straße 1")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        for folder, suffix, values in (
            ("images", ".jpg", np.zeros((8, 8, 3), np.uint8)),
            ("labels", "_m.png", np.full((8, 8), number, np.uint8)),
        ):
            path = tmp_path / folder / f"{name}{suffix}"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(values).save(path)
    return tmp_path


def stems(root: Path, content: bytes, **options: object) -> list[str]:
    (root / "list.txt").write_bytes(content)
    given = {"images": "images", "masks": "labels", "mask_suffix": "_m", "classes": 3, "stems": "list.txt", **options}
    dataset = build_dataset("image_mask_folder", "train", root=str(root), **given)
    labels = [int(dataset[index]["mask"][0, 0]) for index in range(len(dataset))]
    return [f"{name}:{label}" for name, label in zip(dataset.stems, labels, strict=True)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_way_to_save_a_text(root: Path, encoding: str, end: str) -> None:
    text = end.join(("Straße 1", "", "a ", ""))
    assert stems(root, text.encode(encoding)) == ["Straße 1:2", "a:0"]


@pytest.mark.parametrize(
    "line",
    [
        "b", "b.jpg", "./b.jpg", "/b.jpg", "images/b.jpg", "images/b", "images\\b.jpg", '"b.jpg"', "{root}/images/b.jpg",
        "b b_m.png", "images/b.jpg labels/b_m.png", "images/b.jpg\tlabels/b_m.png", "b.jpg,b_m.png", "b.jpg; b_m.png",
        "/images/b.jpg /labels/b_m.png", "b b",
    ],
)  # fmt: skip
def test_every_way_to_name_a_sample(root: Path, line: str) -> None:
    assert stems(root, f"{line.format(root=root)}\nStraße 1\n".encode()) == ["b:1", "Straße 1:2"]


def test_pairs_may_cross_and_names_may_have_blanks(root: Path) -> None:
    assert stems(root, "a.jpg labels/Straße 1_m.png\nStraße 1.jpg labels/a_m.png\n".encode()) == ["a:2", "Straße 1:0"]
    # A sample may be named twice, to be seen twice.
    assert stems(root, b"a\na\n") == ["a:0", "a:0"]


@pytest.mark.parametrize("second", ["a.jpg labels/b_m.png", "a"])
def test_an_image_with_two_partners_is_refused(root: Path, second: str) -> None:
    with pytest.raises(DataError, match=f"names the image 'a' again, with another partner: '{second}' after 'a.jpg"):
        stems(root, f"a.jpg labels/Straße 1_m.png\n{second}\n".encode())
    assert stems(root, b"a\na.jpg labels/a_m.png\n") == ["a:0", "a:0"]


def test_what_is_not_there_is_quoted(root: Path) -> None:
    with pytest.raises(
        DataError, match=r"2 of the 3 lines of .*list.txt' mean no file.*\['c.jpg', 'a labels/c_m.png'\]"
    ):
        stems(root, b"a\nc.jpg\na labels/c_m.png\n")
    with pytest.raises(DataError, match="is empty"):
        stems(root, b"\xef\xbb\xbf\r\n")
    with pytest.raises(DataError, match="utf-16 fails"):
        stems(root, b"\xff\xfea\x00\xd8\xd8\xd8\xd8b")
    with pytest.raises(DataError, match="cannot be read"):
        read_lines(root / "none.txt")


def test_a_list_with_depth_maps(root: Path) -> None:
    (root / "labels").rename(root / "depth")
    (root / "list.txt").write_bytes(b"images/b.jpg depth/b_m.png 518.8\n")
    with pytest.raises(DataError, match="mean no file"):  # a third column is of a format that the folder cannot know
        build_dataset("image_mask_folder", "x", root=str(root), images="images", depth="depth", stems="list.txt")
    (root / "list.txt").write_bytes(b"images/b.jpg depth/b_m.png")
    dataset = build_dataset(
        "image_mask_folder", "x", root=str(root), images="images", depth="depth", stems="list.txt", depth_scale=2
    )
    assert float(dataset[0]["depth"].max()) == 2
