"""Lets the tests of this folder share their networks, and use the zoo's count of signals."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).resolve().parents[2] / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
