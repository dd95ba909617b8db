"""The command line: ``bidensify plan|convert|finetune|evaluate|predict|compare|pack|bench|export|demo``."""

from __future__ import annotations

from bidensify.cli.app import main

__all__ = ["main"]
