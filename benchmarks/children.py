"""A measurement in a process of its own: nothing that ran before it counts into its time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

__all__ = ["in_child"]


def in_child(script: str, source: str) -> dict[str, Any]:
    """Runs ``script --child SOURCE`` and reads the JSON object in the last line that it prints.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on standard error.
    """
    command = [sys.executable, script, "--child", source]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
