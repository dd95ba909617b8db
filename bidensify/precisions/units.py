"""What is looked at: every binary layer by itself, and blocks and stages by the prefixes of their paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bidensify._util.names import near
from bidensify.errors import ConfigError

__all__ = ["Unit", "units_of"]


@dataclass(frozen=True)
class Unit:
    """A layer, or several of one block.

    Attributes:
        name: the layer's path, or the prefix that the layers have in common.
        layers: the layers' paths, in the order in which they are called.
    """

    name: str
    layers: tuple[str, ...]

    @property
    def group(self) -> bool:
        """Whether it is a block or a stage."""
        return self.layers != (self.name,)


def units_of(paths: Sequence[str], groups: Sequence[str] | None = None) -> list[Unit]:
    """Every layer, then every group, each in the order of first call.

    Args:
        paths: of the binary layers, in the order in which they are called.
        groups: prefixes of module paths ("encoder.layer1"); None for every one that holds at least two layers, but not
            all of them; of prefixes that hold the same layers, the shortest.

    Raises:
        ConfigError: a prefix that holds no binary layer.
    """
    layers = [Unit(path, (path,)) for path in paths]
    found: dict[tuple[str, ...], str] = {}
    if groups is None:
        prefixes = {".".join(path.split(".")[:n]) for path in paths for n in range(1, path.count(".") + 1)}
        for prefix in sorted(prefixes, key=lambda text: (text.count("."), text)):
            inside = _inside(prefix, paths)
            if 1 < len(inside) < len(paths):
                found.setdefault(inside, prefix)
    else:
        known = {".".join(path.split(".")[:n]) for path in paths for n in range(1, path.count(".") + 2)}
        for prefix in groups:
            if prefix not in known:
                raise ConfigError(f"the group {prefix!r} holds no binary layer{near(prefix, sorted(known))}")
            if prefix not in paths:
                found.setdefault(_inside(prefix, paths), prefix)
    order = {path: number for number, path in enumerate(paths)}
    named = [Unit(prefix, inside) for inside, prefix in found.items()]
    return layers + sorted(named, key=lambda unit: (order[unit.layers[0]], -len(unit.layers)))


def _inside(prefix: str, paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path in paths if path.startswith(f"{prefix}."))
