"""``bidensify.sensitivity``: every layer and block of a student in another precision, one at a time."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bidensify._util.fingerprint import fingerprint, weights_fingerprint
from bidensify._util.machine import cpu_name
from bidensify._util.modes import evaluation_flags
from bidensify._util.wrappers import unwrap
from bidensify.data.batches import to_device
from bidensify.errors import ConfigError, DataError
from bidensify.nn import binary_layers, state_of
from bidensify.precisions.change import Change, InStudent, InTeacher, observe
from bidensify.precisions.costs import costs_of
from bidensify.precisions.findings import Row, Unit, units_of
from bidensify.precisions.measure import Bar, Batches, Store, distance_of, measure
from bidensify.precisions.precision import BINARY, FLOAT, PRECISIONS, Precision, branches_of, precision_called, students
from bidensify.precisions.replay import Replay
from bidensify.precisions.result import Sensitivity
from bidensify.rewrite.plan.schema import Plan
from bidensify.tasks import Task, build_task

__all__ = ["sensitivity"]

Sample = dict[str, Tensor]
_CALIBRATION = 4


def sensitivity(
    student: nn.Module,
    data: Dataset[Sample],
    teacher: nn.Module | None = None,
    *,
    task: Task | None = None,
    around: Literal["teacher", "student"] | None = None,
    trained: bool = False,
    precisions: Sequence[str] | None = None,
    groups: Sequence[str] | None = (),
    calibration: Iterable[Tensor] | None = None,
    batch_size: int = 8,
    channels_last: bool = False,
    milliseconds: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Sensitivity:
    """Measures what each layer, block and stage of a student gains in another precision, one at a time. Nothing is trained.

    Around the teacher (the forecast, for which the student need not be trained): the full-precision network with one unit alone
    in binary, calibrated, each channel with the mean and variance of the float one. What that loses is what the unit gains in
    float. Around the student: the student with one unit alone in float, its norms with statistics of their own. A trained
    student mostly loses by that, since all that follows has learned from the signs; how much shows how much it hears of them.

    What ran before a changed layer is not computed again (see ``bidensify.precisions.replay``).

    Args:
        student: a latent network; left as it was.
        data: samples with their labels, transforms applied, as for ``bidensify.finetune``'s ``val``.
        teacher: the full-precision network; without it only the task's metric is known, around the student.
        task: reads outputs and labels; by default segmentation where samples have a mask, depth where they have a depth map.
        around: "teacher" (the default where there is one) or "student".
        trained: the student is trained: what it has lost to the teacher then scales the forecast of an allocation.
        precisions: what to measure beside binary and float ("act_bits 2"), each of which takes as long again; by default
            nothing.
        groups: prefixes of module paths to measure as a whole; None for all blocks and stages.
        calibration: images (N, C, H, W) in batches, for thresholds and norms; by default the first batches of ``data``.
        batch_size: images per run.
        channels_last: gives the images in that memory format.
        milliseconds: a table of measured layers, for budgets in milliseconds.
        cache: a JSON file for the result. One that is there and is of the same networks, data and options is read instead of
            measuring, with the costs of today's ``milliseconds``; an analysis that was killed goes on from the batch that it had
            reached.
        quiet: show no progress.

    Returns:
        A table: ``print`` shows it, ``.save``, ``.plot`` and ``.to_markdown`` write it, ``bidensify.allocate`` takes it.

    Raises:
        ConfigError: the student is not latent, the teacher not float or of another network, an unknown precision or group, no
            task fits the samples.
        DataError: ``data`` is empty or has no length.
        FormatError: ``cache`` cannot be read, or the table of milliseconds.
    """
    student = unwrap(student, "the student")
    teacher = unwrap(teacher, "the teacher") if teacher is not None else None
    around = around or ("student" if teacher is None else "teacher")
    plan = _check(student, teacher, around, data)
    chosen = _chosen(precisions, around)
    task = task if task is not None else _task(data)
    network = student if teacher is None or around == "student" else teacher
    device = next(student.parameters()).device
    batches = Batches(data, batch_size, device, channels_last, student)
    given = list(calibration) if calibration is not None else batches.images(_CALIBRATION)
    images = [to_device({"image": image}, device, channels_last, student)["image"] for image in given]
    started = time.perf_counter()
    with ExitStack() as stack:
        for each in (student, teacher):
            if each is not None:
                stack.enter_context(evaluation_flags(each))
        replay = Replay(network, images[0][:1], [path for path, _ in binary_layers(student)])
        called = sorted(replay.first, key=replay.first.__getitem__)
        units = units_of(called, groups)
        options = [around, batch_size, channels_last, [unit.name for unit in units], [each.name for each in chosen]]
        key = _key((student, teacher) if trained or around == "student" else (teacher,), task, data, images, options)
        target = None if cache is None else Path(cache)
        made = {BINARY: student} if teacher is None else students(teacher, plan, PRECISIONS)
        size = tuple(data[0]["image"].shape)
        costs = costs_of(made, teacher, size, milliseconds)
        if target is not None and target.is_file() and (found := Sensitivity.load(target)).key == key:
            # What was measured does not depend on a table of milliseconds, which may be another one now.
            rows = tuple(row.model_copy(update={"costs": costs.of(row.layers)}) for row in found.rows)
            now = found.model_copy(update={"rest": costs.rest, "full": costs.full, "rows": rows})
            if now != found:
                now.save(target)
            return now
        changes = _changes(replay, made, units, chosen, images)
        bar = stack.enter_context(Bar((len(images) + len(batches)) * len(changes), quiet))
        for x in images:
            replay.begin(x)
            for change in changes:
                with change.counting():
                    replay.again(x, change.unit.layers, stop=True)
                bar.step()
        whole = {"teacher": teacher, "student": student if trained or around == "student" else None}
        store = Store(None if target is None else target.with_name(f"{target.name}.part"), key)
        measured = measure(replay, changes, whole, task, batches, store, bar)
    place = {path: number / max(len(called) - 1, 1) for number, path in enumerate(called)}
    result = Sensitivity(
        key=key,
        network=plan.model_class,
        fingerprint=fingerprint(student),
        config=plan.config.to_dict(),
        around=around,
        metric=task.primary,
        higher_is_better=task.higher_is_better,
        distance=distance_of(task)[0] if teacher is not None else None,
        samples=len(data),  # type: ignore[arg-type]
        input_size=size,
        teacher=measured.get("teacher"),
        student=measured.get("student"),
        rest=costs.rest,
        full=costs.full,
        rows=tuple(
            Row(
                name=unit.name,
                layers=unit.layers,
                depth=place[unit.layers[0]],
                macs=sum(costs.macs[path] for path in unit.layers),
                costs=costs.of(unit.layers),
                measured={each.precision: measured[each.name] for each in changes if each.unit is unit},
            )
            for unit in units
        ),
        machine=cpu_name(),
        seconds=time.perf_counter() - started,
    )
    if target is not None:
        result.save(target)
        store.remove()
    return result


def _check(student: nn.Module, teacher: nn.Module | None, around: str, data: Any) -> Plan:
    """The student's plan."""
    plan = getattr(student, "bidensify_plan", None)
    if state_of(student) != "latent" or not isinstance(plan, Plan):
        raise ConfigError(
            f"sensitivity: the student is {state_of(student)}; give a latent network that bidensify.bidensify or a run made"
        )
    if around not in ("teacher", "student"):
        raise ConfigError(f"sensitivity: around={around!r} must be 'teacher' or 'student'")
    if teacher is None and around == "teacher":
        raise ConfigError("sensitivity: around='teacher' measures in the full-precision network; give teacher=")
    if teacher is not None and state_of(teacher) != "float":
        raise ConfigError(f"sensitivity: the teacher is {state_of(teacher)}; give the full-precision network")
    if not hasattr(data, "__len__") or len(data) == 0:
        raise DataError(f"sensitivity: data is a {type(data).__name__} without samples; give a data set with a length")
    return plan


def _chosen(names: Sequence[str] | None, around: str) -> list[Precision]:
    """The precisions to measure: all but that of the network around."""
    home = FLOAT if around == "teacher" else BINARY
    if around == "student" and names is not None and set(names) - {BINARY, FLOAT}:
        raise ConfigError(
            f"sensitivity: precisions={list(names)!r}; around the student a layer computes in float, no other way"
        )
    wanted = [FLOAT] if around == "student" else [BINARY, *(names or ())]
    return [precision_called(name) for name in dict.fromkeys(wanted) if name != home]


def _changes(
    replay: Replay,
    made: Mapping[str, nn.Module],
    units: Sequence[Unit],
    chosen: Sequence[Precision],
    images: Sequence[Tensor],
) -> list[Change]:
    """Every unit in every precision that its layers have, calibrated but for their moments."""
    network = replay.model
    if state_of(network) == "latent":
        return [InStudent(unit, precision.name, network) for precision in chosen for unit in units]
    wanted = [precision.name for precision in chosen]
    branches = {
        name: {path: branch for path, branch in some.items() if path in replay.first}
        for name, some in branches_of({name: each for name, each in made.items() if name in wanted}).items()
    }
    with torch.no_grad(), observe(network, branches) as targets:
        for x in images:
            network(x)
    return [
        InTeacher(unit, name, network, some, targets)
        for name, some in branches.items()
        for unit in units
        if all(path in some for path in unit.layers)
    ]


def _task(data: Any) -> Task:
    sample, info = data[0], getattr(data, "info", None)
    name = next((task for key, task in (("mask", "segmentation"), ("depth", "depth")) if key in sample), None)
    if name is None or info is None:
        raise ConfigError(
            f"sensitivity: samples of {sorted(sample)} do not say which task they are of (a mask or a depth map, and the "
            "data set's info, would); give task=, for example bidensify.tasks.SegmentationTask(classes)"
        )
    return build_task(name, info)


def _key(
    networks: Sequence[nn.Module | None], task: Task, data: Any, images: Sequence[Tensor], options: list[Any]
) -> str:
    """What tells one analysis from another: networks, the task and its options, every sample, and what was asked for."""
    digest = hashlib.sha256(json.dumps([len(data), options]).encode())
    for network in networks:
        digest.update(weights_fingerprint(network).encode() if network is not None else b"none")
    calibration = ({"image": image} for image in images)
    samples = (data[index] for index in range(len(data)))
    for part in chain([{"": type(task).__qualname__, **vars(task)}], calibration, samples):
        for name, value in sorted(part.items()):
            digest.update(f"{name}\0".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    held = value.detach().as_subclass(Tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(value.shape)} {value.dtype}\0".encode() + held.tobytes()
