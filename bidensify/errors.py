"""Errors that users see. Each message quotes what was given, the rule it broke and what to do."""

from __future__ import annotations


class BidensifyError(Exception):
    """Base of every error that bidensify raises on purpose."""


class ConfigError(BidensifyError, ValueError):
    """A configuration, rule, recipe or argument that cannot be taken."""


class PlanError(BidensifyError, ValueError):
    """A model that cannot be rewritten as asked."""


class CheckError(BidensifyError, RuntimeError):
    """A rewritten model that does not keep what a rewrite guarantees."""


class DataError(BidensifyError, ValueError):
    """A data set, image, mask or label that breaks its format."""


class TrainingError(BidensifyError, RuntimeError):
    """A run that cannot go on (for example a loss that is not finite)."""


class FormatError(BidensifyError, ValueError):
    """A file that is truncated, edited, of another model, or of an unknown version."""


class PackError(BidensifyError, ValueError):
    """A layer that cannot be frozen to bits exactly."""


class MissingExtraError(BidensifyError, ImportError):
    """An optional dependency that is not installed."""
