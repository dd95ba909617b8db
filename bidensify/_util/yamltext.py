"""YAML as data: the safe loader, bounded, and strict where PyYAML is lenient."""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["LONGEST", "parse_yaml"]

LONGEST = 1 << 20
_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """A safe loader that also notes keys that appear twice (YAML forbids them, PyYAML lets the last one win)."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            # Only scalars can be equal keys here, and a merge key (<<) is no key of the mapping.
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                self.duplicates.append(f"line {line}: the key {key!r} was given in line {seen[key]} already; keep one")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


# Numbers such as 1e-3 are floats, as in YAML 1.2 and JSON; PyYAML's rule asks for a dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """Reads one YAML document of plain data.

    Returns:
        The data, and the keys that are given twice, each with its line.

    Raises:
        ValueError: it is no YAML, asks for objects, is longer than 1 MiB, nested too deeply, refers to itself, or grows
            beyond 100,000 values where its aliases are put in.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has more than {LONGEST} characters, the most that is read")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        if _size(node, {}) > _VALUES:
            raise ValueError(f"more than {_VALUES} values once its aliases are put in; write it out in full")
        return loader.construct_document(node), loader.duplicates
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, each alias counted as what it repeats; long texts count for more."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value) // 100
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    pairs = isinstance(node, yaml.MappingNode)
    children = [child for pair in node.value for child in pair] if pairs else node.value
    known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]
