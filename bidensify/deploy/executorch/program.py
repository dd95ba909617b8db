"""Runs a .pte of ``bidensify export`` with NumPy alone, through libbidensify_executorch: no torch, no bidensify.

``bidensify runtime build --out DIR`` puts this file beside the library, as bidensify_program.py. As a program it runs images in a
process of its own: ``python program.py LIBRARY NET.pte INPUTS.npz OUTPUTS.npz``, arrays named run_input and run_output.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Program"]

# Numbers that ExecuTorch gives dtypes. NumPy has no bfloat16: it comes and goes as float32.
_DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}
_BFLOAT16 = 15


class _Tensor(ctypes.Structure):
    """``bidensify_tensor`` of runner.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("dims", ctypes.c_int32),
        ("sizes", ctypes.c_int32 * 16),
        ("bytes", ctypes.c_int64),
    ]


class Program:
    """A loaded .pte.

    Args:
        path: the file.
        library: libbidensify_executorch; by default the one beside this file.
        threads: of ExecuTorch's pool, which all programs of a process share; 0 leaves it as it is, which it must be once another
            program was loaded.

    Attributes:
        inputs: (largest shape, dtype) of each input.

    Raises:
        RuntimeError: the file is no program that this runtime runs; the message says why.
    """

    def __init__(self, path: str | Path, library: str | Path | None = None, threads: int = 0) -> None:
        end = "dylib" if sys.platform == "darwin" else "so"
        found = ctypes.CDLL(str(library or Path(__file__).parent / f"libbidensify_executorch.{end}"))
        found.bidensify_open.restype = ctypes.c_void_p
        pointer: Any = ctypes.c_void_p
        integer, text = ctypes.c_int32, ctypes.c_char_p
        # What bidensify_open gives is the first argument of all others.
        arguments: dict[str, list[Any]] = {
            "close": [],
            "counts": [pointer, pointer],
            "input": [integer, pointer],
            "run": [pointer, integer, text, ctypes.c_size_t],
            "output": [integer, pointer],
            "constant": [text, pointer, integer],
        }
        for name, rest in arguments.items():
            getattr(found, f"bidensify_{name}").argtypes = [pointer, *rest]
        self._library, self._error = found, ctypes.create_string_buffer(1000)
        self.threads = int(found.bidensify_threads(threads))
        self._net = found.bidensify_open(str(path).encode(), self._error, ctypes.c_size_t(len(self._error)))
        if not self._net:
            raise RuntimeError(self._error.value.decode(errors="replace"))
        inputs, outputs = ctypes.c_int32(), ctypes.c_int32()
        found.bidensify_counts(self._net, ctypes.byref(inputs), ctypes.byref(outputs))
        self._outputs = outputs.value
        self.inputs: list[tuple[tuple[int, ...], str]] = []
        self._halves: list[bool] = []
        self._least: list[tuple[int, ...]] = []
        for i in range(inputs.value):
            info = _Tensor()
            if found.bidensify_input(self._net, i, ctypes.byref(info)) == 0:
                dtype = "float32" if info.dtype == _BFLOAT16 else _DTYPES.get(info.dtype, "unknown")
                self.inputs.append((tuple(info.sizes[: info.dims]), dtype))
                self._halves.append(info.dtype == _BFLOAT16)
                self._least.append(tuple(int(n) for n in self.constant(f"input{i}_least") or info.sizes[: info.dims]))

    def __del__(self) -> None:
        if getattr(self, "_net", None):
            self._library.bidensify_close(self._net)
            self._net = None

    def __call__(self, *arrays: Any) -> list[Any]:
        """Runs on arrays of ``inputs``' dtypes, sizes at most theirs; returns the outputs as new arrays.

        Raises:
            ValueError: an array of another dtype, or of a shape that the program does not take.
            RuntimeError: the program does not run on these inputs; the message says why.
        """
        if len(arrays) != len(self.inputs):
            raise ValueError(f"{len(arrays)} inputs, the program takes {len(self.inputs)}")
        given, keep = (_Tensor * max(1, len(arrays)))(), []
        for i, (tensor, array) in enumerate(zip(given, arrays)):
            most, wanted = self.inputs[i]
            if str(array.dtype) != wanted:
                raise ValueError(f"input {i} is {array.dtype}, the program takes {wanted}")
            # ExecuTorch looks at the number of values alone where sizes may vary.
            least = self._least[i]
            if len(most) != array.ndim or not all(a <= n <= b for a, n, b in zip(least, array.shape, most)):
                raise ValueError(f"input {i} has the shape {array.shape}, the program takes {least} to {most}")
            array = np.ascontiguousarray(array)
            tensor.dtype = next(number for number, name in _DTYPES.items() if name == wanted)
            if self._halves[i]:
                bits = array.view("uint32")
                # To the nearest, ties to even.
                array = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("uint16")
                tensor.dtype = _BFLOAT16
            keep.append(array)
            tensor.data, tensor.dims, tensor.bytes = array.ctypes.data, array.ndim, array.nbytes
            tensor.sizes[: array.ndim] = array.shape
        if self._library.bidensify_run(self._net, given, len(arrays), self._error, len(self._error)):
            raise RuntimeError(self._error.value.decode(errors="replace"))
        return [self._output(i) for i in range(self._outputs)]

    def constant(self, name: str) -> list[float] | None:
        """Numbers that ``bidensify export`` wrote beside the network (image_mean, image_std), or None."""
        room, count = 0, 64
        while count > room:
            room = count
            values = (ctypes.c_double * room)()
            count = self._library.bidensify_constant(self._net, name.encode(), values, room)
        return None if count < 0 else list(values[:count])

    def _output(self, i: int) -> Any:
        info = _Tensor()
        if self._library.bidensify_output(self._net, i, ctypes.byref(info)):
            raise RuntimeError(f"output {i} is no tensor")
        half = info.dtype == _BFLOAT16
        array = np.empty(tuple(info.sizes[: info.dims]), "uint16" if half else _DTYPES[info.dtype])
        info.data = array.ctypes.data
        self._library.bidensify_output(self._net, i, ctypes.byref(info))
        return (array.astype("uint32") << 16).view("float32") if half else array


def _main(library: str, path: str, given: str, results: str, *_: str) -> None:
    program = Program(path, library)
    outputs = {}
    with np.load(given, allow_pickle=False) as file:
        runs = sorted({int(name.split("_")[0]) for name in file.files})
        for run in runs:
            names = sorted((n for n in file.files if n.startswith(f"{run}_")), key=lambda n: int(n.split("_")[1]))
            for i, array in enumerate(program(*(file[name] for name in names))):
                outputs[f"{run}_{i}"] = array
    np.savez(results, **outputs)


if __name__ == "__main__":
    _main(*sys.argv[1:])
