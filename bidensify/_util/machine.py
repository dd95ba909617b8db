"""This machine: the name that figures are published with, and what torch.compile needs of it."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

__all__ = ["cpu_name", "has_compiler"]


def cpu_name() -> str:
    """The processor's name, as the operating system gives it, with its family and model where it says them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()[:30]
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {found['cpu family']}, model {found.get('model', '?')})" if "cpu family" in found else name


def has_compiler() -> bool:
    """Whether a C++ compiler that torch.compile finds is on the PATH."""
    return any(map(shutil.which, ("g++", "clang++", "c++")))
