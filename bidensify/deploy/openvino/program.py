"""Runs an IR of ``bidensify export`` with OpenVINO and NumPy alone: no torch, no bidensify.

As a program it runs images in a process of its own: ``python program.py LIBRARY NET.xml INPUTS.npz OUTPUTS.npz [PACKAGES]``,
arrays named run_input and run_output.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["open_network"]


def open_network(path: str | Path, library: str | Path, threads: int = 0) -> Any:
    """The network on the CPU in float32, called with a list of arrays, as OpenVINO's ``CompiledModel``.

    Args:
        path: the .xml; its .bin lies beside it.
        library: libbidensify_openvino.
        threads: 0: as many as OpenVINO takes.

    Raises:
        RuntimeError: the file is no network that this runtime runs; the message says why.
    """
    ov: Any = importlib.import_module("openvino")
    core = ov.Core()
    core.add_extension(str(library))
    # Where a processor has bfloat16, OpenVINO would round the rest to it.
    hints = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    return core.compile_model(str(path), "CPU", hints)


def _main(library: str, path: str, given: str, results: str, *packages: str) -> None:
    sys.path.extend(packages)
    network = open_network(path, library)
    outputs = {}
    with np.load(given, allow_pickle=False) as file:
        runs = sorted({int(name.split("_")[0]) for name in file.files})
        for run in runs:
            names = sorted((n for n in file.files if n.startswith(f"{run}_")), key=lambda n: int(n.split("_")[1]))
            found = network([file[name] for name in names])
            for i in range(len(network.outputs)):
                outputs[f"{run}_{i}"] = found[i]
    np.savez(results, **outputs)


if __name__ == "__main__":
    _main(*sys.argv[1:])
