"""What a data set holds against what it says: every label is read before training, in parallel, and remembered on disk.

A mask of 0 and 255 trains to a perfect score where 255 is the label that is ignored; a class that never occurs, a depth
map of zeros or a mask of another size show themselves after hours, or never. :func:`check_dataset` finds them first.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidensify._util.files import atomic_write
from bidensify.data.base import DataInfo, DenseDataset
from bidensify.data.count import Count
from bidensify.data.fit import Fit
from bidensify.data.readers import label_remedy
from bidensify.errors import DataError

__all__ = ["Report", "check_dataset", "survey"]

# A data set that generates its samples, or keeps its files to itself, has no labels that could be read apart.
_LOOKS = 64
_VERSION = 1


@dataclass(frozen=True)
class Report:
    """What :func:`check_dataset` found.

    Attributes:
        count: the figures.
        summary: a line or two on them.
        warnings: what is probably not meant.
    """

    count: Count
    summary: str
    warnings: tuple[str, ...]


def survey(dataset: DenseDataset, name: str = "data") -> Count:
    """Reads the labels of every sample (of 64 samples, where they are no files), several at a time.

    The result is kept in ``$BIDENSIFY_CACHE`` (else ``~/.cache/bidensify``) under the files' paths, sizes and times of
    change and the data set's options. A progress bar is shown on a terminal.

    Raises:
        DataError: files that cannot be read or do not belong together; the message names the first ones.
    """
    total = len(dataset)
    indices = range(total)
    place: Path | None = None
    if hasattr(dataset, "files_of"):
        place = _cache_folder() / "labels" / f"{_key(dataset)}.json"
        try:
            return Count.from_json(json.loads(place.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there yet, or of another version
    elif total > _LOOKS:
        indices = range(0, total, -(-total // _LOOKS))
    whole, mistakes = Count(), []
    for result in _progress(_counts(dataset, indices), len(indices), name):
        if isinstance(result, Count):
            whole.add(result)
        else:
            mistakes.append(str(result))
    if mistakes:
        more = f"\n... and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        head = f"{name}: {len(mistakes)} of {total} samples cannot be used:\n" if len(mistakes) > 1 else f"{name}: "
        raise DataError(head + "\n".join(mistakes[:5]) + more)
    if place is not None:
        try:
            with atomic_write(place) as temporary:
                temporary.write_text(json.dumps(whole.to_json()), encoding="utf-8")
        except OSError:
            pass  # a place that cannot be written to costs time at the next start, nothing else
    return whole


def _counts(dataset: DenseDataset, indices: range) -> Iterator[Count | DataError]:
    def one(index: int) -> Count | DataError:
        try:
            return dataset.count(index)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(one, indices)


def _progress(results: Iterator[Any], total: int, name: str) -> Iterator[Any]:
    if not sys.stderr.isatty() or total < 200:
        return results
    from rich.console import Console
    from rich.progress import track

    return iter(track(results, f"{name}: reading labels", total=total, console=Console(stderr=True), transient=True))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("BIDENSIFY_CACHE") or Path(base) / "bidensify")


def _key(dataset: Any) -> str:
    options = {k: v for k, v in vars(dataset).items() if k not in ("items", "transforms") and not k.startswith("_")}
    digest = hashlib.sha256(repr((_VERSION, type(dataset).__qualname__, sorted(options.items()))).encode())
    for index in range(len(dataset)):
        for path in dataset.files_of(index):
            try:
                stat = path.stat()
                digest.update(
                    f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape")
                )
            except OSError:
                digest.update(f"{path.absolute()}\0\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def check_dataset(dataset: Any, name: str = "data") -> Report | None:
    """Reads every label of a data set and compares what is there with what its ``info`` says.

    Args:
        dataset: a :class:`DenseDataset`, or a wrapper that holds one as ``dataset``.
        name: what to call it in messages: ``data.train``.

    Returns:
        What was found; None for a data set of another kind, which cannot be asked.

    Raises:
        DataError: a file cannot be used or was cut off, a label is outside the classes, no pixel is labelled, no depth is
            valid, one of two classes never occurs while labels are ignored (masks of 0 and 255), or evaluation would
            refuse an image's size.
    """
    while not isinstance(dataset, DenseDataset) and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    if not isinstance(dataset, DenseDataset) or not hasattr(dataset, "info"):
        return None
    count, info = survey(dataset, name), dataset.info
    heights, widths = ([size[axis] for size in count.sizes] for axis in (0, 1))
    sizes = f"{heights[0]}x{widths[0]}" if len(count.sizes) == 1 else (
        f"{min(heights)}x{min(widths)} to {max(heights)}x{max(widths)}"
    )  # fmt: skip
    looked = "" if count.images == len(dataset) else f" ({count.images} of them looked at)"
    lines = [f"{name}: {len(dataset)} images{looked} of {sizes}"]
    warnings = [f"{name}: {note}" for note in dataset.notes]
    if isinstance(dataset.transforms, Fit):  # what evaluation would refuse is refused now
        for size in count.sizes:
            dataset.transforms.sizes(*size)
    if count.pixels:
        _check_masks(count, info, name, lines, warnings, partly=bool(looked))
    if count.depth_pixels:
        _check_depth(count, name, lines, warnings)
    return Report(count, "; ".join(lines), tuple(warnings))


def _check_masks(count: Count, info: DataInfo, name: str, lines: list[str], warnings: list[str], partly: bool) -> None:
    classes = range(info.num_classes)
    outside = {label: n for label, n in count.labels.items() if label not in classes and label != info.ignore_index}
    if outside:
        shown = ", ".join(f"{label} ({count.holders[label]} images)" for label in sorted(outside)[:8])
        raise DataError(
            f"{name}: masks hold labels outside the classes: {shown}; labels are 0 to {info.num_classes - 1}, or "
            f"ignore_index={info.ignore_index}. {label_remedy(set(count.labels), info.num_classes)}"
        )
    ignored = 0 if info.multilabel else count.labels[info.ignore_index]
    absent = [label for label in classes if not count.labels[label]]
    if ignored == count.pixels or (info.multilabel and len(absent) == len(classes)):
        raise DataError(
            f"{name}: not one pixel is labelled (every label is {info.ignore_index}, the ignored one, or no band is set); "
            "correct ignore_index or label_map"
        )
    if info.num_classes == 2 and len(absent) == 1 and ignored:
        raise DataError(
            f"{name}: masks hold {1 - absent[0]} and {info.ignore_index} alone, and {info.ignore_index} is ignore_index, so "
            f"class {absent[0]} ({info.class_names[absent[0]]}) never occurs and {ignored / count.pixels:.1%} of the pixels "
            f"would not count. If {info.ignore_index} is the class, say label_map: {{{info.ignore_index}: {absent[0]}}}"
        )
    lines.append(f"{len(classes) - len(absent)} of {len(classes)} classes occur, {ignored / count.pixels:.1%} ignored")
    if absent and not partly:
        names = ", ".join(f"{label} {info.class_names[label]}" for label in absent[:10])
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        warnings.append(f"{name}: {len(absent)} of {len(classes)} classes never occur: {names}{more}")
    if ignored > 0.5 * count.pixels:
        warnings.append(f"{name}: {ignored / count.pixels:.1%} of the pixels are {info.ignore_index} and do not count")


def _check_depth(count: Count, name: str, lines: list[str], warnings: list[str]) -> None:
    if not count.depth_valid:
        raise DataError(
            f"{name}: not one of {count.depth_pixels} pixels has a depth (0, negative and not finite are invalid); check "
            "the depth files, their scale and the crop"
        )
    share = count.depth_valid / count.depth_pixels
    lines.append(f"depth {count.depth_low:.3g} to {count.depth_high:.3g} m, valid in {share:.1%} of the pixels")
    if count.empty:
        warnings.append(f"{name}: {count.empty} of {count.images} depth maps have no valid pixel; they do not count")
