"""Registers integrations with other libraries at the moment when these are imported, in either order.

``import bidensify`` must cost nothing, so it cannot import them; and a checkpoint that names "bidensify" must load (or be
refused) wherever bidensify was imported, so registration cannot wait until somebody asks for it.
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

__all__ = ["register"]

# Another library's module -> ours, which is imported behind it.
_INTEGRATIONS = {
    "transformers.quantizers.auto": "bidensify.integrations.transformers",
    "huggingface_hub.hub_mixin": "bidensify.integrations.hub",
    "torch.nn.modules.module": "bidensify.integrations.strict",
}


def _register(module: str) -> None:
    try:
        importlib.import_module(_INTEGRATIONS[module])
    except ImportError as error:
        # The library itself must stay importable, whatever its version.
        library = module.partition(".")[0]
        needs = (
            "; from_pretrained(quantization_config=...) needs transformers 5 or later"
            if library == "transformers"
            else ""
        )
        warnings.warn(f"bidensify could not register with the installed {library} ({error}){needs}", stacklevel=2)


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
        _register(module.__name__)


class _Finder(importlib.abc.MetaPathFinder):
    """Answers for each of the modules, once."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.waiting = set(modules)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        self.waiting.discard(fullname)
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register() -> None:
    """Registers now with what is imported already, else as soon as it is."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    missing = [module for module in _INTEGRATIONS if module not in sys.modules]
    if missing:
        sys.meta_path.insert(0, _Finder(missing))
    for module in _INTEGRATIONS:
        if module in sys.modules:
            _register(module)
