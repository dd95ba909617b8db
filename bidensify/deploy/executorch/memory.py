"""How much memory a .pte's process takes: where XNNPACK keeps its convolutions' pointers, and how tensors share the arena."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

__all__ = ["pointers_in_workspace", "tight"]

# XNN_FLAG_TRANSIENT_INDIRECTION_BUFFER of xnnpack.h.
_TRANSIENT = 0x20


@contextlib.contextmanager
def pointers_in_workspace() -> Iterator[None]:
    """While a program is lowered: its convolutions make their pointers as they run.

    XNNPACK keeps a pointer for each pixel of an output and each place of the kernel, of a 7x7 stem at 512x512 24.5 MiB, and each
    convolution for itself. Made anew they lie in the workspace, which all delegates share.
    """
    preprocess: Any = importlib.import_module("executorch.backends.xnnpack.xnnpack_preprocess")
    schema: Any = importlib.import_module("executorch.backends.xnnpack.serialization.xnnpack_graph_schema")
    write = preprocess.serialize_xnnpack_binary

    def flagged(graph: Any, data: Any) -> Any:
        for node in graph.xnodes:
            if isinstance(node.xnode_union, schema.XNNConv2d):
                node.xnode_union.flags |= _TRANSIENT
        return write(graph, data)

    preprocess.serialize_xnnpack_binary = flagged
    try:
        yield
    finally:
        preprocess.serialize_xnnpack_binary = write


def tight(alignment: int, specs: Any, graph_module: Any, signature: Any, padding: int = 0) -> Any:
    """An algorithm of ExecuTorch's ``MemoryPlanningAlgorithmSuite``: the largest tensors first, each in the lowest gap of the
    arena that is free while it lives. ExecuTorch's own gives each gap the size of the first tensor that it was made for.
    """
    planning: Any = importlib.import_module("executorch.exir.memory_planning")
    # What lies inside of another tensor, or beside a branch's: its own rules.
    if getattr(graph_module, "input_mem_buffer_sizes", None) or any(spec.storage_base is not None for spec in specs):
        return planning.greedy(alignment, specs, graph_module, signature, padding)
    made, sizes = planning.MemoryAlgoResult({}, []), [0, 0]
    for spec in specs:
        spec.realign(alignment)
    placed: list[tuple[int, int, int, Any]] = []
    for i, spec in enumerate(sorted(specs, key=lambda one: (-one.allocated_memory, one.lifetime))):
        memory = 1 if spec.mem_id is None else spec.mem_id
        sizes += [0] * (memory + 1 - len(sizes))
        (first, last), at = spec.lifetime, 0
        for begin, end, where, other in sorted(placed, key=lambda one: one[:2]):
            if where != memory or other.lifetime[0] > last or other.lifetime[1] < first:
                continue
            if begin >= at + spec.allocated_memory:
                break
            at = max(at, end)
        placed.append((at, at + spec.allocated_memory, memory, spec))
        made.spec_dict[spec] = planning.SpecAllocResult(memory, i, at)
        sizes[memory] = max(sizes[memory], at + spec.allocated_memory)
    made.bufsizes = [size + padding if size else 0 for size in sizes]
    return made
