"""The runtime of packed networks: packed layers, their file format, kernels and dispatch."""

from __future__ import annotations

from bidensify.runtime.format import read_packed, write_packed
from bidensify.runtime.outputs import release_memory
from bidensify.runtime.pack import pack, replace_layers, set_float_dtype, set_kernel
from bidensify.runtime.packed import PackedConv2d, PackedConvTranspose2d, PackedLayer, PackedLinear, packed_layers
from bidensify.runtime.spec import LayerSpec

__all__ = [
    "LayerSpec",
    "PackedConv2d",
    "PackedConvTranspose2d",
    "PackedLayer",
    "PackedLinear",
    "pack",
    "packed_layers",
    "read_packed",
    "release_memory",
    "replace_layers",
    "set_float_dtype",
    "set_kernel",
    "write_packed",
]
