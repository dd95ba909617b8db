"""Quantizes an IR's float convolutions and matrix products to int8 (NNCF), in a process of its own.

``python quantize.py LIBRARY FLOAT.xml IMAGES.npz INT8.xml PACKAGES``, arrays named image_input. Everything else stays in float:
packed layers read and write it, so that int8 there would be conversions alone, and an enlargement's products would lose more
than they gain.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

_PRODUCTS = {
    "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul",
}  # fmt: skip


def _main(library: str, path: str, images: str, out: str, *packages: str) -> None:
    sys.path.extend(packages)
    ov: Any = importlib.import_module("openvino")
    nncf: Any = importlib.import_module("nncf")
    core = ov.Core()
    core.add_extension(library)
    network = core.read_model(path)
    with np.load(images, allow_pickle=False) as file:
        count = 1 + max(int(name.split("_")[0]) for name in file.files)
        given = [[file[f"{i}_{j}"] for j in range(len(network.inputs))] for i in range(count)]
    others = {node.get_type_name() for node in network.get_ops()} - _PRODUCTS
    # As enlarge.py names them; this program imports nothing of the package.
    names = [
        node.get_friendly_name()
        for node in network.get_ops()
        if node.get_friendly_name().startswith("bidensify_enlarge")
    ]
    scope = nncf.IgnoredScope(names=names, types=sorted(others), validate=False)
    # Without VNNI (AVX2 alone) pairs of products saturate at 16 bits, which weights of 7 bits cannot reach. By itself NNCF
    # sees to the first layer alone, and the file may run on another processor than this one.
    overflow = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    quantized = nncf.quantize(
        network, nncf.Dataset(given), subset_size=count, ignored_scope=scope, advanced_parameters=overflow
    )
    ov.save_model(quantized, out, compress_to_fp16=False)


if __name__ == "__main__":
    _main(*sys.argv[1:])
