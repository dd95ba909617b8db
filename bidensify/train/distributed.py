"""Several processes compute what one would: global batch statistics, global means, the same samples in order."""

from __future__ import annotations

import atexit
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import Sampler

from bidensify.errors import ConfigError
from bidensify.recipe import Recipe


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Returns the Accelerator of a run: device, processes and precision.

    Raises:
        ConfigError: the global batch cannot be split evenly over processes and micro-batches.
    """
    # accelerate keeps the precision of a process's first Accelerator; a second run may want another one.
    joined = dist.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not joined)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        # Without this, processes on a machine that has no GPU would not know of one another.
        cpu=recipe.device == "cpu" or not torch.accelerator.is_available(),
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        kwargs_handlers=[ddp],
    )
    if not joined and dist.is_initialized():
        # The group outlives a run, for the next one (the student's behind its teacher's), but not the interpreter: threads that
        # it still has then can abort a process whose work is done.
        atexit.register(_leave_group)
    if accelerator.num_processes == 1 and "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        warnings.warn(
            "accelerate launch --cpu starts one process, whatever --num_processes says (it leaves more to mpirun); for "
            "several on the CPU use `accelerate launch --multi_gpu --num_processes N` with device: cpu in the recipe",
            stacklevel=2,
        )
    share = accelerator.num_processes * recipe.data.accumulate
    if recipe.data.batch_size % share:
        raise ConfigError(
            f"data.batch_size {recipe.data.batch_size} cannot be split over {accelerator.num_processes} processes x "
            f"{recipe.data.accumulate} accumulated micro-batches; use a multiple of {share}"
        )
    return accelerator


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads give back the tensors of their last exchange when they come to it, and one that does so while the
        # interpreter ends aborts the process. Leaving a group joins its threads only where nothing holds it: torch's caches
        # of sharded tensors do.
        time.sleep(0.5)


def sum_over_processes(values: Tensor) -> Tensor:
    """Returns the sum of a small tensor over all processes (the tensor itself in a single process)."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_objects(own: Any) -> list[Any]:
    """Returns each process's object, by rank, on every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


class GlobalBatches(Sampler[list[int]]):
    """Batches of sample indices: the order depends on (seed, epoch) alone, each process takes its part of a batch.

    The last, incomplete batch is left out, as in every epoch other samples fall into it.

    Args:
        length: number of samples.
        batch_size: of the global batch; a multiple of ``processes`` x ``parts``.
        seed, epoch: of the order.
        skip: batches to leave out at the start.
        rank, processes: which part, of how many.
        parts: micro-batches in a batch; each is split over the processes, so that the samples whose batch statistics
            are taken together do not depend on the number of processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        skip: int = 0,
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        self.order = torch.randperm(length, generator=generator).tolist()
        self.batch_size, self.skip = batch_size, skip
        part, share = batch_size // parts, batch_size // parts // processes
        self._own = [p * part + rank * share + i for p in range(parts) for i in range(share)]

    def __len__(self) -> int:
        return len(self.order) // self.batch_size - self.skip

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.skip, len(self.order) // self.batch_size):
            yield [self.order[batch * self.batch_size + i] for i in self._own]


class _SyncBatchNorm(torch.autograd.Function):
    """Batch normalisation over the samples of all processes.

    Forward: y = (x - m) / sqrt(v + eps) with m, v over all processes. Backward (Ioffe and Szegedy, arXiv 1502.03167,
    section 3, with the two means over all processes): dx = (dy - mean(dy) - xhat mean(dy xhat)) / sqrt(v + eps).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = x.double() if x.dtype == torch.float64 else x.float()
        count = x.numel() / x.shape[1]
        mean = wide.mean(dims)
        # Each process's mean and variance are merged (Chan et al. 1983): E[x^2] - E[x]^2 would cancel.
        var = wide.var(dims, unbiased=False)
        total = sum_over_processes(torch.tensor([count], dtype=torch.float64, device=x.device))[0]
        merged = sum_over_processes(mean.double() * count) / total
        within = (var.double() + (mean.double() - merged) ** 2) * count
        merged_var = sum_over_processes(within) / total
        inverse = (merged_var + eps).rsqrt().to(wide.dtype)
        xhat = (wide - merged.to(wide.dtype).view(shape)) * inverse.view(shape)
        ctx.save_for_backward(xhat, inverse)
        ctx.total, ctx.dims, ctx.shape, ctx.dtype = float(total), dims, shape, x.dtype
        ctx.mark_non_differentiable(merged, merged_var, total)
        return xhat.to(x.dtype), merged, merged_var, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, None]:
        xhat, inverse = ctx.saved_tensors
        wide = grad.to(xhat.dtype)
        sums = torch.stack([wide.sum(ctx.dims), (wide * xhat).sum(ctx.dims)]).double()
        means = (sum_over_processes(sums) / ctx.total).to(xhat.dtype)
        mean_dy, mean_dy_xhat = means[0].view(ctx.shape), means[1].view(ctx.shape)
        return ((wide - mean_dy - xhat * mean_dy_xhat) * inverse.view(ctx.shape)).to(ctx.dtype), None


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm` over the samples of all processes; x is (N, C, *)."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    y, mean, var, count = _SyncBatchNorm.apply(x, eps)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    shape = [1, -1] + [1] * (x.ndim - 2)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    result: Tensor = y.to(x.dtype)
    return result


class SyncedNorms(TorchFunctionMode):
    """Within this mode every training-mode ``F.batch_norm`` takes its statistics over all processes.

    It reaches each norm whatever its class (BatchNorm2d, timm's fused norms, the norms of binary layers) without
    exchanging modules, and works with gloo on the CPU, where torch's SyncBatchNorm does not.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.batch_norm:
            return sync_batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def forward_context(accelerator: Accelerator, sync_norms: bool = True) -> Iterator[None]:
    """Autocast of the run's precision and, with several processes, synchronised norms."""
    with accelerator.autocast():
        if accelerator.num_processes > 1 and sync_norms:
            with SyncedNorms():
                yield
        else:
            yield
