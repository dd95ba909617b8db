"""The command line; ``bidensify --help`` lists its commands."""

from __future__ import annotations

from bidensify.cli.app import main

__all__ = ["main"]
