from __future__ import annotations

import pytest

from bidensify._util.yamltext import parse_yaml


def test_plain_data() -> None:
    text = "a: &a {x: 1e-3, y: [1, 2]}\nb: {<<: *a, y: 3}\nc: *a\n"
    assert parse_yaml(text) == (
        {"a": {"x": 1e-3, "y": [1, 2]}, "b": {"x": 1e-3, "y": 3}, "c": {"x": 1e-3, "y": [1, 2]}},
        [],
    )
    assert parse_yaml("") == (None, [])
    assert parse_yaml("a: 1\nb: 2\na: 3\n")[1] == ["line 3: the key 'a' was given in line 1 already; keep one"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "line 1"),
        ("a: !!python/name:os.system ''", "could not determine a constructor"),
        ("&a [*a]", "an alias that contains itself"),
        ("&a {k: *a}", "an alias that contains itself"),
        ("[" * 10_000, "nested too deeply"),
        ("x" * (1 << 20 | 1), "more than 1048576 characters"),
        ("a: &a [" + "x, " * 1000 + "]\nb: [" + "*a, " * 200 + "]", "more than 100000 values"),
        ("a: " + "9" * 10_000, "limit|digits"),
        ("--- 1\n--- 2", "expected a single document"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)
