"""Every block of code in docs/transformers.md runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bidensify.deploy import packed_layers

pytest.importorskip("transformers")
TEXT = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, namespace)
    assert {layer.path for layer in namespace["student"].bidensify_plan.kept} >= {"decode_head.linear_fuse"}
    assert packed_layers(namespace["packed"])
    assert namespace["masks"]
