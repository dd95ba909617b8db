"""``allocate``: who gets which precision for a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bidensify._util.terminal import console
from bidensify.cli import arguments
from bidensify.cli.command import command
from bidensify.cli.options import AsJson, Debug


@command(
    "bidensify allocate runs/scenes/sensitivity_teacher.json --ops 0.2 --out config.json",
    "bidensify allocate sensitivity.json --ms 60 --bytes 0.1",
    "bidensify allocate runs/scenes/sensitivity_teacher.json --accuracy 0.02 --minimize bytes --json",
)
def allocate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SENSITIVITY", exists=True, dir_okay=False, help="What sensitivity wrote.", show_default=False
        ),
    ],
    macs: Annotated[float | None, typer.Option(help="Share of float MACs.", show_default=False)] = None,
    ops: Annotated[float | None, typer.Option(help="Share of the float network's OPs.", show_default=False)] = None,
    size: Annotated[float | None, typer.Option("--bytes", help="Share of its bytes.", show_default=False)] = None,
    ms: Annotated[float | None, typer.Option(help="Milliseconds, by the table.", show_default=False)] = None,
    accuracy: Annotated[
        float | None, typer.Option(help="Lose at most so much of the metric.", show_default=False)
    ] = None,
    minimize: Annotated[
        Literal["macs", "ops", "bytes", "ms"] | None,
        typer.Option(help="With --accuracy: which cost.", show_default="ms, else ops"),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Besides binary and float; repeat for more.", show_default="all that were measured"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the configuration (for --config).", show_default=False)
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Choose a precision for each layer under a budget, and say what that costs and loses.

    A recipe asks for the same with binarize: {budget: {ops: 0.2}}.
    """
    from bidensify._util.files import atomic_write
    from bidensify.precisions import Sensitivity, allocation, read_budget

    bounds = {"macs": macs, "ops": ops, "bytes": size, "ms": ms, "accuracy": accuracy, "minimize": minimize}
    given: dict[str, Any] = {name: value for name, value in bounds.items() if value is not None}
    if precision:
        given["precisions"] = precision
    found = allocation(Sensitivity.load(source), read_budget(given))
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text(found.config.to_json() + "\n", encoding="utf-8")
    if as_json:
        print(arguments.to_json(found.to_dict()))
        return
    for line in found.lines():
        console().print(line, soft_wrap=True)
    if out is None:
        print(json.dumps([rule.to_dict() for rule in found.config.rules], indent=1))
