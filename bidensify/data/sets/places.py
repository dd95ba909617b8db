"""Finding a published data set on disk, and saying what is missing, where it was looked for, and how to get it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bidensify.data.base import Colour
from bidensify.data.filedata import Files
from bidensify.data.files import find_images
from bidensify.data.listing import read_lines
from bidensify.errors import ConfigError, DataError


def check_split(title: str, split: str, published: Mapping[str, int]) -> None:
    """Raises ConfigError where a data set has no such split."""
    if split not in published:
        raise ConfigError(f"split={split!r}; the splits of {title} are {', '.join(published)}")


def locate(title: str, root: str, names: Sequence[str], needed: Sequence[str], get: str) -> Path:
    """Returns the folder that holds a data set: ``root``, or one of ``names`` below it.

    Args:
        title: what the data set is called.
        root: the folder that was given.
        names: of the folder that the download unpacks to, below ``root``.
        needed: files and folders that have to be in it.
        get: how to get the data set.

    Raises:
        DataError: none of the folders has all that is needed.
    """
    base = Path(root).expanduser()
    places = [base, *(base / name for name in names)]
    missing = {place: [name for name in needed if not (place / name).exists()] for place in places}
    for place in places:
        if not missing[place]:
            return place
    best = min(places, key=lambda place: len(missing[place]))
    raise DataError(
        f"{title}: {', '.join(missing[best])} {'is' if len(missing[best]) == 1 else 'are'} missing in {str(best)!r} (looked in "
        f"{', '.join(repr(str(place)) for place in places)}). Get it: {get}"
    )


def paired(images: Path, masks: Path, image_suffix: str = "", mask_suffix: str = "") -> list[Files]:
    """Returns the images of a folder with the masks of another, matched by relative path without suffix.

    Raises:
        DataError: an image has no mask, or the reverse.
    """
    photos, labels = find_images(images, image_suffix), find_images(masks, mask_suffix)
    for lacking, there, here, kind in ((photos, labels, masks, "mask"), (labels, photos, images, "image")):
        missing = [name for name in lacking if name not in there]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(lacking)} samples have no {kind} in {str(here)!r}, for example {missing[:3]}; unpack "
                "the data set again"
            )
    return [Files(name, path, labels[name]) for name, path in photos.items()]


def fewer(title: str, split: str, found: int, published: Mapping[str, int]) -> tuple[str, ...]:
    """Returns a note where a split has another number of samples than was published."""
    if found == published[split]:
        return ()
    return (f"{found} samples, {title} {split} was published with {published[split]}",)


def colours(text: str) -> tuple[Colour, ...]:
    """Reads a palette from hexadecimal digits, six a colour."""
    values = bytes.fromhex(text)
    return tuple((values[i], values[i + 1], values[i + 2]) for i in range(0, len(values), 3))


def listed(
    title: str,
    split: str,
    root: str,
    given: str | None,
    name: str,
    *,
    images: Sequence[str],
    depths: Sequence[str],
    published: Mapping[str, int],
    get: str,
) -> tuple[list[Files], tuple[str, ...]]:
    """Reads a list of lines ``image depth [more]`` as BTS has them.

    Args:
        title, split: what is read, for messages.
        root: the data set's folder.
        given: the list that was asked for, relative to ``root``; by default ``name`` in ``root`` or ``train_test_inputs``.
        name: of the published list.
        images, depths: folders below ``root`` that the list's paths may be relative to.
        published: number of lines of the published lists.
        get: how to get the data set.

    Returns:
        The samples, and notes: lines without depth (``None``), which are left out, and a list of another length.

    Raises:
        DataError: the list is missing or of another form, or files that it names are missing.
    """
    base = Path(root).expanduser()
    lists = [base / given] if given is not None else [base / name, base / "train_test_inputs" / name]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        raise DataError(
            f"{title} {split}: no list of files (looked for {', '.join(repr(str(p)) for p in lists)}). Get it: {get}"
        )
    items, missing, without = [], [], 0
    lines = read_lines(found)
    for line in lines:
        names = [part.lstrip("/") for part in line.split()[:2]]
        if len(names) < 2:
            raise DataError(
                f"{str(found)!r} has the line {line!r}; a line is an image and its depth map, separated by a space"
            )
        if names[1] == "None":
            without += 1
            continue
        image, depth = (
            next((path for folder in folders if (path := base / folder / part).is_file()), None)
            for folders, part in ((images, names[0]), (depths, names[1]))
        )
        if image is None or depth is None:
            missing += [part for part, path in zip(names, (image, depth), strict=True) if path is None]
        else:
            items.append(Files(names[0].rsplit(".", 1)[0], image, depth=depth))
    if missing or not items:
        places = ", ".join(repr(str(base / folder)) for folder in dict.fromkeys((*images, *depths)))
        raise DataError(
            f"{title} {split}: {len(missing)} files that {str(found)!r} names are missing, for example {missing[:3]} (looked in "
            f"{places}). Get it: {get}"
        )
    notes = [f"{without} of {len(lines)} listed images have no depth and are left out"] if without else []
    return items, (*notes, *(fewer(title, split, len(lines), published) if given is None else ()))
