"""Fully sharded training (FSDP2): each process holds a share of weights, gradients and optimizer state while it trains.

Sharded is a copy of the network. The run's own network keeps whole weights, on every process, for what processes do at
different times or not all of them: evaluation of their own samples, calibration, checkpoints. :meth:`Sharded.gather` brings
them up to date. torch's ``fully_shard`` is called here, since accelerate offers it to processes with an accelerator alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.nn.used_weight import copy_model
from bidensify.train.distributed import sum_over_processes

__all__ = ["Sharded", "whole"]

# Parts with more parameters than this are gathered by themselves, so that not all of a network is whole at one time.
_PART = 2_000_000


def whole(value: Any) -> Any:
    """Returns a tensor with the shares of all processes (a collective call), anything else as it is."""
    full = getattr(value, "full_tensor", None)
    return full() if callable(full) else value


class Sharded:
    """A sharded copy of a network.

    Args:
        network: whole weights; not changed until :meth:`gather`.
        device: of this process.

    Attributes:
        model: the copy, to be called and trained.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.network, self.model = network, copy_model(network)
        self.processes = torch.distributed.get_world_size()
        mesh = init_device_mesh(device.type, (self.processes,))
        # A scalar has no share; its gradient is averaged here.
        self.scalars = [p for p in self.model.parameters() if p.ndim == 0]
        options: Any = {"mesh": mesh, "ignored_params": set(self.scalars)}
        for module in reversed([m for m in self.model.modules() if m is not self.model]):
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and _unshared(module) > _PART:
                fully_shard(module, **options)
        fully_shard(self.model, **options)
        self.root: Any = self.model

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Gradients are not exchanged within: other micro-batches of the step follow."""
        self.root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.root.set_requires_gradient_sync(True)

    def average_scalars(self) -> None:
        """Averages the gradients of scalars over the processes, as the others are."""
        found = [p for p in self.scalars if p.grad is not None]
        if found:
            grads = torch.stack([p.grad for p in found if p.grad is not None])
            for parameter, grad in zip(found, sum_over_processes(grads) / self.processes, strict=True):
                parameter.grad = grad.clone()

    @torch.no_grad()
    def gather(self) -> None:
        """Copies the weights and statistics into the whole network (a collective call)."""
        own = self.network.state_dict()
        for name, value in self.model.state_dict().items():
            own[name].copy_(whole(value))

    def gathered_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Returns the optimizer's state as one process would have it (a collective call)."""
        state = optimizer.state_dict()
        return {
            **state,
            "state": {
                key: {name: whole(value) for name, value in item.items()} for key, item in state["state"].items()
            },
        }

    def shared_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """The reverse of :meth:`gathered_state`: this process's share of a whole state."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {
            key: {name: _like(value, parameters[int(key)]) for name, value in item.items()}
            for key, item in state["state"].items()
        }
        return {**state, "state": moments}


def _unshared(module: nn.Module) -> int:
    """Parameters that no part of the module gathers by itself yet."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        return 0
    own = sum(p.numel() for p in module.parameters(recurse=False))
    return own + sum(_unshared(child) for child in module.children())


def _like(value: Any, parameter: Tensor) -> Any:
    """Shares ``value`` out as ``parameter`` is; what is not of its shape (a count of steps) stays whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    placed = value.to(parameter.to_local().device)
    return distribute_tensor(placed, parameter.device_mesh, parameter.placements)
