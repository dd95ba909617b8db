"""Which layer costs how much accuracy, and who gets which precision for a budget."""

from __future__ import annotations

from bidensify.precisions.allocate import Allocation, allocate, allocation
from bidensify.precisions.budget import Budget, read_budget
from bidensify.precisions.findings import Cost, Findings, Measured, Row
from bidensify.precisions.precision import PRECISIONS
from bidensify.precisions.result import Sensitivity
from bidensify.precisions.run import sensitivity

__all__ = [
    "PRECISIONS",
    "Allocation",
    "Budget",
    "Cost",
    "Findings",
    "Measured",
    "Row",
    "Sensitivity",
    "allocate",
    "allocation",
    "read_budget",
    "sensitivity",
]
