"""The user's own code by name: an importable module, or a .py file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from bidensify.errors import BidensifyError, ConfigError

__all__ = ["import_own", "is_imported"]

_files: dict[Path, tuple[int, ModuleType]] = {}


def is_imported(name: str) -> bool:
    """Whether :func:`import_own` would run nothing: the module, or the file as it is now, was imported before."""
    if not name.endswith(".py"):
        return name in sys.modules
    file = Path(name).resolve()
    return file in _files and file.is_file() and _files[file][0] == file.stat().st_mtime_ns


def import_own(name: str) -> ModuleType:
    """Imports a module by its dotted name, or a .py file by its path.

    The working directory is on the path from then on, as with ``python -m``. A file that did not change is run once.

    Raises:
        ConfigError: there is no such module or file, or it does not import what it asks for.
    """
    if name.endswith(".py"):
        return _import_file(name)
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except BidensifyError:
        raise
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the module {name!r} cannot be imported ({error}); it was looked for in the working directory {here!r} and "
            "where Python finds its packages"
        ) from error


def _import_file(name: str) -> ModuleType:
    file = Path(name).resolve()
    if not file.is_file():
        raise ConfigError(f"there is no file {name!r}; give the path of a Python file")
    if is_imported(name):
        return _files[file][1]
    # Under a name of its own where the stem is taken: a file called types.py must not stand in for Python's.
    known = _files[file][1].__name__ if file in _files else file.stem
    title = known if file in _files or known not in sys.modules else f"{file.stem}_{abs(hash(file)):x}"
    spec = importlib.util.spec_from_file_location(title, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        sys.modules.pop(title, None)
        raise ConfigError(f"the file {name!r} cannot be imported: {error}") from error
    _files[file] = (file.stat().st_mtime_ns, module)
    return module
