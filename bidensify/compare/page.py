"""A comparison's results as tables, plots and the report page."""

from __future__ import annotations

from collections.abc import Sequence

from bidensify.compare.plots import Bars, Mark, Panel, Scatter, bars, colour_of, curves, scatters
from bidensify.compare.report import Card, Facts, Figure, Report, Shot, Table, Viewer
from bidensify.compare.results import Results, spread

__all__ = ["class_table", "main_table", "plots", "report"]

# Metrics that are shares; people read them in per cent.
_SHARES = ("miou", "pixel_accuracy", "mean_pixel_accuracy", "iou", "accuracy", "delta1", "delta2", "delta3")
# Which end of the others is the better one; of a task's own metrics nobody knows but the task, of its primary one.
_HIGHER = (*_SHARES, "dice", "precision", "recall", "psnr", "ssim")
_LOWER = ("absrel", "sqrel", "rmse", "rmse_log", "log10", "silog", "epe", "outliers")
FLOATS = ("float", "bf16", "int8")


def _scale(metric: str) -> float:
    return 100.0 if metric.partition("/")[0] in _SHARES else 1.0


def _title(metric: str) -> str:
    return f"{metric} %" if _scale(metric) == 100 else metric


def _figure(metric: str, value: float) -> str:
    return f"{value * _scale(metric):.{2 if _scale(metric) == 100 else 4}f}"


def _cell(metric: str, found: tuple[float, float, int] | None) -> str:
    if found is None:
        return "–"
    mean, deviation, count = found
    return _figure(metric, mean) + (f" ± {_figure(metric, deviation)}" if count > 1 else "")


def networks(results: Results) -> list[str]:
    """Every network that has a place on the plots: the full-precision forms, then the methods, best first."""
    return [*(name for name in FLOATS if results.point(name)), *results.ranked()]


def _spread(results: Results, name: str, metric: str) -> tuple[float, float, int] | None:
    if name in results.methods:
        return results.spread(name, metric)
    point = results.point(name)
    return spread([point.metrics[metric]]) if point is not None and metric in point.metrics else None


def _metrics(results: Results) -> list[str]:
    """The metrics that stand in the main table, the primary one first."""
    found = dict.fromkeys(name for cell in results.cells for name in cell.metrics if "/" not in name)
    return sorted(found, key=lambda name: name != results.primary)


def main_table(results: Results) -> Table:
    """A row per network: metrics as mean ± standard deviation over seeds, OPs, bytes, milliseconds."""
    metrics = _metrics(results)
    first, others = metrics[:1], metrics[1:]
    columns = [
        "method",
        *map(_title, first),
        "GOPs",
        "MB",
        "smaller",
        "ms / image",
        "seeds",
        "s / step",
        *map(_title, others),
    ]
    names = networks(results)
    whole = next((point.bytes for point in results.points if point.name == "float"), None)
    rows = []
    for name in names:
        point, cells = results.point(name), results.finished(name)
        steps = [cell.seconds_per_step for cell in cells if cell.seconds_per_step is not None]
        size = None if point is None else point.bytes
        rows.append([
            name,
            *(_cell(metric, _spread(results, name, metric)) for metric in first),
            "–" if point is None or point.ops is None else f"{point.ops / 1e9:.3f}",
            "–" if size is None else f"{size / 1e6:.3f}",
            "–" if size is None or whole is None else f"{whole / size:.1f}×",
            "–" if point is None or point.milliseconds is None else f"{point.milliseconds:.2f}",
            f"{len(cells)} of {len(results.seeds)}" if name in results.methods else "–",
            f"{sum(steps) / len(steps):.3f}" if steps else "–",
            *(_cell(metric, _spread(results, name, metric)) for metric in others),
        ])  # fmt: skip
    strong = set()
    for metric in metrics:
        if metric != results.primary and metric not in (*_HIGHER, *_LOWER):
            continue
        column = columns.index(_title(metric))
        means = {
            at: found[0] for at, n in enumerate(names) if n in results.methods and (found := results.spread(n, metric))
        }
        if means:
            lower = not results.higher_is_better if metric == results.primary else metric in _LOWER
            best = min(means.values()) if lower else max(means.values())
            strong |= {(at, column) for at, value in means.items() if value == best}
    notes = [f"{point.name}: {point.note}" for point in results.points if point.note]
    notes += [f"{cell.method}, seed {cell.seed}: {cell.state}" for cell in results.cells if cell.state != "done"]
    title = f"{results.name}: mean ± standard deviation over seeds" if len(results.seeds) > 1 else results.name
    return Table(title, columns, rows, ". ".join(notes), frozenset(strong), _swatches(names), sortable=True)


def _swatches(names: Sequence[str]) -> dict[int, str]:
    return {at: colour_of(name, names) for at, name in enumerate(names)}


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _parts(results: Results) -> list[str]:
    """What the per-part metrics are of: "iou/road" gives "road"."""
    found = dict.fromkeys(
        name.partition("/")[2] for cell in results.cells for name in cell.metrics if name.startswith("iou/")
    )
    return [part for part in results.classes if part in found] or list(found)


def class_table(results: Results) -> Table | None:
    """Intersection over union of each class, a column per network; None where there are no classes."""
    parts, names = _parts(results), networks(results)
    if not parts:
        return None
    rows = [[part, *(_cell("iou", _spread(results, name, f"iou/{part}")) for name in names)] for part in parts]
    return Table("IoU of each class (%)", ["class", *names], rows, sortable=True)


def plots(results: Results) -> dict[str, Figure]:
    """Every plot by the name of its file."""
    names = networks(results)
    primary, scale = results.primary, _scale(results.primary)
    label = _title(primary) + ("" if results.higher_is_better else " (lower is better)")

    def marks(field: str, unit: float, kinds: Sequence[str]) -> list[Mark]:
        found = []
        for name in names:
            point, value = results.point(name), _spread(results, name, primary)
            cost = None if point is None else getattr(point, field)
            if point is not None and point.kind in kinds and value is not None and cost:
                found.append(Mark(name, cost / unit, value[0] * scale, value[1] * scale, point.kind == "float"))
        return found

    found: dict[str, Figure] = {}
    both = ("float", "binary")
    costs = [
        Scatter("against operations", "GOPs per image", label, marks("ops", 1e9, both)),
        Scatter("against size", "megabytes of weights", label, marks("bytes", 1e6, both)),
    ]
    costs = [panel for panel in costs if panel.marks]
    if costs:
        found["cost"] = scatters(
            f"{primary} against cost", costs, names, note="Hollow: full precision and its int8 and bf16 forms."
        )
    times = marks("milliseconds", 1.0, both)
    if times:
        panel = Scatter("against time", "milliseconds per image", label, times)
        note = "Measured here, one image at a time, all networks in turn in one process."
        found["time"] = scatters(f"{primary} against measured time", [panel], names, note=note)
    done = {method: results.finished(method) for method in results.ranked() if results.finished(method)}
    if done:
        panels = [
            Panel(title, "epoch", axis, {
                method: _mean_curve([[(e["epoch"], e[key] * unit) for e in cell.history if key in e] for cell in cells])
                for method, cells in done.items()
            })
            for title, axis, key, unit in (
                ("Training loss", "loss", "loss", 1.0), (f"Validation {primary}", label, primary, scale)
            )
        ]  # fmt: skip
        found["curves"] = curves("Learning curves", panels, note="Means over seeds.", names=names)
    parts = _parts(results)
    if parts:
        values = {name: [_value(results, name, f"iou/{part}", 100.0) for part in parts] for name in names}
        found["classes"] = bars("IoU of each class", [Bars("", "IoU %", parts, values)], names)
    if results.task == "depth":
        panels_of = (("Depth error", "error (lower is better)", ("absrel", "rmse_log", "log10"), 1.0),
                     ("Depths within a factor", "% of pixels", ("delta1", "delta2", "delta3"), 100.0))  # fmt: skip
        found["depth"] = bars("Depth error", [
            Bars(title, axis, keys, {name: [_value(results, name, key, unit) for key in keys] for name in names})
            for title, axis, keys, unit in panels_of
        ], names)  # fmt: skip
    if results.entropy:
        panels = [
            Panel(title, "channel, by rank", "bits", {
                method: list(enumerate(sorted(getattr(results.entropy[method], side), reverse=True), 1))
                for method in results.ranked() if method in results.entropy
            })
            for title, side in (("Before the first binarization", "before"), ("After it", "after"))
        ]  # fmt: skip
        note = "Information of each channel on the same images: 256 levels before, two values after (at most one bit)."
        found["entropy"] = curves("Channel-wise information entropy", panels, note=note, names=names)
    return found


def _value(results: Results, name: str, metric: str, unit: float) -> float | None:
    value = _spread(results, name, metric)
    return None if value is None else value[0] * unit


def _mean_curve(lines: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of several curves, at the places that all of them have."""
    tables = [dict(line) for line in lines]
    shared = [x for x, _ in lines[0] if all(x in table for table in tables)]
    return [(x, sum(table[x] for table in tables) / len(tables)) for x in shared]


def report(
    results: Results, shown: Sequence[Shot], legend: Sequence[tuple[str, str]], drawn: dict[str, Figure]
) -> Report:
    """The page: headline figures, the table, plots, the viewer, and what ran."""
    ranked = [method for method in results.ranked() if results.finished(method)]
    cards = []
    for method in ranked[:1]:
        best, teacher = results.spread(method, results.primary), _spread(results, "float", results.primary)
        assert best is not None
        against = f"full precision {_cell(results.primary, teacher)}" if teacher else f"{best[2]} seeds"
        cards.append(Card(f"best {_title(results.primary)}: {method}", _cell(results.primary, best), against))
        point, whole = results.point(method), results.point("float")
        if point is not None and point.bytes and whole is not None and whole.bytes:
            cards.append(
                Card(
                    f"file of {method}",
                    _size(point.bytes),
                    f"{whole.bytes / point.bytes:.1f}× smaller than float",
                )
            )
        if point is not None and point.milliseconds and whole is not None and whole.milliseconds:
            faster = whole.milliseconds / point.milliseconds
            cards.append(
                Card("one image", f"{point.milliseconds:.1f} ms", f"float {whole.milliseconds:.1f} ms, {faster:.1f}×")
            )
    done = sum(cell.state == "done" for cell in results.cells)
    cards.append(
        Card(
            "runs",
            f"{done} of {len(results.methods) * len(results.seeds)}",
            f"{len(results.methods)} methods, {len(results.seeds)} seeds",
        )
    )
    sections: list[Table | Figure | Viewer | Facts] = [main_table(results)]
    if shown:
        names = list(shown[0].pictures)
        first = (
            next((name for name in ("float", *ranked) if name in names), names[0]),
            ranked[0] if ranked else names[-1],
        )
        note = "Any two on the same pixels. Methods run packed, those of the first finished seed."
        sections.append(Viewer("The same images under every network", names, shown, legend, note, first))
    sections += [drawn[name] for name in ("cost", "time", "classes", "depth", "entropy", "curves") if name in drawn]
    table = class_table(results)
    if table is not None:
        sections.append(table)
    failed = [[cell.method, str(cell.seed), cell.error] for cell in results.cells if cell.state == "failed"]
    if failed:
        sections.append(Table("Runs that failed", ["method", "seed", "error"], failed))
    facts = {
        "input": f"{results.size[0]}×{results.size[1]}",
        "methods": ", ".join(results.methods),
        "seeds": ", ".join(map(str, results.seeds)),
    }
    sections.append(Facts("What ran", {**facts, **results.machine}))
    lead = f"{len(results.methods)} binarization methods under one recipe ({results.name}), one teacher, the same data and seeds."
    return Report(f"{results.name}: methods compared", lead, cards=cards, sections=sections)
