"""Changes of blocks' own code, each at one step of the block's proven trace."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from torch import fx

from bidensify.rewrite.blocks.edit import BlockEdit
from bidensify.rewrite.blocks.proof import Traced, editable_event, operation_of, trace_block, written
from bidensify.rewrite.plan.entries import BlockPlan, NewActivation
from bidensify.rewrite.record.recorded import Record, scope_of

__all__ = ["CodeChanges", "Site", "place_of"]


class Site(NamedTuple):
    """A step of a block's own code: the block's path, and the step's number in every call of the block."""

    path: str
    event: int


def place_of(node: fx.Node) -> Site | None:
    """Where in the code a node's step stands: a block that runs twice makes it at one place. None outside of all blocks."""
    scope = scope_of(node)
    return Site(scope[-1][0], int(node.meta["event"])) if scope and "event" in node.meta else None


class CodeChanges:
    """What changes in which block's code. A block is traced when it is first asked about."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._names = {id(module): path for path, module in record.modules.items()}
        self._traced: dict[str, Traced | str] = {}
        self._edits: dict[str, dict[int, BlockEdit]] = defaultdict(dict)
        self._new: dict[str, dict[str, NewActivation]] = defaultdict(dict)
        self._notes: dict[str, list[str]] = defaultdict(list)

    @property
    def any_traced(self) -> bool:
        """Whether any block was traced, which may have left proxies in caches."""
        return bool(self._traced)

    def __contains__(self, site: Site | None) -> bool:
        return site is not None and site.event in self._edits.get(site.path, {})

    def trace(self, path: str) -> Traced | str:
        """The proven trace of a block, or why it has none."""
        if path not in self._traced:
            inside = f"{path}." if path else ""
            names_set = {
                (owner[len(inside) :], name)
                for owner, name in self.record.attributes_set
                if owner == path or owner.startswith(inside)
            }
            block, calls = self.record.modules[path], self.record.calls[path]
            self._traced[path] = trace_block(block, calls, self._names, names_set)
        return self._traced[path]

    def site(self, node: fx.Node) -> Site | str | None:
        """Where a node's step can be changed in every call alike; else why its block's code stays, or None if nobody reads it."""
        place = place_of(node)
        if place is None:
            return None
        traced = self.trace(place.path)
        if isinstance(traced, str):
            return f"{place.path or 'the network'}: its code is left as it is, since {traced}"
        return place if editable_event(traced, place.event) else None

    def rereads(self, site: Site) -> bool:
        """Whether a changed step's result also reaches what reads the value that the step overwrites, all of it in this block."""
        traced = self.trace(site.path)
        node = traced.events[site.event] if isinstance(traced, Traced) else None
        return node is not None and written(node) is not None

    def hand_through(self, site: Site, argument: int, note: str) -> None:
        """The step gives its tensor argument number ``argument``."""
        self._change(site, "forward", note, argument=argument)

    def call_instead(self, site: Site, name: str, new: NewActivation, note: str) -> None:
        """The step becomes a call of the block's new child ``name``."""
        self._new[site.path][name] = new
        self._change(site, "module", note, module=name)

    def _change(self, site: Site, action: str, note: str, argument: int = 0, module: str = "") -> None:
        traced = self.trace(site.path)
        assert isinstance(traced, Traced)
        node = traced.events[site.event]
        assert node is not None
        self._edits[site.path][site.event] = BlockEdit(node.name, operation_of(node), action, argument, module)
        self._notes[site.path].append(note)

    def entries(self) -> list[BlockPlan]:
        """The blocks that change, as a plan holds them."""
        blocks = []
        for path, edits in self._edits.items():
            traced = self.trace(path)
            assert isinstance(traced, Traced)
            blocks.append(
                BlockPlan(
                    path,
                    tuple(edits[event] for event in sorted(edits)),
                    traced.arguments.varying,
                    traced.arguments.fixed,
                    traced.attributes,
                    dict(self._new.get(path, {})),
                    tuple(self._notes[path]),
                )
            )
        return blocks
