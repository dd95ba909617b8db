"""Configuration: JSON round trip, and errors that quote what was given."""

from __future__ import annotations

import json

import pytest
from torch import nn

import bidensify as bd
from bidensify.errors import ConfigError


def test_json_round_trip() -> None:
    config = bd.BidensifyConfig(
        method="bnn",
        act_scale="none",
        residual="keep",
        rules=(
            bd.Rule("encoder.*", "keep"),
            bd.Rule(nn.Conv2d, {"act_scale": "per_channel", "bypass": False}, where={"kernel_size": (None, 3)}),
            bd.Rule("wide.*", {"act_bits": 2}),
        ),
    )
    assert bd.BidensifyConfig.from_json(config.to_json()) == config
    assert bd.BidensifyConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert json.loads(config.to_json())["rules"][1]["match"] == "class:Conv2d"


def test_stored_options_that_are_gone_may_hold_what_is_left_of_them() -> None:
    stored = bd.BidensifyConfig(method="bnn").to_dict() | {"fusion_grouping": "interleaved", "weights": "pretrained"}
    assert bd.BidensifyConfig.from_dict(stored) == bd.BidensifyConfig(method="bnn")


def test_version_1_names_the_layers_that_it_meant() -> None:
    rules = [
        {"match": "a", "action": "bidense"}, {"match": "b", "action": {"method": "bidense-cfb", "bypass": False}},
        {"match": "c", "action": {"act_bits": 2}}, {"match": "d", "action": "react"}, {"match": "e", "action": "keep"},
    ]  # fmt: skip
    stored = bd.BidensifyConfig(rules=tuple(rules)).to_dict()  # type: ignore[arg-type]
    assert stored["version"] == 2
    found = bd.BidensifyConfig.from_dict(stored | {"version": 1})
    assert found.method == "bidense-in-paper"
    actions = [
        "bidense-in-paper",
        {"method": "bidense-cfb-in-paper", "bypass": False},
        {"act_bits": 2},
        "react",
        "keep",
    ]
    assert [rule.action for rule in found.rules] == actions
    assert bd.BidensifyConfig.from_dict(found.to_dict()) == found
    # What is left out or no name is judged as ever.
    assert bd.BidensifyConfig.from_dict({"version": 1, "rules": [{"match": "a"}]}).rules == (bd.Rule("a"),)
    with pytest.raises(ConfigError, match="must be a method's name"):
        bd.BidensifyConfig.from_dict({"version": 1, "rules": [{"match": "a", "action": {"method": []}}]})
    # A frame says itself where the bypass joins; that of BiDense was its paper's.
    framed = bd.BidensifyConfig(frame="teacher")
    assert bd.BidensifyConfig.from_dict(framed.to_dict() | {"version": 1}) == framed
    stored = bd.BidensifyConfig(method="react", frame="bidense").to_dict() | {"version": 1}
    assert bd.BidensifyConfig.from_dict(stored) == bd.BidensifyConfig(method="react", frame="bidense-paper")
    stored = bd.BidensifyConfig(method="react-in-bidense").to_dict() | {"version": 1}
    assert bd.BidensifyConfig.from_dict(stored).method == "react-in-bidense-paper"
    named = ({"match": "a", "action": "react-in-bidense"}, {"match": "b", "action": "bidense"})
    stored = bd.BidensifyConfig(frame="paper", rules=named).to_dict() | {"version": 1}  # type: ignore[arg-type]
    assert [rule.action for rule in bd.BidensifyConfig.from_dict(stored).rules] == ["react-in-bidense-paper", "bidense"]
    for version in (0, 3, True, "1"):
        with pytest.raises(ConfigError, match=f"version {version!r} is not known"):
            bd.BidensifyConfig.from_dict(stored | {"version": version})


def test_configurations_are_values() -> None:
    with pytest.raises(AttributeError):
        bd.BidensifyConfig().method = "bnn"  # type: ignore[misc]
    assert bd.BidensifyConfig() == bd.BidensifyConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_bits": 3}, r"act_bits=3 must be 1 or 2"),
        ({"act_bits": True}, r"act_bits=True must be 1 or 2"),
        ({"act_bits": "2"}, r"act_bits='2' must be 1 or 2"),
        ({"act_scale": "per_tenser"}, r"act_scale='per_tenser' is none of its values; did you mean 'per_tensor'"),
        ({"residual": True}, "residual=True is none of its values; known: auto, keep, double"),
        ({"keep_first": "yes"}, "keep_first='yes' must be true or false"),
        ({"rules": [{"match": "a", "acton": "keep"}]}, "unknown key 'acton'; did you mean 'action'"),
        ({"rules": [{"action": "keep"}]}, "has no 'match'"),
        ({"rules": "keep"}, "rules='keep' must be a list"),
        ({"rules": [3]}, "must hold Rule objects, got 3"),
        ({"metod": "bnn"}, "unknown key 'metod'; did you mean 'method'"),
        ({"version": 7}, "version 7 is not known"),
        (
            {"weights": "fresh"},
            "the option 'weights' is gone, and every rewrite is as with 'pretrained'; 'fresh' was given",
        ),
        ({"fusion_grouping": "contiguous"}, "'fusion_grouping' is gone"),
        ({"method": None}, "method=None must be a method's name"),
        ({"rules": None}, "rules=None must be a list"),
        ({"rules": bd.Rule("a")}, "must be a list of rules"),
    ],
)
def test_mistakes(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bd.BidensifyConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "match=''"),
        (("a", 3), "action=3"),
        (("a", {"act_bits": 4}), r"Rule\('a'\): act_bits=4 must be 1 or 2"),
        (("a", {"act_scal": "none"}), "unknown override 'act_scal'; did you mean 'act_scale'"),
        (("a", {"activation": "gelu"}), "activation='gelu' must be one of rprelu, keep"),
        (("a", "keep", {"kernel": (1, 1)}), "unknown predicate 'kernel'; did you mean 'kernel_size'"),
        (("a", "keep", {"stride": 2}), r"where\['stride'\]=2 must be \[low, high\]"),
        (("a", "keep", {"stride": ("1", 2)}), r"'1' must be an integer, or None"),
        (("a", "keep", {"stride": (2, 1)}), r"\(2, 1\) holds nothing: low is above high"),
        (("a", "keep", None), "where=None must be a mapping"),
        (("a", {"bypass": "no"}), "bypass='no' must be true or false"),
        (("a", {"method": 3}), "method=3 must be a method's name"),
    ],
)
def test_rule_mistakes(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bd.Rule(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "message"), [("[]", "got list"), ("{", "'{' is not JSON")])
def test_json_that_holds_no_object(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bd.BidensifyConfig.from_json(text)


def test_a_dict_that_is_none() -> None:
    with pytest.raises(ConfigError, match="None must be a mapping"):
        bd.BidensifyConfig.from_dict(None)  # type: ignore[arg-type]
