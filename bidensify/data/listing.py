"""Lists of the samples to use: which file an entry means."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from bidensify.data.files import SUFFIXES
from bidensify.errors import DataError


def read_lines(path: Path, what: str = "list") -> list[str]:
    """Returns the non-empty lines of a text file: UTF-8, UTF-16 or Windows' 1252, with a byte order mark or without.

    Raises:
        DataError: the file is missing, cannot be read, or has no line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the {what} {str(path)!r} cannot be read ({error.strerror}); give a text file with one entry a line"
        ) from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings: tuple[str, ...] = ("utf-16",)
    elif content[1:2] == b"\0" or content[:1] == b"\0":
        encodings = ("utf-16-le" if content[1:2] == b"\0" else "utf-16-be",)
    else:
        encodings = ("utf-8-sig", "cp1252", "latin-1")
    for encoding in encodings:
        try:
            text = content.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    else:
        raise DataError(f"the {what} {str(path)!r} is not text ({encodings[0]} fails); save it as UTF-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"the {what} {str(path)!r} is empty; it needs one entry a line")
    return lines


class Names:
    """Finds the file that an entry of a list means.

    Args:
        found: {stem: path} of the files there are.
        roots: folders that paths in a list may be relative to.
    """

    def __init__(self, found: Mapping[str, Path], *roots: Path) -> None:
        self.found = found
        self.paths: dict[str, str] = {}
        for stem, path in found.items():
            for name in (path, *(path.relative_to(root) for root in roots if path.is_relative_to(root))):
                self.paths[name.as_posix()] = stem
                self.paths[name.with_suffix("").as_posix()] = stem

    def stem(self, entry: str) -> str | None:
        """Returns the stem that ``entry`` means: a stem, a stem with its ending, or a path; None if there is none."""
        entry = entry.strip().strip("\"'").replace("\\", "/")
        bare = re.sub(r"^(\./|/)+", "", entry)
        for name in (entry, bare):
            cut = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name
            for form in (name, cut):
                if form in self.found:
                    return form
                if form in self.paths:
                    return self.paths[form]
        return None


def read_list(path: Path, images: Names, partners: Names | None) -> tuple[list[str], dict[str, str]]:
    """Reads a list of the samples to use.

    A line is an image's stem, its stem with the ending, or its path; or an image and its mask (or depth map), separated
    by a tab, a comma, a semicolon or a space.

    Args:
        path: the list.
        images: the images there are.
        partners: the masks, or the depth maps, there are.

    Returns:
        The stems of the images, and {stem of the image: stem of the partner} of lines that name both.

    Raises:
        DataError: a line means no image, a pair's second file is not there, or an image stands with two partners.
    """
    stems: list[str] = []
    pairs: dict[str, str] = {}
    named: dict[str, str] = {}
    missing: list[str] = []
    for line in read_lines(path):
        stem, partner = images.stem(line), None
        if stem is None:
            for first, second in _splits(line):
                stem, partner = images.stem(first), partners.stem(second) if partners is not None else None
                if stem is not None and partner is not None:
                    break
                stem = None
        if stem is None:
            missing.append(line)
            continue
        if stem in named and (partner or stem) != pairs.get(stem, stem):
            raise DataError(
                f"{str(path)!r} names the image {stem!r} again, with another partner: {line!r} after {named[stem]!r}; an image "
                "has one. Remove a line, or give the image a second name (a link)"
            )
        stems.append(stem)
        named[stem] = line
        if partner is not None:
            pairs[stem] = partner
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(missing) + len(stems)} lines of {str(path)!r} mean no file that is there, for "
            f"example {missing[:3]}; a line is an image's stem, its file name, its path below root, or an image and its "
            f"mask separated by a space, tab or comma. There are {len(images.found)} images, for example "
            f"{list(images.found)[:2]}"
        )
    return stems, pairs


def _splits(line: str) -> Iterable[tuple[str, str]]:
    for mark in re.finditer(r"[\t,; ]+", line):
        yield line[: mark.start()], line[mark.end() :]


__all__ = ["Names", "read_lines", "read_list"]
