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

__all__ = ["open_network", "run"]


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


def run(network: Any, images: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """The network's outputs.

    What a layer refuses is raised here; OpenVINO 2026.4 drops it where ``network(images)`` runs on one thread.

    Raises:
        RuntimeError: the images are not the network's, or a layer refuses them.
    """
    request = network.create_infer_request()
    request.start_async(images)
    request.wait()
    return [request.get_output_tensor(i).data.copy() for i in range(len(network.outputs))]


def _main(library: str, path: str, given: str, results: str, *packages: str) -> None:
    sys.path.extend(packages)
    network = open_network(path, library)
    outputs: dict[str, Any] = {}
    with np.load(given, allow_pickle=False) as file:
        for number in sorted({int(name.split("_")[0]) for name in file.files}):
            names = sorted((n for n in file.files if n.startswith(f"{number}_")), key=lambda n: int(n.split("_")[1]))
            found = run(network, [file[name] for name in names])
            outputs |= {f"{number}_{i}": output for i, output in enumerate(found)}
    np.savez(results, **outputs)


if __name__ == "__main__":
    _main(*sys.argv[1:])
