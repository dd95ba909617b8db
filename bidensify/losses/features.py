"""Outputs of named layers, recorded by forward hooks for the time of a stage."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bidensify._util.names import near
from bidensify.errors import ConfigError


class Features:
    """Records the latest output of the layers that ``patterns`` (paths or globs) match; use as a context manager.

    Args:
        model: a network; a student's layers keep the paths that they had before the rewrite.
        patterns: layer paths such as ``"encoder.layer3"`` or globs such as ``"decoder.blocks.*"``.
        role: how errors call the network.

    Raises:
        ConfigError: a pattern matches no layer; the message lists near names.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str], role: str = "model") -> None:
        self._role = role
        self._modules = {path: module for path, module in model.named_modules() if path}
        self._wanted: dict[str, nn.Module] = {}
        self._found: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for path in self.paths(patterns):
            self._wanted[path] = self._modules[path]

    def paths(self, patterns: Sequence[str]) -> list[str]:
        """Returns the layer paths that the patterns match, in the order of the model."""
        chosen: set[str] = set()
        for pattern in patterns:
            hits = [path for path in self._modules if path == pattern or fnmatch.fnmatchcase(path, pattern)]
            if not hits:
                raise ConfigError(
                    f"the layer {pattern!r} matches nothing in the {self._role}{near(pattern, self._modules)}"
                )
            chosen.update(hits)
        return [path for path in self._modules if path in chosen]

    def __enter__(self) -> Features:
        for path, module in self._wanted.items():
            self._handles.append(module.register_forward_hook(self._hook(path)))
        return self

    def _hook(self, path: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ConfigError(
                    f"the layer {path!r} of the {self._role} gives {type(output).__name__}, not one tensor; "
                    "name a layer within it"
                )
            # What comes behind may work in place.
            self._found[path] = output.clone()

        return record

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def forget(self) -> None:
        """Drops what was recorded, so that the next pass begins as the first did: none is taken for another's, and a compiled
        one need not be compiled again."""
        self._found.clear()

    def __getitem__(self, path: str) -> Tensor:
        if path not in self._found:
            raise ConfigError(f"the layer {path!r} of the {self._role} was not called; name a layer that runs")
        return self._found[path]
