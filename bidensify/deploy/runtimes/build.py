"""Builds the C++ runtimes against the packages that are installed here, and finds what was built."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bidensify._util.files import atomic_write
from bidensify.errors import ConfigError, MissingExtraError

__all__ = ["EXECUTORCH", "OPENVINO", "RUNTIMES", "Runtime"]

_HERE = Path(__file__).parent
_KERNELS = _HERE.parents[1] / "kernels" / "csrc" / "packed"


@dataclass(frozen=True)
class Runtime:
    """One of others' runtimes and the library that makes it run packed layers.

    Attributes:
        name: of its package, of the folder under ``deploy`` and of bidensify's extra.
        version: its versions begin with it.
        beside: a Python file that runs networks, and its name beside the library.
    """

    name: str
    version: str
    beside: tuple[str, str] | None = None

    @property
    def sources(self) -> Path:
        """The folder of its C++."""
        return _HERE.parent / self.name / "cpp"

    @property
    def library(self) -> str:
        """The library's name."""
        return f"libbidensify_{self.name}.{'dylib' if sys.platform == 'darwin' else 'so'}"

    @property
    def variable(self) -> str:
        """The environment variable that names a library to be used."""
        return f"BIDENSIFY_{self.name.upper()}"

    def folder(self) -> Path:
        """The installed package.

        Raises:
            MissingExtraError: it is not installed, or is of another version.
        """
        needs = f"pip install 'bidensify[{self.name}]'"
        try:
            version = importlib.metadata.version(self.name)
            folder = Path(str(importlib.metadata.distribution(self.name).locate_file(self.name)))
        except importlib.metadata.PackageNotFoundError:
            raise MissingExtraError(f"this needs the package {self.name}: {needs}") from None
        if not version.startswith(self.version):
            raise MissingExtraError(f"this needs {self.name} {self.version}*, {version} is installed: {needs}")
        return folder

    def build(self, out: Path, cmake: tuple[str, ...] = ()) -> Path:
        """Builds the library into the folder ``out``, with the Python file that runs networks beside it; returns the library.

        Args:
            out: made where it is not there.
            cmake: further arguments (-DCMAKE_TOOLCHAIN_FILE=..., -DCMAKE_PREFIX_PATH=...).

        Raises:
            MissingExtraError: the package or cmake is missing.
            ConfigError: it does not build; the message has the end of what the compiler said.
        """
        prefix = self.folder()
        program = shutil.which("cmake")
        if program is None:
            raise MissingExtraError(
                f"building the runtime needs cmake: pip install cmake, or pip install 'bidensify[{self.name}]'"
            )
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            given = (
                ()
                if any(argument.startswith("-DCMAKE_PREFIX_PATH=") for argument in cmake)
                else (f"-DCMAKE_PREFIX_PATH={prefix}",)
            )
            _say([program, "-S", str(self.sources), "-B", place, f"-DBIDENSIFY_KERNELS={_KERNELS}", *given, *cmake])
            _say([program, "--build", place, "--parallel", str(os.cpu_count() or 1)])
            _say([program, "--install", place, "--prefix", str(Path(place) / "installed")])
            copies = [(Path(place) / "installed" / self.library, out / self.library)]
            if self.beside is not None:
                copies.insert(0, (_HERE.parent / self.name / self.beside[0], out / self.beside[1]))
            for source, target in copies:
                # Renamed into place: a process that runs the former one keeps it, and another that builds does not meet it.
                with atomic_write(target) as temporary:
                    shutil.copyfile(source, temporary)
        return out / self.library

    def find(self) -> Path:
        """The library for this machine: what ``variable`` names, else one that is built once for these sources.

        Raises:
            MissingExtraError, ConfigError: see ``build``; or the variable names no file.
        """
        named = os.environ.get(self.variable)
        if named:
            if not Path(named).is_file():
                raise ConfigError(f"{self.variable}={named!r} is no file; unset it, or name {self.library}")
            return Path(named)
        folder = self._cache()
        return folder / self.library if (folder / self.library).is_file() else self.build(folder)

    def _cache(self) -> Path:
        digest = hashlib.sha256(str(self.folder()).encode())
        digest.update(importlib.metadata.version(self.name).encode())
        for file in sorted([*self.sources.iterdir(), *(_HERE / "cpp").iterdir(), *_KERNELS.iterdir()]):
            digest.update(file.read_bytes())
        base = os.environ.get("XDG_CACHE_HOME")
        root = Path(base) if base else Path.home() / ".cache"
        return root / "bidensify" / f"{self.name}-{digest.hexdigest()[:16]}"


EXECUTORCH = Runtime("executorch", "1.5.", ("program.py", "bidensify_program.py"))
OPENVINO = Runtime("openvino", "2026.")
RUNTIMES = {runtime.name: runtime for runtime in (EXECUTORCH, OPENVINO)}


def _say(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = (done.stdout + done.stderr)[-2000:]
        raise ConfigError(f"the runtime does not build: {' '.join(command[:3])} ended with {done.returncode}:\n{tail}")
