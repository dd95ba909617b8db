"""Interleaved timing: all variants run in turn, many times, in one process, so that a ratio compares like with like."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bidensify._util.machine import cpu_name
from bidensify._util.version import __version__
from bidensify.deploy.backends import available_kernels

__all__ = ["Timing", "interleave", "machine", "threads"]

_STAT = Path("/proc/stat")
# Counters advance 100 times a second: a stretch has to be long enough for them to show another program.
_STRETCH = 0.25
# Of one core: what a stretch may hold of other programs' work and still count, where only an idle machine will do.
_IDLE = 0.08


def machine() -> dict[str, Any]:
    """What ran: processor, cores, versions, kernels."""
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "bidensify": __version__,
        "kernels": list(available_kernels()),
    }


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """torch's number of threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Timing:
    """What ``interleave`` measured.

    Attributes:
        milliseconds: median per variant.
        rounds: how many rounds counted.
        others: cores that other programs kept busy meanwhile (0.5: half of one core), or None where the system does not say.
    """

    milliseconds: dict[str, float]
    rounds: int
    others: float | None


def interleave(
    variants: dict[str, Callable[[], Any]],
    *,
    seconds: float = 2.0,
    least: int = 5,
    idle: bool = False,
    patience: float = 30.0,
) -> Timing:
    """Median milliseconds of each variant, run in turn.

    Args:
        variants: name -> what to time.
        seconds: how long to go on, all variants together.
        least: rounds at least.
        idle: counts only stretches of rounds in which other programs left the machine alone (Linux).
        patience: with ``idle``, seconds to wait for such stretches; after them the disturbed ones count too, and
            ``others`` says by how much.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    disturbed: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
        call()
    gc.collect()
    gc.disable()
    busy = total = spent = 0.0
    deadline = time.perf_counter() + patience + seconds
    try:
        while spent < seconds or len(next(iter(times.values()))) < least:
            stretch, load = _stretch(variants, min(_STRETCH, seconds))
            length = load.seconds
            late = time.perf_counter() > deadline
            if idle and load.others is not None and load.others > _IDLE and not late:
                _extend(disturbed, stretch)
                continue
            if late and not next(iter(times.values())):
                _extend(times, disturbed)
            _extend(times, stretch)
            spent += length
            busy += (load.others or 0.0) * length
            total += length
    finally:
        gc.enable()
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return Timing(medians, len(next(iter(times.values()))), busy / total if _STAT.exists() else None)


@dataclass
class _Load:
    seconds: float
    others: float | None


def _stretch(variants: dict[str, Callable[[], Any]], seconds: float) -> tuple[dict[str, list[float]], _Load]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    before, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        for name, call in variants.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    length = time.perf_counter() - start
    after = _busy_seconds()
    if before is None or after is None:
        return times, _Load(length, None)
    return times, _Load(length, max(0.0, (after - before) - (_own_seconds() - own)) / length)


def _extend(into: dict[str, list[float]], more: dict[str, list[float]]) -> None:
    for name, values in more.items():
        into[name].extend(values)


def _own_seconds() -> float:
    used = os.times()
    return used.user + used.system


def _busy_seconds() -> float | None:
    """Processor seconds that all programs used since the machine started."""
    try:
        fields = [int(value) for value in _STAT.read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
