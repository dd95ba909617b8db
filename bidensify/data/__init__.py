"""Data sets of images with masks or depth maps, and their transforms."""

from __future__ import annotations

from bidensify.data.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataInfo,
    DenseDataset,
    Depth,
    Sample,
    Transforms,
    default_palette,
)
from bidensify.data.filedata import FileDataset, Files
from bidensify.data.fit import Fit
from bidensify.data.folder import ImageMaskFolder
from bidensify.data.readers import ImageReader
from bidensify.data.registry import (
    available_datasets,
    build_dataset,
    dataset_options,
    register_data_set,
    register_dataset,
)
from bidensify.data.scenes import Scenes
from bidensify.data.seeded import Seeded
from bidensify.data.sets import Ade20k, CamVid, Cityscapes, Kitti, NyuV2, Voc2012
from bidensify.data.survey import Report, check_dataset, survey
from bidensify.data.transforms import build_transforms, denormalise

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Ade20k",
    "CamVid",
    "Cityscapes",
    "DataInfo",
    "DenseDataset",
    "Depth",
    "FileDataset",
    "Files",
    "Fit",
    "ImageMaskFolder",
    "ImageReader",
    "Kitti",
    "NyuV2",
    "Report",
    "Sample",
    "Scenes",
    "Seeded",
    "Transforms",
    "Voc2012",
    "available_datasets",
    "build_dataset",
    "build_transforms",
    "check_dataset",
    "dataset_options",
    "default_palette",
    "denormalise",
    "register_data_set",
    "register_dataset",
    "survey",
]
