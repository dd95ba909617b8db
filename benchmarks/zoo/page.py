"""``docs/models.md`` from the rows of results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bidensify._util.files import atomic_write
from zoo.networks import strict

__all__ = ["ABSENT", "PASS", "failures", "render", "write_page"]

PASS, ABSENT = "pass", "not in the original"

HEAD = """\
# Networks that were rewritten, and what was checked on each

Made by `python benchmarks/models.py` (`--resume` goes on with a sweep that was stopped, `--only 'timm:*'` takes some,
`--render` writes this page again from `benchmarks/results/models.jsonl`). Random weights, batch 2, nothing downloaded.
Each network runs in a process of its own; a test runs the same script on a few of them and compares this page with the list.

What the columns say:

- **layers**: convolutions and linear layers that the network has: all / binarized / kept. Why the kept ones are kept is
  counted in the second table; attention's and MLPs' linear layers on tokens are kept by default (`linear="all"` takes them).
- **MACs**: the share of all multiply-accumulates that is binary, and of those of eligible convolutions (not the stem, a
  predictor, a 1×1 map or a gate).
- **way**: binary layers exchanged at their path alone + those whose block's code changed too.
- **s**: processor seconds of the conversion, its own check included, on one thread beside other work.
- **back**: forward and backward in training mode; every latent weight that had a gradient, and its binarizer, has a finite one.
- **class**: every module is an instance of what it was; **out**: containers, shapes and dtypes of the output.
- **save**: the library's own `save_pretrained`, and its state loaded into a second rewrite; **trip**: `bd.save_pretrained` and
  `bd.from_pretrained` to the same bits; **copy**: a deep copy gives the same bits.
- **twice**: a second rewrite has the same plan and parameters; **kept**: all blocks' code generated anew, and every layer
  kept, gives the original's output bit for bit.
- **signal**: on the graph of the rewritten network, exactly one full-precision signal joins each binary layer's output
  (`benchmarks/zoo/signal.py`).
- **scale**: lowest and highest ratio of a stage's standard deviation to the original's, untrained and uncalibrated; within ×4.
- **signs**: after calibration on one batch, the share of binarizer channels with 5 % to 95 % of +1 on it in
  evaluation mode; at least 95 %.
- **compile**: `torch.compile(fullgraph=True, backend="eager")`, that is the capture of the graph; **export**: `torch.export`,
  and a run of its result.
- **packed**: the largest difference between a packed layer and its latent twin on the same input, relative to the largest
  output.

`+` passes, `?` was not run, `-` means that it fails on the original network too; anything else is a failure, written out at the
end.
"""

SCALE = """\
Where layers without a norm follow each other, the random weights that libraries draw for them shrink the original's signal from
layer to layer (a transposed convolution of stride 4 alone to a seventh); bypasses hand it on as it is. The second pair of
figures is the same comparison with an original whose convolutions and linear layers are rescaled to keep the power of a white
input (`benchmarks/zoo/stages.py`, `levelled`).
"""

PTE = """\
- **.pte**: packed, exported to ExecuTorch, run again in a process without PyTorch: on the median of five inputs within 1e-3 of
  the packed network's output. {ran} of {count} do (`FAIL`: the reason is at the end, and no file is written)."""

MARKS = (
    ("backward", "back"), ("class", "class"), ("structure", "out"), ("save_pretrained", "save"), ("round_trip", "trip"),
    ("deepcopy", "copy"), ("again", "twice"), ("kept", "kept"), ("signal", "signal"),
)  # fmt: skip
LAST = (("compile", "compile"), ("export", "export"))


def failures(row: dict[str, Any]) -> list[str]:
    """What failed, as "check: message"; nothing for a network that its library refuses."""
    if row.get("convert", PASS) != PASS:
        return [f"converts: {row['convert']}"]
    found = []
    for name, result in row.get("checks", {}).items():
        status = result["status"]
        # A check that stopped with an error is a failure on any network; a figure outside its range is one where asked.
        only_reported = name == "pte" or (("low" in result or "share" in result) and not strict(row["name"], name))
        if status not in (PASS, ABSENT) and not only_reported:
            found.append(f"{name}: {status}")
    plan = row.get("plan", {})
    found += [f"plan: {path} is kept without a reason" for path in plan.get("unnamed", ())]
    if plan and plan["eligible_mac_share"] < 0.9 and not plan["kept"]:
        found.append(f"plan: {100 * plan['eligible_mac_share']:.1f} % of eligible MACs binary, and no reason")
    return found


def _mark(result: dict[str, Any] | None) -> str:
    if result is None:
        return "?"
    return {PASS: "+", ABSENT: "-"}.get(result["status"], "FAIL")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _line(row: dict[str, Any]) -> list[str]:
    plan, checks = row["plan"], row["checks"]
    scale, signs, pack = (checks.get(name, {}) for name in ("scale", "signs", "pack"))
    return [
        row["name"].partition(":")[2],
        f"{plan['layers']} / {plan['binary']} / {plan['layers'] - plan['binary']}",
        f"{_percent(plan['mac_share'])} / {_percent(plan['eligible_mac_share'])}",
        f"{plan['way_path']} + {plan['way_block']}",
        f"{row['seconds']:.1f}",
        *(_mark(checks.get(name)) for name, _ in MARKS),
        f"{scale['low']:.2f}-{scale['high']:.2f}" if "low" in scale else _mark(scale),
        f"{_percent(signs['share'])}" if "share" in signs else _mark(signs),
        *(_mark(checks.get(name)) for name, _ in LAST),
        f"{pack['worst']:.0e}" if "worst" in pack else _mark(pack),
    ]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(header)} |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _totals(rows: list[dict[str, Any]], refused: int) -> str:
    done = [row for row in rows if "plan" in row]
    count = len(rows)

    def passed(name: str) -> str:
        results = [row["checks"][name]["status"] for row in done if name in row["checks"]]
        able = [status for status in results if status != ABSENT]
        return f"{sum(status == PASS for status in able)} of {len(able)}"

    def share(test: Callable[[dict[str, Any]], bool]) -> str:
        return f"{sum(map(test, done))} of {len(done)}"

    named = share(lambda row: row["plan"]["eligible_mac_share"] >= 0.9)
    # A sum of shares would count each network alike; MACs themselves are of different input sizes.
    lines = [
        f"- {count} networks, of which {len(done)} convert ({refused} more pairs are refused by their library, see below).",
        f"- Layers: {sum(r['plan']['layers'] for r in done)}, binarized {sum(r['plan']['binary'] for r in done)}.",
        f"- At least 90 % of eligible MACs binary: {named}; every kept layer has its reason in the plan.",
        f"- Forward and backward {passed('backward')}; class {passed('class')}; structure {passed('structure')}; "
        f"`save_pretrained` where the original has it {passed('save_pretrained')}; round trip {passed('round_trip')}; "
        f"deep copy {passed('deepcopy')}; twice the same {passed('again')}; all kept equals the original {passed('kept')}.",
        f"- One full-precision signal at every binary layer: {passed('signal')}.",
        f"- `torch.compile(fullgraph=True)` where the original does {passed('compile')}; `torch.export` where the original "
        f"does {passed('export')}.",
        f"- Scale within ×4 {passed('scale')}; signs mixed {passed('signs')} (the scale is asked of decoders, "
        "ResNet-50, ConvNeXt-T, MobileNetV3 and MiT, and reported for all); packed layers equal "
        f"{passed('pack')}.",
    ]
    return "\n".join(lines)


def _short_reason(text: str) -> str:
    return text.replace("|", "/")


def render(rows: dict[str, dict[str, Any]], order: list[str]) -> str:
    """The page as Markdown.

    Args:
        rows: name -> row of results.
        order: all names of the list; those without a row are said to be missing.
    """
    present = [rows[name] for name in order if name in rows]
    refused = [row for row in present if "refused" in row]
    tried = [row for row in present if "refused" not in row]
    done = [row for row in tried if "plan" in row]
    parts = [HEAD, "## Totals\n", _totals(tried, len(refused))]
    machines = Counter(f"{m['cpu']}, torch {m['torch']}" for m in (row.get("machine") for row in done) if m)
    exported = {row["name"]: row["checks"]["pte"] for row in done if "pte" in row["checks"]}
    if exported:
        ran = sum(result["status"] == PASS for result in exported.values())
        parts.append(PTE.format(ran=ran, count=len(exported)))
    parts.append("\nMachine: " + "; ".join(f"{name} ({count} networks)" for name, count in machines.items()) + ".")
    missing = [name for name in order if name not in rows]
    if missing:
        parts.append(f"\nNot run: {', '.join(missing)}.")
    header = ["network", "layers", "MACs, %", "way", "s", *(short for _, short in MARKS)]
    header += ["scale", "signs, %", *(short for _, short in LAST), "packed", *([".pte"] if exported else [])]
    titles = {"smp": "segmentation_models_pytorch", "torchvision": "torchvision", "timm": "timm, features_only"}
    titles["transformers"] = "transformers, small random configurations"
    for source, title in titles.items():
        own = [row for row in done if row["name"].startswith(f"{source}:")]
        if own:
            lines = (_line(row) + ([_mark(exported.get(row["name"]))] if exported else []) for row in own)
            parts += [f"\n## {title}\n", _table(header, lines)]
    parts += ["\n## Why layers are kept\n"]
    reasons = ([r["name"], str(len(r["plan"]["kept"]) and sum(r["plan"]["kept"].values())), _reasons(r)] for r in done)
    parts.append(_table(["network", "kept", "reasons"], reasons))
    if refused:
        parts += ["\n## Refused by the library itself\n"]
        parts.append(_table(["network", "reason"], ([r["name"], _short_reason(r["refused"])] for r in refused)))
    wrong = [(row["name"], text) for row in tried for text in failures(row)]
    if wrong:
        parts += ["\n## Failures\n", SCALE, _table(["network", "what"], ([n, _short_reason(t)] for n, t in wrong))]
    apart = [(name, result["status"]) for name, result in exported.items() if result["status"] != PASS]
    if apart:
        parts += ["\n## Not under ExecuTorch\n"]
        parts.append(_table(["network", "reason"], ([name, _short_reason(text)] for name, text in apart)))
    beyond = [
        (row["name"], row["checks"][name]["status"])
        for row in done
        for name in ("scale", "signs")
        if row["checks"].get(name, {}).get("status", PASS) not in (PASS, ABSENT) and not strict(row["name"], name)
    ]
    if beyond:
        parts += ["\n## Outside the range where it is not asked for\n"]
        if not wrong:
            parts.append(SCALE)
        parts.append(_table(["network", "what"], ([n, _short_reason(t)] for n, t in beyond)))
    return "\n".join(parts) + "\n"


def _reasons(row: dict[str, Any]) -> str:
    return "; ".join(f"{reason} {count}" for reason, count in row["plan"]["kept"].items())


def write_page(page: Path, rows: dict[str, dict[str, Any]], order: list[str]) -> None:
    """Writes the page, whole or not at all."""
    with atomic_write(page) as temporary:
        temporary.write_text(render(rows, order), encoding="utf-8")
