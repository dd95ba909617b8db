"""A task's figures under the column titles of papers on dense prediction."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["paper_columns"]

# Title, metric, factor, digits.
_SEGMENTATION = (("pixAcc (%)", "pixel_accuracy", 100.0, 2), ("mIoU (%)", "miou", 100.0, 2))
_DEPTH = (
    ("δ1", "delta1", 1.0, 3),
    ("δ2", "delta2", 1.0, 3),
    ("δ3", "delta3", 1.0, 3),
    ("AbsRel", "absrel", 1.0, 3),
    ("RMSE", "rmse", 1.0, 3),
    ("log10", "log10", 1.0, 3),
    ("RMSE log", "rmse_log", 1.0, 3),
)


def paper_columns(
    metrics: Mapping[str, float], *, params: float | None = None, ops: float | None = None
) -> dict[str, float]:
    """Returns the columns of the tables of BiDense (arXiv 2411.10346) by title, rounded as there.

    Args:
        metrics: of a task's metrics: those of depth, of segmentation, or any; the classes' own are left out.
        params: full-precision parameters + binary ones / 32, as :func:`bidensify.summary` counts them.
        ops: operations of one image, as it counts them.
    """
    columns: dict[str, float] = {}
    if params is not None:
        columns["Params (K)"] = round(params / 1e3, 1)
    if ops is not None:
        columns["OPs (G)"] = round(ops / 1e9, 2)
    known = next((table for table in (_SEGMENTATION, _DEPTH) if all(name in metrics for _, name, *_ in table)), None)
    if known is None:
        return columns | {name: round(value, 4) for name, value in metrics.items() if "/" not in name}
    return columns | {title: round(metrics[name] * factor, digits) for title, name, factor, digits in known}
