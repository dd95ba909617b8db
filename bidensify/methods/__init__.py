"""Binarization methods: one file each, and a registry. A file that is put into this folder, or below it, is a method."""

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
    no_such_bits,
    register_method,
)

__all__ = [
    "LayerParts",
    "LayerSpec",
    "Method",
    "available_methods",
    "get_method",
    "in_frame",
    "no_such_bits",
    "register_method",
]

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
