"""A network run again from where it changed: what was computed before the changed layer is given back, not computed.

Everything that finished before a layer is called does not depend on that layer. So one run of the unchanged network keeps
what its modules gave, and a run with a changed layer enters only what had not finished when that layer was called. This is
exact, not an approximation; :class:`Replay` checks it bit for bit on the network itself before it relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bidensify.nn import BinaryLayer

__all__ = ["Replay"]

_PLAIN = (Tensor, int, float, bool, str, type(None), torch.dtype, torch.device)
Call = Callable[..., Any]


class _Stop(BaseException):
    """Ends a run behind the last layer that is of interest; no ``except Exception`` of a network catches it."""


@dataclass
class _Entry:
    """One call of a module: which, how many calls had begun when it ended, whether its result can be kept, is, as a copy."""

    module: int
    end: int = 0
    plain: bool = False
    kept: bool = False
    copied: bool = False


class Replay:
    """Runs a network on a batch, then again and again with changed layers, from the first of them on.

    Args:
        model: in evaluation mode; without gradients, the same input must give the same bits.
        example: a small input (1, C, H, W) to look at the network's calls with.
        layers: paths of the layers that may change; each must be called.

    Attributes:
        exact: whether running again from every one of the layers gave the bits of a whole run on ``example``. If not (a
            network that keeps state between runs, or draws at random), every run is a whole one.
        first, last: path -> number of the layer's first and last call, in the order in which calls begin.
    """

    def __init__(self, model: nn.Module, example: Tensor, layers: Iterable[str]) -> None:
        self.model = model
        self.modules = {id(module): path for path, module in _entered(model)}
        self.results: dict[int, Any] = {}
        self.entries: list[_Entry] = []
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        wanted = set(layers)
        whole, seen = self._survey(example)
        for number, entry in enumerate(self.entries):
            path = self.modules[entry.module]
            if path in wanted:
                self.first.setdefault(path, number)
                self.last[path] = number
        self._keep(sorted(set(self.first.values())))
        for number, versions in seen.items():
            # What is written into later (an in-place activation, +=) has to be kept as it was, and given out as a copy.
            self.entries[number].copied = any(tensor._version != version for tensor, version in versions)
        self.exact = True
        self.exact = self._is_exact(example, whole)
        if not self.exact:
            self._keep([])

    def begin(self, x: Tensor) -> Any:
        """Runs the unchanged network on ``x``, keeps what later runs need of it, and returns its output."""
        self.results.clear()
        count = 0

        def call(original: Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal count
            number, count = count, count + 1
            result = original(module, *args, **kwargs)
            if number < len(self.entries) and self.entries[number].kept:
                self.results[number] = _copy(result) if self.entries[number].copied else _rebuilt(result)
            return result

        with torch.no_grad(), self._watched(call):
            return self.model(x)

    def again(self, x: Tensor, layers: Iterable[str], *, stop: bool = False) -> Any:
        """Runs the network on the ``x`` of ``begin``, with ``layers`` changed by the caller.

        Args:
            x: the same input.
            layers: every layer that differs from what ``begin`` ran.
            stop: end behind the last of them.

        Returns:
            The network's output; None with ``stop``.
        """
        changed = list(layers)
        start = min(self.first[path] for path in changed) if self.exact else 0
        end = max(self.last[path] for path in changed) if stop else -1
        count = 0

        def call(original: Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal count
            number = count
            if number < start:
                entry = self.entries[number]
                if entry.module != id(module):
                    raise RuntimeError(
                        f"{self.modules[id(module)]} was called where the unchanged network did not call it"
                    )
                if entry.kept and entry.end <= start:
                    count = entry.end
                    kept = self.results[number]
                    return _copy(kept) if entry.copied else _rebuilt(kept)
            count += 1
            result = original(module, *args, **kwargs)
            if number == end:
                raise _Stop
            return result

        with torch.no_grad(), self._watched(call):
            try:
                return self.model(x)
            except _Stop:
                return None

    @contextmanager
    def _watched(self, call: Callable[[Call, nn.Module, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        original = nn.Module.__call__

        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(module) not in self.modules:
                return original(module, *args, **kwargs)
            return call(original, module, args, kwargs)

        nn.Module.__call__ = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def _survey(self, x: Tensor) -> tuple[Any, dict[int, list[tuple[Tensor, int]]]]:
        """Writes the calls of one run down; returns its output, and each result's tensors with their version then."""
        seen: dict[int, list[tuple[Tensor, int]]] = {}

        def call(original: Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            number = len(self.entries)
            self.entries.append(_Entry(id(module)))
            result = original(module, *args, **kwargs)
            self.entries[number].end = len(self.entries)
            # A result that cannot be taken apart is made again each time; what its parts gave may be kept.
            self.entries[number].plain = all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(result))
            seen[number] = [(leaf, leaf._version) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            return result

        with torch.no_grad(), self._watched(call):
            return self.model(x), seen

    def _keep(self, starts: list[int]) -> None:
        """Marks the results that some run from one of ``starts`` gives back: those whose parent had not finished then."""
        open_: list[_Entry] = []
        for number, entry in enumerate(self.entries):
            while open_ and open_[-1].end <= number:
                open_.pop()
            limit = min((outer.end for outer in open_ if outer.plain), default=len(self.entries) + 1)
            entry.kept = entry.plain and any(entry.end <= start < limit for start in starts)
            open_.append(entry)

    def _is_exact(self, x: Tensor, whole: Any) -> bool:
        expected = tree_leaves(self.begin(x))
        if not _same(expected, tree_leaves(whole)):
            return False
        for path in self.first:
            try:
                if not _same(expected, tree_leaves(self.again(x, [path]))):
                    return False
            except (RuntimeError, KeyError):
                return False
        return True


def _entered(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose calls count: all but the parts of binary layers."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path and not path.startswith(inside):
            yield path, module
            if isinstance(module, BinaryLayer):
                inside = (*inside, path + ".")


def _rebuilt(value: Any) -> Any:
    """The same tensors in containers of their own, since a caller may take entries out of a list that it was given."""
    return tree_map(lambda leaf: leaf, value)


def _copy(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def _same(a: list[Any], b: list[Any]) -> bool:
    if len(a) != len(b):
        return False
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b))
