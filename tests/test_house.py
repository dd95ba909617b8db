"""What CONTRIBUTING promises of the house: short files, small folders, tests that mirror the package."""

import importlib.metadata
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "bidensify"
FILES = sorted(PACKAGE.rglob("*.py"))


def test_no_file_is_longer_than_300_lines() -> None:
    lengths = {str(file.relative_to(PACKAGE)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_no_folder_has_more_than_14_files() -> None:
    folders = {file.parent for file in FILES}
    counts = {str(folder.relative_to(PACKAGE)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in counts.items() if count > 14} == {}


def test_the_tests_mirror_the_package() -> None:
    tests = Path(__file__).parent
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert {name for name in folders if not (tests / name).is_dir()} == set()


def test_no_folder_of_the_tests_is_taken_for_a_package() -> None:
    """A folder on the path makes an importable package of each folder in it, where the true one is not installed."""
    required = importlib.metadata.requires("bidensify") or []
    packages = {re.split(r"[^\w.-]", each)[0].replace("-", "_").lower() for each in required}
    assert {"torch", "openvino", "executorch"} <= packages
    root = PACKAGE.parent.resolve()
    ours = [Path(entry) for entry in sys.path if entry and Path(entry).resolve().is_relative_to(root / "tests")]
    assert [str(found) for folder in ours for found in folder.iterdir() if found.name in packages] == []
