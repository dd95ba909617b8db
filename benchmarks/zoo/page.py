"""``docs/models.md`` from the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bidensify._files import atomic_write

__all__ = ["failures", "write_page"]

ABSENT = "not in the original"


def failures(row: dict[str, Any]) -> list[str]:
    return [f"{k}: {v['status']}" for k, v in row.get("checks", {}).items() if v["status"] not in ("pass", ABSENT)] + (
        [f"convert: {row['convert']}"] if row.get("convert", "pass") != "pass" else []
    )


def write_page(page: Path, rows: dict[str, dict[str, Any]], order: list[str]) -> None:
    with atomic_write(page) as temporary:
        temporary.write_text("")
