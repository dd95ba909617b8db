"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bidensify._util.registry import Registry
from bidensify.data.base import DenseDataset, Transforms

DATA_SETS: Registry[Callable[..., DenseDataset]] = Registry(
    "data set", "bidensify.register_data_set", given=("split", "transforms")
)


def register_data_set(name: str) -> Callable[[Callable[..., DenseDataset]], Callable[..., DenseDataset]]:
    """Registers a data set under ``name``: a class or function of ``(split, *, transforms=None, **options)``.

    Its options are its signature's other parameters. A name that is known goes to the newer one, with a warning.

    Raises:
        ConfigError: the name is no text.
    """
    return DATA_SETS.register(name)


# The name before tasks had a registry too; data sets that people wrote use it.
register_dataset = register_data_set


def available_datasets() -> list[str]:
    """Returns the names that :func:`build_dataset` takes."""
    return DATA_SETS.names()


def dataset_options(name: str) -> list[str]:
    """Returns the options of a data set.

    Raises:
        ConfigError: there is no such data set.
    """
    return list(DATA_SETS.options(name))


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
    dataset: DenseDataset = DATA_SETS.make(name, options, split, transforms=transforms)
    return dataset
