"""Data sets of images with masks or depth maps, and their transforms."""

from __future__ import annotations

from bidensify.data.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataInfo,
    DenseDataset,
    Depth,
    Sample,
    Seeded,
    Transforms,
    available_datasets,
    build_dataset,
    dataset_options,
    register_dataset,
)
from bidensify.data.folder import ImageMaskFolder
from bidensify.data.palette import default_palette
from bidensify.data.scenes import Scenes
from bidensify.data.transforms import build_transforms, denormalise

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DataInfo",
    "DenseDataset",
    "Depth",
    "ImageMaskFolder",
    "Sample",
    "Scenes",
    "Seeded",
    "Transforms",
    "available_datasets",
    "build_dataset",
    "build_transforms",
    "dataset_options",
    "default_palette",
    "denormalise",
    "register_dataset",
]
