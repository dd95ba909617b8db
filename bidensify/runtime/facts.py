"""What ``bidensify.summary`` counts of a packed layer."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

__all__ = ["PackedFacts"]


@dataclass(frozen=True)
class PackedFacts:
    """What ``bidensify.summary`` counts of a packed layer.

    Attributes:
        binary_params: weights of one bit.
        float_params: side parameters.
        macs_per_output: binary multiply-accumulates per output element (a fraction in a strided transposed layer).
        work_per_input, work_per_output: elementwise operations per input and per output element.
    """

    binary_params: int
    float_params: int
    macs_per_output: Fraction
    work_per_input: int
    work_per_output: int
