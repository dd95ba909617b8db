"""Binarization methods: one file each, and a registry."""

from __future__ import annotations

from bidensify.methods import bidense, bnn
from bidensify.methods.registry import LayerParts, LayerSpec, Method, available_methods, get_method, register_method

__all__ = [
    "LayerParts",
    "LayerSpec",
    "Method",
    "available_methods",
    "bidense",
    "bnn",
    "get_method",
    "register_method",
]
