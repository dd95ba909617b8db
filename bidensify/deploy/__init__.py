"""From a latent network to one that runs from bits: freeze, pack, format (files), run; and export to other runtimes."""

from __future__ import annotations

from bidensify.deploy.backends import Backend, available_kernels, register_backend
from bidensify.deploy.format import read_packed, write_packed
from bidensify.deploy.layers import PackedConv2d, PackedConvTranspose2d, PackedLayer, PackedLinear, packed_layers
from bidensify.deploy.pack import pack, replace_layers, set_float_dtype, set_kernel
from bidensify.deploy.spec import PackedSpec
from bidensify.kernels.memory import release_memory

__all__ = [
    "Backend",
    "PackedConv2d",
    "PackedConvTranspose2d",
    "PackedLayer",
    "PackedLinear",
    "PackedSpec",
    "available_kernels",
    "pack",
    "packed_layers",
    "read_packed",
    "register_backend",
    "release_memory",
    "replace_layers",
    "set_float_dtype",
    "set_kernel",
    "write_packed",
]
