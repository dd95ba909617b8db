"""Rules: what they match, what they change, how a mistake in one is told."""

from __future__ import annotations

from typing import Any

import pytest
from networks import Net
from torch import nn

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.nn import Bypass, RPReLU


def planned(*rules: bd.Rule) -> tuple[Any, dict[str, Any]]:
    plan = bd.plan(Net(), bd.BidensifyConfig(rules=rules))
    return plan, {layer.path: layer for layer in plan.layers}


@pytest.mark.parametrize(
    ("match", "kept"),
    [
        ("basic.?.conv1", {"basic.0.conv1", "basic.1.conv1"}),
        ("deep.0.*", {"deep.0.conv1", "deep.0.conv2", "deep.0.conv3", "deep.0.project.0"}),
        (r"re:basic\.\d\.conv2", {"basic.0.conv2", "basic.1.conv2"}),
        ("basic.[0]*", {"basic.0.conv1", "basic.0.conv2"}),
    ],
)
def test_globs_and_regular_expressions(match: str, kept: set[str]) -> None:
    plan, layers = planned(bd.Rule(match, "keep"))
    assert {path for path, layer in layers.items() if layer.reason.startswith("rule")} == kept
    assert plan.rule_matches == {match: len(kept)}


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        ({"kernel_size": (2, None)}, lambda m: max(m.kernel_size) >= 2),
        ({"in_channels": (12, None)}, lambda m: m.in_channels >= 12),
        ({"out_channels": (None, 4)}, lambda m: m.out_channels <= 4),
        ({"stride": (2, 2)}, lambda m: max(m.stride) == 2),
        ({"groups": (1, 1), "kernel_size": (3, 3)}, lambda m: m.groups == 1 and max(m.kernel_size) == 3),
    ],
)
def test_classes_with_predicates_on_shape(where: dict[str, Any], fits: Any) -> None:
    plan, layers = planned(bd.Rule(nn.Conv2d, "keep", where=where))
    wanted = {path for path, module in Net().named_modules() if isinstance(module, nn.Conv2d) and fits(module)}
    assert {path for path, layer in layers.items() if layer.reason == "rule 'class:Conv2d'"} == wanted
    assert plan.rule_matches == {"class:Conv2d": len(wanted)}


def test_predicates_on_the_outputs_size() -> None:
    _, layers = planned(bd.Rule("*", "keep", where={"height": (None, 32), "width": (None, 32)}))
    kept = {path for path, layer in layers.items() if layer.reason == "rule '*'"}
    assert "deep.1.conv2" in kept
    assert "basic.0.conv1" not in kept


def test_overrides_reach_the_layers() -> None:
    rules = (
        bd.Rule("basic.0.conv1", {"act_scale": "per_channel"}),
        bd.Rule("basic.0.conv2", {"bypass": False}),
        bd.Rule("basic.1.conv1", {"activation": "keep"}),
        bd.Rule("up1.conv", {"method": "bnn"}),
        bd.Rule("up2.conv", "bnn"),
        bd.Rule("head", "binarize"),
        bd.Rule("deep.1.conv2", {"act_bits": 2}),
    )
    student = bd.bidensify(Net(), bd.BidensifyConfig(rules=rules))
    assert student.basic[0].conv1.binarizer.act_scale == "per_channel"
    assert student.basic[0].conv2.bypass is None
    assert not isinstance(student.basic[1].conv1.activation, RPReLU)
    assert isinstance(student.basic[0].conv1.bypass, Bypass)
    assert student.up1.conv.method == student.up2.conv.method == "bnn"
    assert student.up1.conv.bypass is None
    assert student.head.method == "bidense"
    assert [path for path, layer in bd.nn.binary_layers(student) if layer.binarizer.planes == 2] == ["deep.1.conv2"]


def test_bits_that_a_method_does_not_have_are_an_error_that_names_the_layer_and_those_that_do() -> None:
    words = "deep.1.conv2: act_bits=2: the method 'xnor' has activations of 1 bit; 2 have .*bidense, .*bnn"
    with pytest.raises(ConfigError, match=words):
        bd.plan(Net(), bd.BidensifyConfig(rules=(bd.Rule("deep.1.conv2", {"method": "xnor", "act_bits": 2}),)))
    student = bd.bidensify(Net(), bd.BidensifyConfig(act_bits=2, rules=(bd.Rule("deep.*", {"act_bits": 1}),)))
    bits = {path: layer.binarizer.planes for path, layer in bd.nn.binary_layers(student)}
    assert {path for path, number in bits.items() if number == 1} == {path for path in bits if path.startswith("deep.")}
    replayed = bd.rewrite.Plan.from_dict(student.bidensify_plan.to_dict(compact=True))
    assert {layer.path: layer.act_bits for layer in replayed.binary} == bits


def test_counts_are_shown_and_rules_of_one_pattern_are_told_apart() -> None:
    rules = (
        bd.Rule("class:Conv2d", "keep", where={"stride": (2, None)}),
        bd.Rule("class:Conv2d", {"act_scale": "none"}, where={"kernel_size": (None, 1)}),
    )
    plan, _ = planned(*rules)
    assert plan.rule_matches == {"class:Conv2d": 3, "class:Conv2d where kernel_size ..1": 8}
    text = " ".join(str(plan).split())
    assert "rule 'class:Conv2d' matches 3 layers" in text
    assert "kernel_size ..1' matches 8 layers" in text


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (bd.Rule("basic.0.conv3"), r"'basic\.0\.conv3' matches no .*; did you mean .*basic\.0\.conv"),
        (bd.Rule("class:Conv2D"), r"'class:Conv2D' matches no .*; did you mean .*Conv2d"),
        (bd.Rule(r"re:basic\.9.*"), "did you mean 'basic.1"),
        (bd.Rule("re:(", "keep"), "not a regular expression"),
        (
            bd.Rule("basic.*", where={"stride": (2, None)}),
            r"fits 4 layers by name, but none with stride 2\.\.; the first is",
        ),
    ],
)
def test_a_rule_without_a_match_is_an_error_that_helps(rule: bd.Rule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(rule)


def test_one_of_two_rules_of_one_pattern_without_a_match_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"none with stride 5\.\."):
        planned(bd.Rule("class:Conv2d", "keep"), bd.Rule("class:Conv2d", "keep", where={"stride": (5, None)}))


def test_an_unknown_method_in_a_rule_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown method 'bidens'"):
        planned(bd.Rule("basic.*", "bidens"))


def test_a_configuration_with_every_kind_of_rule_survives_json() -> None:
    config = bd.BidensifyConfig(
        rules=(
            bd.Rule("a.*"),
            bd.Rule("re:b.*", "bnn"),
            bd.Rule(nn.Conv2d, {"act_scale": "none", "bypass": False}, where={"width": (None, 32)}),
        ),
        keep_last=False,
    )
    assert bd.BidensifyConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="version 99 is not known"):
        bd.BidensifyConfig.from_dict({**config.to_dict(), "version": 99})
