"""Binarization methods: one file each, and a registry. A file that is put into this folder is a method."""

from __future__ import annotations

import importlib
import pkgutil

from bidensify.methods.registry import (
    LayerParts,
    LayerSpec,
    Method,
    available_methods,
    get_method,
    in_frame,
    register_method,
)

__all__ = [
    "LayerParts",
    "LayerSpec",
    "Method",
    "available_methods",
    "get_method",
    "in_frame",
    "register_method",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
