"""Trace the code of one block alone (``torch.fx``); its children stay calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from bidensify.rewrite.blocks.arguments import Arguments, NotTraceable
from bidensify.rewrite.blocks.surroundings import attributes_read
from bidensify.rewrite.record.restore import restored

__all__ = ["trace_once"]


def _modes() -> tuple[Any, ...]:
    autocast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


class _BlockTracer(fx.Tracer):
    """Children are leaves. Code under another gradient or autocast mode is refused: a graph does not hold the mode."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(autowrap_functions=())
        self.arguments = arguments
        self.modes = _modes()

    def create_args_for_root(self, root_fn: Callable[..., Any], *unused: Any) -> tuple[Callable[[], Any], list[Any]]:
        """The block's forward with a proxy for each argument that varies, and the others as they were recorded."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.arguments.placeholders()]
        args, kwargs = self.arguments.call(root_fn, proxies)
        return lambda: root_fn(self.root, *args, **kwargs), []

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise NotTraceable("it changes the gradient or autocast mode on its way")
        return super().create_node(*args, **kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A module that the code makes as it runs (a slice of a ``Sequential``) is no child: its steps are the block's own."""
        try:
            self.path_of_module(m)
        except NameError:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace_once(block: nn.Module, training: bool, arguments: Arguments) -> tuple[fx.Graph, dict[tuple[str, ...], Any]]:
    """The graph of the block's code in the given mode, and the attributes that the code read; the block is left as it was.

    Raises:
        NotTraceable: the code makes constant tensors or sets attributes, which a graph does not hold.
    """
    flag = block.training
    # Before the snapshot, so that the mode does not count as a change of the block's own.
    block.training = training
    try:
        with restored(block) as changed:
            tracer = _BlockTracer(arguments)
            with attributes_read(block) as read:
                graph = tracer.trace(block)
            names = changed()
    finally:
        block.training = flag
    if names:
        raise NotTraceable(f"its forward makes constant tensors or sets attributes ({', '.join(names)})")
    return graph, read
