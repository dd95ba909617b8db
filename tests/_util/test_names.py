from __future__ import annotations

import pytest

from bidensify._util.names import near


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("metod", ["method", "rules"], "; did you mean 'method'?"),
        ("UNet", ["Unet", "FPN"], "; did you mean 'Unet'?"),
        ("zzz", ["b", "a"], "; known: b, a"),
        (3, ["a"], "; known: a"),
        ("a", [], "; there are none"),
        ("zzz", [f"n{i}" for i in range(30)], "n19, ... (30 in all)"),
    ],
)
def test_near(name: object, known: list[str], expected: str) -> None:
    assert near(name, iter(known)).endswith(expected)
