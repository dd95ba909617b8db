"""Metrics of a model on a data set, over one or several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bidensify.data.batches import collate_alike, to_device
from bidensify.tasks import Task, Views


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode for the time of the block; each module's own flag returns afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    dataset: Dataset[dict[str, Tensor]],
    *,
    batch_size: int = 8,
    workers: int = 0,
    device: torch.device | str | None = None,
    precision: Literal["fp32", "bf16", "fp64"] = "fp32",
    channels_last: bool = False,
    accelerator: Accelerator | None = None,
    views: Views | None = None,
    on_batch: Callable[[int, int], Any] | None = None,
    on_output: Callable[[Any, dict[str, Tensor]], Any] | None = None,
) -> dict[str, float]:
    """Measures ``model`` on every sample of ``dataset``.

    Args:
        model: latent, packed or full-precision; its train/eval flags are left as they were found.
        task: reads the outputs and gives the metrics.
        dataset: samples with transforms applied; they may be of several sizes.
        batch_size: samples per forward pass of a process, where they are of one size.
        workers: data-loading processes.
        device: where the images go; by default where the model's first parameter or buffer is.
        precision: "bf16" runs the model under autocast; else the model's own type is what counts.
        channels_last: gives the images in that memory format.
        accelerator: a run's own; each of its processes measures its share of the samples.
        views: how the model looks at an image; by default once, at the whole.
        on_batch: called with (samples done, samples in all) after each batch.
        on_output: called with the model's output and the batch, of which some samples may be of one size only.

    Returns:
        The task's metrics (over all processes) as plain floats, by name.
    """
    if device is None:
        tensors = [*model.parameters(), *model.buffers()]
        device = (
            accelerator.device if accelerator is not None else tensors[0].device if tensors else torch.device("cpu")
        )
    place = torch.device(device)
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    length = len(dataset)  # type: ignore[arg-type]
    own = list(range(rank, length, processes))
    loader = DataLoader(
        torch.utils.data.Subset(dataset, own),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate_alike,
        pin_memory=place.type == "cuda",
        generator=torch.Generator(),
    )
    metrics = task.metrics().to(place)
    look = views if views is not None else Views()
    look.check(task)
    done = 0
    with eval_mode(model):
        for batches in loader:
            for batch in batches:
                batch = to_device(batch, place, channels_last, model)
                with torch.autocast(place.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
                    output = look(model, task, batch["image"])
                metrics.update(output, batch)
                if on_output is not None:
                    on_output(output, batch)
                done += len(batch["image"])
                if on_batch is not None:
                    on_batch(done, len(own))
        return {name: float(value) for name, value in metrics.compute().items()}
