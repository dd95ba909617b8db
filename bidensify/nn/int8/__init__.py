"""Layers in int8, the precision between one bit and float."""

from __future__ import annotations

from bidensify.nn.int8.layer import Int8Layer, int8_layers, make_int8
from bidensify.nn.int8.rounding import Int8

__all__ = ["Int8", "Int8Layer", "int8_layers", "make_int8"]
