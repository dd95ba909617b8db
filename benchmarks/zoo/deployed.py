"""Whether a network runs from bits without PyTorch: exported to a .pte, run again, compared. Needs ExecuTorch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bidensify as bd
from zoo.subject import PASS, Subject, require

__all__ = ["DEPLOYED"]


def check_pte(subject: Subject) -> dict[str, Any]:
    """The packed network's .pte gives what the packed network gives, on the median of five inputs to 1e-3 of its mean size.

    On single inputs rounding in the float rest turns a sign, and of a network of random weights one sign may turn everything
    behind it: the largest difference is a figure, not a check.
    """
    student = copy.deepcopy(subject.student).eval()
    bd.calibrate(student, [subject.example])
    with tempfile.TemporaryDirectory() as folder:
        done = bd.export(bd.pack(student), Path(folder) / "net.pte", example_inputs=subject.example)
    require(done.difference is not None, f"not run again: {done.reason}")
    return {"status": PASS, "difference": done.difference, "largest": done.largest, "bytes": done.bytes}


DEPLOYED: dict[str, Callable[[Subject], Any]] = {"pte": check_pte}
