"""Lets the tests of this folder and those below it share their networks."""

from __future__ import annotations

import sys
from pathlib import Path

# Not the folder itself: ``openvino`` and ``executorch`` lie in it, and would be found where the packages are not installed.
SHARED = str(Path(__file__).parent / "shared")
if SHARED not in sys.path:
    sys.path.insert(0, SHARED)
