"""Which layer costs how much accuracy, and who gets which precision for a budget."""

from __future__ import annotations

from bidensify.precisions.findings import Cost, Measured, Row
from bidensify.precisions.result import Sensitivity
from bidensify.precisions.run import sensitivity

__all__ = ["Cost", "Measured", "Row", "Sensitivity", "sensitivity"]
