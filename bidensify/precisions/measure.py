"""Every change on every batch: metrics and distances, kept on disk so that a killed analysis goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bidensify._util.files import atomic_write
from bidensify.data.batches import collate_alike, to_device
from bidensify.losses import LOSSES, Loss, Outputs
from bidensify.precisions.change import Change
from bidensify.precisions.findings import Measured
from bidensify.precisions.replay import Replay
from bidensify.tasks import Sample, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["Bar", "Batches", "Store", "Tally", "distance_of", "measure"]

_DISTANCES = {"classes": "kl", "labels": "bce", "values": "l1"}


def distance_of(task: Task) -> tuple[str, Loss]:
    """The distance from teacher to student that fits what a task's channels are, by the name of its loss term.

    KL divergence per pixel for classes ("kl"), its counterpart per label ("bce"), mean absolute difference for values ("l1").
    """
    name = _DISTANCES[getattr(task, "outputs", "classes")]
    return name, LOSSES[name]()


def _alone() -> bool:
    return False


class Tally:
    """Running sums of one variant.

    Args:
        task: gives the metrics.
        distance: as ``distance_of`` gives it.
        device: where the outputs are.
    """

    def __init__(self, task: Task, distance: Loss, device: torch.device) -> None:
        from torchmetrics import Metric

        self.task, self.distance = task, distance
        self.metrics = task.metrics().to(device)
        # A task of the user's own may count in its own way.
        self.summed: Metric | None = self.metrics if isinstance(self.metrics, Metric) else None
        if self.summed is not None:
            # The process that measures does so alone; the others wait for it.
            self.summed.distributed_available_fn = _alone
        self.sum, self.images = 0.0, 0

    def add(self, output: Any, batch: Sample, teacher: Any) -> None:
        """Counts a batch: what the variant and the teacher (None without one) returned."""
        self.metrics.update(output, batch)
        count = len(batch["image"])
        if teacher is not None:
            self.sum += count * float(self.distance.value(Outputs(output, teacher), batch, self.task))
        self.images += count

    def result(self) -> tuple[float, float]:
        """(the task's primary metric, mean distance)."""
        return float(self.metrics.compute()[self.task.primary]), self.sum / max(self.images, 1)

    def state(self) -> dict[str, Any] | None:
        """The sums as JSON-able data; None where the metrics do not say theirs."""
        if self.summed is None:
            return None
        values = self.summed.metric_state
        if not all(isinstance(value, Tensor) for value in values.values()):
            return None
        held = {name: value.tolist() for name, value in values.items() if isinstance(value, Tensor)}
        return {"sum": self.sum, "images": self.images, "metrics": held}

    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of ``state``; floats of JSON are exact."""
        assert self.summed is not None
        self.sum, self.images = float(state["sum"]), int(state["images"])
        for name, value in self.summed.metric_state.items():
            assert isinstance(value, Tensor)
            setattr(self.summed, name, torch.tensor(state["metrics"][name], dtype=value.dtype, device=value.device))
        self.summed._update_count = 1


class Batches:
    """The data in batches of one size of image each, on the device."""

    def __init__(
        self, data: Dataset[Sample], size: int, device: torch.device, channels_last: bool, model: nn.Module
    ) -> None:
        self.loader: Any = DataLoader(data, batch_size=size, collate_fn=collate_alike, generator=torch.Generator())
        self.device, self.channels_last, self.model = device, channels_last, model

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        for alike in self.loader:
            yield [to_device(batch, self.device, self.channels_last, self.model) for batch in alike]

    def images(self, count: int) -> list[Tensor]:
        """The images of the first ``count`` batches."""
        found: list[Tensor] = []
        for batch in self:
            found += [part["image"] for part in batch]
            if len(found) >= count:
                break
        return found[:count]


class Bar:
    """A progress bar with the time that is left, on standard error.

    Args:
        total: steps.
        quiet: show nothing.
    """

    def __init__(self, total: int, quiet: bool) -> None:
        columns = (TextColumn("sensitivity"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        self._progress = Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True),
            disable=quiet,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, count: float = 1) -> None:
        """Goes ahead by ``count`` steps."""
        self._progress.advance(self._task, count)


class Store:
    """A file of sums, valid for one ``key`` (networks, data, what was asked for).

    Args:
        path: the file; None keeps nothing.
        key: what the sums are of.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key

    def read(self) -> tuple[int, dict[str, Any]]:
        """(batches that are done, variant -> its sums); (0, {}) where the file is of something else, or unreadable."""
        if self.path is None or not self.path.is_file():
            return 0, {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["key"] != self.key:
                return 0, {}
            return int(data["batches"]), dict(data["sums"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return 0, {}  # sums can be made again; they are no file that a user wrote

    def write(self, batches: int, sums: dict[str, Any]) -> None:
        """Keeps the sums after ``batches`` batches; nothing where one of them is not known as data."""
        if self.path is None or any(value is None for value in sums.values()):
            return
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps({"key": self.key, "batches": batches, "sums": sums}), encoding="utf-8")

    def remove(self) -> None:
        """Removes the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def measure(
    replay: Replay,
    changes: Sequence[Change],
    whole: Mapping[str, nn.Module | None],
    task: Task,
    batches: Batches,
    store: Store,
    bar: Bar,
) -> dict[str, Measured]:
    """Measures each change, and each network of ``whole`` as it is ("teacher", "student"), by name.

    Args:
        replay: of the network that the changes are of.
        changes: calibrated.
        whole: networks by name; distances are to the one called "teacher".
        task, batches: metrics and data.
        store: what was done before.
        bar: goes one step ahead per change and batch.
    """
    _, distance = distance_of(task)
    networks = {name: network for name, network in whole.items() if network is not None}
    names = [*networks, *(change.name for change in changes)]
    tallies = {name: Tally(task, distance, batches.device) for name in names}
    done, sums = store.read()
    if done:
        for name, tally in tallies.items():
            tally.restore(sums[name])
    for number, parts in enumerate(batches):
        if number < done:
            bar.step(len(changes))
            continue
        for batch in parts:
            x = batch["image"]
            kept = replay.begin(x)
            with torch.no_grad():
                found = {name: kept if each is replay.model else each(x) for name, each in networks.items()}
            theirs = found.get("teacher")
            for name, output in found.items():
                tallies[name].add(output, batch, theirs)
            for change in changes:
                with change.made():
                    output = replay.again(x, change.unit.layers)
                tallies[change.name].add(output, batch, theirs)
                bar.step(1 / len(parts))
        store.write(number + 1, {name: tally.state() for name, tally in tallies.items()})
    results = {name: tally.result() for name, tally in tallies.items()}
    known = "teacher" in networks
    return {name: Measured(metric=value, distance=far if known else None) for name, (value, far) in results.items()}
