"""Parameters and constants of a captured program."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

__all__ = ["behind_views", "constant", "drop_unread", "known", "per_channel"]

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten.to.dtype)


def known(program: torch.export.ExportedProgram, node: Any) -> Tensor | None:
    """The values of a parameter, a buffer or a constant; None: it is none."""
    from executorch.backends.transforms.utils import get_param_tensor, is_param_node

    return cast(Tensor, get_param_tensor(program, node)) if is_param_node(program, node) else None


def behind_views(program: torch.export.ExportedProgram, node: Any) -> Tensor | None:
    """The values of the parameter or constant that a node is a view of, in its own shape; None: it is of none."""
    while node.target in _VIEWS:
        node = node.args[0]
    return known(program, node)


def per_channel(program: torch.export.ExportedProgram, node: Any) -> Tensor | None:
    """The values (C,) of a view (C, 1, 1) or (1, C, 1, 1) of a parameter, to which an image is added; None: it is none."""
    value = node.meta["val"]
    if value.dim() not in (3, 4) or value.shape[-3:] != (value.numel(), 1, 1):
        return None
    values = behind_views(program, node)
    return values.reshape(-1) if values is not None and values.dtype == value.dtype else None


def constant(program: torch.export.ExportedProgram, name: str, values: Tensor) -> fx.Node:
    """A new constant."""
    from executorch.backends.transforms.utils import create_constant_placeholder

    graph, data = program.graph, values.detach().contiguous()
    with graph.inserting_before(next(iter(graph.nodes))):
        made = create_constant_placeholder(program, graph, f"{name}_constant", InputKind.CONSTANT_TENSOR, data)
    return cast(fx.Node, made)


def drop_unread(program: torch.export.ExportedProgram) -> None:
    """Takes out what nothing reads any more, which would be in the file."""
    from executorch.backends.transforms.utils import delete_constant_placeholder, is_param_node

    for node in list(program.graph.nodes):
        if node.op == "placeholder" and not node.users and is_param_node(program, node):
            delete_constant_placeholder(program, node)
