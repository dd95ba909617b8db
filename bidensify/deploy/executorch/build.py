"""Builds the C++ runtime against the ExecuTorch that is installed here, and finds what was built."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bidensify.errors import ConfigError, MissingExtraError

__all__ = ["RUNTIME_VARIABLE", "SOURCES", "build_runtime", "executorch_folder", "find_runtime"]

RUNTIME_VARIABLE = "BIDENSIFY_EXECUTORCH"
LIBRARY = f"libbidensify_executorch.{'dylib' if sys.platform == 'darwin' else 'so'}"
PROGRAM = "bidensify_program.py"
_HERE = Path(__file__).parent
SOURCES = _HERE / "cpp"
_KERNELS = _HERE.parents[1] / "kernels" / "csrc" / "packed"
_NEEDS = "pip install 'bidensify[executorch]'"


def executorch_folder() -> Path:
    """The installed package.

    Raises:
        MissingExtraError: ExecuTorch is not installed, or is not of version 1.5.
    """
    try:
        version = importlib.metadata.version("executorch")
        folder = Path(str(importlib.metadata.distribution("executorch").locate_file("executorch")))
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError(f"this needs the package executorch: {_NEEDS}") from None
    if not version.startswith("1.5."):
        raise MissingExtraError(f"this needs executorch 1.5, {version} is installed: {_NEEDS}")
    return folder


def build_runtime(out: Path, cmake: tuple[str, ...] = ()) -> Path:
    """Builds the library into the folder ``out``, with the Python file that runs programs beside it; returns the library.

    Args:
        out: made where it is not there.
        cmake: further arguments (-DCMAKE_TOOLCHAIN_FILE=..., -DCMAKE_PREFIX_PATH=...).

    Raises:
        MissingExtraError: ExecuTorch 1.5 or cmake is missing.
        ConfigError: it does not build; the message has the end of what the compiler said.
    """
    prefix = executorch_folder()
    program = shutil.which("cmake")
    if program is None:
        raise MissingExtraError(f"building the runtime needs cmake: pip install cmake, or {_NEEDS}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        given = (
            ()
            if any(argument.startswith("-DCMAKE_PREFIX_PATH=") for argument in cmake)
            else (f"-DCMAKE_PREFIX_PATH={prefix}",)
        )
        _say([program, "-S", str(SOURCES), "-B", place, f"-DBIDENSIFY_KERNELS={_KERNELS}", *given, *cmake])
        _say([program, "--build", place, "--parallel", str(os.cpu_count() or 1)])
        _say([program, "--install", place, "--prefix", str(Path(place) / "installed")])
        # Renamed into place: a process that runs the former one keeps it.
        shutil.copy(Path(place) / "installed" / LIBRARY, out / f".{LIBRARY}.tmp")
        os.replace(out / f".{LIBRARY}.tmp", out / LIBRARY)
    shutil.copy(_HERE / "program.py", out / PROGRAM)
    return out / LIBRARY


def find_runtime() -> Path:
    """The library for this machine: what BIDENSIFY_EXECUTORCH names, else one that is built once for these sources.

    Raises:
        MissingExtraError, ConfigError: see ``build_runtime``; or BIDENSIFY_EXECUTORCH names no file.
    """
    named = os.environ.get(RUNTIME_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise ConfigError(f"{RUNTIME_VARIABLE}={named!r} is no file; unset it, or name {LIBRARY}")
        return Path(named)
    folder = _cache()
    return folder / LIBRARY if (folder / LIBRARY).is_file() else build_runtime(folder)


def _cache() -> Path:
    digest = hashlib.sha256(str(executorch_folder()).encode())
    digest.update(importlib.metadata.version("executorch").encode())
    for file in sorted([*SOURCES.iterdir(), *_KERNELS.iterdir()]):
        digest.update(file.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bidensify" / f"executorch-{digest.hexdigest()[:16]}"


def _say(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = (done.stdout + done.stderr)[-2000:]
        raise ConfigError(f"the runtime does not build: {' '.join(command[:3])} ended with {done.returncode}:\n{tail}")
