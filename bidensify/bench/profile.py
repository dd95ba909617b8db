"""Where the time of a network goes: its layers by kind, and what runs between them."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bidensify.deploy.layers import PackedLayer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

__all__ = ["BETWEEN", "PACKED", "Share", "profile", "table"]

PACKED = "packed layers"
# Functions that no layer calls: sums, concatenations, upsampling, reshaping, and Python itself.
BETWEEN = "between layers"


@dataclass(frozen=True)
class Share:
    """A kind of layer in one run of a network.

    Attributes:
        kind: ``PACKED``, a full-precision layer's class, or ``BETWEEN``.
        calls: per run.
        milliseconds: per run, median over runs.
        largest: the path of the layer that takes longest, or "".
        largest_milliseconds: of that layer.
    """

    kind: str
    calls: int
    milliseconds: float
    largest: str = ""
    largest_milliseconds: float = 0.0


class _Clock:
    """Time and calls of each layer in one run. What a layer calls of others is its own time."""

    def __init__(self) -> None:
        self._open: list[tuple[str, float]] = []
        self.start()

    def start(self) -> None:
        """A new run."""
        self.spent: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def enter(self, path: str) -> None:
        self._open.append((path, time.perf_counter()))

    def leave(self, path: str) -> None:
        if not self._open or self._open[-1][0] != path:
            return
        _, start = self._open.pop()
        if not self._open:
            self.spent[path] += time.perf_counter() - start
            self.calls[path] += 1


@contextmanager
def _timed(layers: Mapping[str, nn.Module], clock: _Clock) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for path, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(lambda *_, path=path: clock.enter(path)))
            handles.append(layer.register_forward_hook(lambda *_, path=path: clock.leave(path), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def profile(model: nn.Module, x: Any, *, runs: int = 10) -> list[Share]:
    """Time of each kind of layer, on the CPU.

    Args:
        model: a network; layers are its packed ones and every module that has no others inside.
        x: its input.
        runs: that are measured, after two that are not.

    Returns:
        Kinds by time, the longest first. Their milliseconds are medians, so that their sum is the network's time only nearly.
    """
    layers = {
        path: module
        for path, module in model.named_modules()
        if path and (isinstance(module, PackedLayer) or not any(True for _ in module.children()))
    }
    # A packed layer of a method's own binarizer or activation holds modules; their time is the layer's.
    inside = tuple(f"{path}." for path, module in layers.items() if isinstance(module, PackedLayer))
    layers = {path: module for path, module in layers.items() if not inside or not path.startswith(inside)}
    times: list[dict[str, float]] = []
    totals: list[float] = []
    clock = _Clock()
    with torch.inference_mode():
        for _ in range(2):
            model(x)
        with _timed(layers, clock):
            for _ in range(runs):
                clock.start()
                start = time.perf_counter()
                model(x)
                totals.append(time.perf_counter() - start)
                times.append(clock.spent)
    return _shares({path: _kind(layers[path]) for path in clock.calls}, times, totals, clock.calls)


def _kind(layer: nn.Module) -> str:
    return PACKED if isinstance(layer, PackedLayer) else type(layer).__name__


def _shares(
    kinds: Mapping[str, str], times: Sequence[Mapping[str, float]], totals: Sequence[float], calls: Mapping[str, int]
) -> list[Share]:
    paths: dict[str, list[str]] = defaultdict(list)
    for path, kind in kinds.items():
        paths[kind].append(path)
    result = []
    for kind, members in paths.items():
        each = {path: statistics.median(run.get(path, 0.0) for run in times) * 1e3 for path in members}
        largest = max(each, key=lambda path: each[path])
        whole = statistics.median(sum(run.get(path, 0.0) for path in members) for run in times) * 1e3
        result.append(Share(kind, sum(calls[path] for path in members), whole, largest, each[largest]))
    rest = statistics.median(total - sum(run.values()) for total, run in zip(totals, times, strict=True)) * 1e3
    result.append(Share(BETWEEN, 0, rest))
    return sorted(result, key=lambda share: -share.milliseconds)


def table(case: str, threads: int, variant: str, shares: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table of one variant's shares, as ``run_bench`` gives them, that fits 80 columns."""
    from rich.table import Table

    total = sum(share["milliseconds"] for share in shares)
    found = Table(title=f"Where the time goes: {case}, {threads} thread(s), {variant}")
    found.add_column("kind", no_wrap=True)
    for column in ("calls", "ms", "share"):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("longest")
    for share in shares:
        longest = f"{share['largest']}: {share['largest_milliseconds']:.2f} ms" if share["largest"] else ""
        cells = (
            str(share["calls"] or ""),
            f"{share['milliseconds']:.2f}",
            f"{100 * share['milliseconds'] / total:.0f} %",
        )
        found.add_row(share["kind"], *cells, longest)
    return found
