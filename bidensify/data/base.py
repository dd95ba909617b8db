"""The small interface behind which every data set stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from bidensify._util.seeding import seeded
from bidensify.errors import ConfigError

Sample = dict[str, Tensor]
Transforms = Callable[[Sample], Sample]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Depth(tv_tensors.Mask):  # type: ignore[misc]  # torchvision is untyped
    """A depth map, float32 (H, W), 0 = invalid; transforms move it like a mask, so values of two pixels never mix."""


@dataclass(frozen=True)
class DataInfo:
    """What a data set tells about itself.

    Attributes:
        num_classes: number of classes, 0 where there are no masks.
        class_names: one name per class.
        palette: one colour (r, g, b) per class.
        ignore_index: label of pixels that do not count.
        mean, std: per channel, on images scaled to [0, 1].
        depth: whether samples have a depth map.
        max_depth: upper end of the depth in metres, if it is known.
    """

    num_classes: int
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = 255
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    depth: bool = False
    max_depth: float | None = None


class DenseDataset(Dataset[Sample]):
    """A data set of images with a mask, a depth map, or both.

    A sub-class gives ``info``, ``__len__`` and :meth:`load`. A sample is a dict of tv_tensors: ``image`` uint8
    (3, H, W), ``mask`` int64 (H, W), ``depth`` float32 (H, W) in metres with 0 = invalid; ``transforms`` are applied last.
    """

    info: DataInfo

    def __init__(self, transforms: Transforms | None = None) -> None:
        self.transforms = transforms

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> Sample:
        """Returns sample ``index`` (0 <= index < len) before the transforms, always the same."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """Returns what to call sample ``index`` in reports: a file's stem, or its number."""
        return str(index)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)}")
        sample = self.load(int(index) % len(self))
        return sample if self.transforms is None else self.transforms(sample)


class Seeded(Dataset[Sample]):
    """Makes a data set's augmentation a function of (seed, epoch, index) alone.

    Order, number of workers, number of processes and earlier draws have no influence, so that a resumed run sees the
    samples that an uninterrupted one sees. The caller's random state is left as it was.

    Args:
        dataset: its transforms may draw from PyTorch's CPU generator only.
        seed: any integer.

    Attributes:
        info: the data set's, or None where it is one of the user's own without.
    """

    def __init__(self, dataset: DenseDataset | Dataset[Sample], seed: int) -> None:
        self.dataset = dataset
        self.info: DataInfo | None = getattr(dataset, "info", None)
        self.seed = int(seed)
        # Shared memory, because the workers of a persistent loader keep the copy that they started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, for running worker processes too; call it before the loader is iterated."""
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        with seeded(_mix(self.seed, self.epoch, int(index) % max(len(self), 1))):
            return self.dataset[index]


def _mix(*values: int) -> int:
    """Hashes integers to 63 bits (SplitMix64's finaliser, once per value): close inputs give unrelated seeds."""
    state = 0
    for value in values:
        state = (state ^ (value & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


_DATASETS: dict[str, Callable[..., DenseDataset]] = {}


def register_dataset(name: str) -> Callable[[Callable[..., DenseDataset]], Callable[..., DenseDataset]]:
    """Registers a data set under ``name``: a class or function of ``(split, *, transforms=None, **options)``.

    Raises:
        ConfigError: the name is taken.
    """

    def register(factory: Callable[..., DenseDataset]) -> Callable[..., DenseDataset]:
        if name in _DATASETS and _DATASETS[name] is not factory:
            raise ConfigError(f"a data set {name!r} is already registered ({_DATASETS[name]}); choose another name")
        _DATASETS[name] = factory
        return factory

    return register


def available_datasets() -> list[str]:
    """Returns the names that :func:`build_dataset` takes."""
    return sorted(_DATASETS)


def dataset_options(name: str) -> list[str]:
    """Returns the options of a data set.

    Raises:
        ConfigError: there is no such data set.
    """
    parameters = inspect.signature(_factory(name)).parameters.values()
    return [p.name for p in parameters if p.name not in ("split", "transforms") and p.kind is not p.VAR_KEYWORD]


def build_dataset(name: str, split: str, *, transforms: Transforms | None = None, **options: Any) -> DenseDataset:
    """Builds a data set by name.

    Args:
        name: see :func:`available_datasets`.
        split: ``train``, ``val`` or what else the data set has.
        transforms: applied to each sample; see :func:`bidensify.data.build_transforms`.
        options: of the data set.

    Raises:
        ConfigError: there is no such data set, split or option, an option is missing, or a value is out of range.
        DataError: the files are not what the options promise.
    """
    factory = _factory(name)
    parameters = inspect.signature(factory).parameters
    known = dataset_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(
            f"the data set {name!r} has no option {', '.join(unknown)}; its options are {', '.join(known)}"
        )
    missing = [n for n in known if parameters[n].default is inspect.Parameter.empty and n not in options]
    if missing:
        raise ConfigError(f"the data set {name!r} needs the option {', '.join(missing)}; given were {sorted(options)}")
    return factory(split, transforms=transforms, **options)


def _factory(name: str) -> Callable[..., DenseDataset]:
    if name not in _DATASETS:
        raise ConfigError(
            f"there is no data set {name!r}; use one of {', '.join(available_datasets())}, or register yours with "
            "bidensify.data.register_dataset"
        )
    return _DATASETS[name]
