"""Benchmarks as their owners publish them, one file each; imported, they are registered."""

from __future__ import annotations

from bidensify.data.sets.ade20k import Ade20k
from bidensify.data.sets.camvid import CamVid
from bidensify.data.sets.cityscapes import Cityscapes
from bidensify.data.sets.kitti import Kitti
from bidensify.data.sets.nyuv2 import NyuV2
from bidensify.data.sets.voc import Voc2012

__all__ = ["Ade20k", "CamVid", "Cityscapes", "Kitti", "NyuV2", "Voc2012"]
