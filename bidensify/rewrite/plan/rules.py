"""The user's rules: which layers each matches, and what to say of one that matches none."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from bidensify._util.names import near
from bidensify.config import Rule
from bidensify.errors import ConfigError
from bidensify.rewrite.plan.entries import LayerPlan

__all__ = ["matches_layer", "rule_labels", "without_match"]


def matches_layer(rule: Rule, layer: LayerPlan, module: nn.Module) -> bool:
    """Whether a rule's pattern and all its predicates fit a layer.

    Raises:
        ConfigError: the pattern is not a regular expression.
    """
    pattern = rule.match
    if pattern.startswith("re:"):
        try:
            fits = re.fullmatch(pattern[3:], layer.path) is not None
        except re.error as error:
            raise ConfigError(f"rule {pattern!r}: not a regular expression ({error})") from error
    elif pattern.startswith("class:"):
        fits = any(cls.__name__ == pattern[6:] for cls in type(module).__mro__)
    else:
        fits = fnmatch.fnmatchcase(layer.path, pattern)
    if not fits:
        return False
    sizes = {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": max(layer.kernel_size),
        "stride": max(layer.stride),
        "groups": layer.groups,
        "height": layer.output[0] if layer.output else 0,
        "width": layer.output[-1] if layer.output else 0,
    }
    return all(
        (low is None or sizes[key] >= low) and (high is None or sizes[key] <= high)
        for key, (low, high) in rule.where.items()
    )


def _where(rule: Rule) -> str:
    return ", ".join(
        f"{key} {'' if low is None else low}..{'' if high is None else high}" for key, (low, high) in rule.where.items()
    )


def rule_labels(rules: Sequence[Rule]) -> list[str]:
    """A name for each rule: its pattern, with its predicates where two rules have one pattern."""
    labels: list[str] = []
    for rule in rules:
        label = rule.match
        if label in labels:
            label = f"{rule.match} where {_where(rule)}" if rule.where else rule.match
        while label in labels:
            label += " again"
        labels.append(label)
    return labels


def without_match(rule: Rule, layers: Sequence[LayerPlan], modules: Mapping[str, nn.Module]) -> str:
    """The message for a rule that matches no layer: near names, or that its predicates exclude what its pattern fits."""
    bare = [layer for layer in layers if matches_layer(replace(rule, where={}), layer, modules[layer.path])]
    if bare:
        return (
            f"rule {rule.match!r} fits {len(bare)} layers by name, but none with {_where(rule)}; the first is "
            f"{bare[0].path} ({bare[0].shape}, output {'×'.join(map(str, bare[0].output)) or 'never run'})"
        )
    if rule.match.startswith("class:"):
        known = dict.fromkeys(cls.__name__ for module in modules.values() for cls in type(module).__mro__[:-2])
    else:
        known = dict.fromkeys(modules)
    name = rule.match.removeprefix("re:").removeprefix("class:")
    return f"rule {rule.match!r} matches no convolution or linear layer of the network{near(name, known)}"
