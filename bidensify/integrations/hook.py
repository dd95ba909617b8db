"""Registers bidensify with transformers at the moment when transformers' quantizers are imported, in either order.

``import bidensify`` must cost nothing, so it cannot import transformers; and a checkpoint that names "bidensify" must load
wherever bidensify was imported, so registration cannot wait until somebody asks for it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["register_with_transformers"]

_QUANTIZERS = "transformers.quantizers.auto"
_INTEGRATION = "bidensify.integrations.transformers"


def _register() -> None:
    try:
        importlib.import_module(_INTEGRATION)
    except ImportError as error:
        # transformers itself must stay importable, whatever its version.
        warnings.warn(
            f"bidensify could not register with the installed transformers ({error}); "
            "from_pretrained(quantization_config=...) needs transformers 5 or later",
            stacklevel=2,
        )


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Answers for one module, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Registers now if transformers' quantizers are imported already, else as soon as they are."""
    if _QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
