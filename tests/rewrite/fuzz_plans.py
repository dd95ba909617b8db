"""python fuzz_plans.py FOLDER PLANS FOLDERS: mutated plans and packed folders, read and applied under an audit hook.

Whatever a file says, reading and replaying it runs no code of the file's: the hook notes every compilation, execution, import,
file opened for writing and process that a valid plan does not need. The last line of the output is a JSON object.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import BidensifyError
from bidensify.rewrite import Plan, apply_plan

MARK = "BD_CANARY"
WATCHED = (
    "compile",
    "exec",
    "import",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
)


class Joined(nn.Module):
    """Takes lists, dictionaries and flags."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, pair: list[Tensor], options: dict[str, Any], skip: bool = True, **more: Any) -> Tensor:
        x = F.relu(self.conv(pair[0]) + pair[1])
        x = x * options["it's a scale"]
        return self.act(x + pair[0] if skip else x)


class Net(nn.Module):
    """Two blocks whose code a rewrite changes, a plain sequence, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.joined = Joined()
        self.row = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.joined([x, x * 2], {"it's a scale": 2.0, "name": "a"})
        return self.head(self.row(x) + x)


CODE = (
    f"(open('{{0}}/{MARK}', 'w').write('x'), None)[1]",
    f"__import__('os').system('touch {{0}}/{MARK}')",
    f"x[0] if not exec(\"open('{{0}}/{MARK}','w')\") else 0",
    f"x)\n    open('{{0}}/{MARK}', 'w')\n    (x",
    f"x, {MARK}=__import__('pathlib').Path('{{0}}/{MARK}').touch()",
    f"{MARK}",
    f"{MARK}.system",
    f"pair['{MARK}']",
    "os.system", "builtins.exec", "__class__", "__init__", "forward", "stem.__class__", "training", "_modules", "type(pair)",
    "pair['''x''']", 'x["\\x00"]', "pair[-1]", "pair[99999999999999999999]", "𝕩", "\u202ex", "\ud800", "[red]x[/]", "", ".",
    "a..b",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**400, -(10**30), 0.5, float("nan"), float("inf"), -0.0, [], {}, [[]], [None],
    {"path": ["x"], "kind": "value", "value": None}, ["x", 0, "key"], [{}] * 3, "binary", "keep", "function", "module",
)  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        _places(item, found)
    return found


def mutate(text: str, rng: Random, folder: Path) -> dict[str, Any]:
    """A plan, given as JSON, with one to three values, keys or parts changed."""
    plan: dict[str, Any] = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(plan, [])
        if rng.random() < 0.6:
            # Where code is changed there is most to gain.
            places = _places(plan["blocks"], []) if plan.get("blocks") and isinstance(plan["blocks"], list) else places
        if not places:
            continue
        holder, key = rng.choice(places)
        action = rng.choice(("code", "code", "code", "other", "delete", "swap", "key", "nest", "double"))
        if action == "code":
            holder[key] = rng.choice(CODE).replace("{0}", str(folder))
        elif action == "other":
            holder[key] = copy.deepcopy(rng.choice(OTHERS))
        elif action == "delete":
            del holder[key]
        elif action == "swap":
            other, second = rng.choice(places)
            holder[key], other[second] = copy.deepcopy(other[second]), copy.deepcopy(holder[key])
        elif action == "key" and isinstance(holder, dict):
            holder[rng.choice(CODE).replace("{0}", str(folder))] = holder.pop(key)
        elif action == "nest":
            holder[key] = _nested(rng.choice((1, 3, 50, 3000)))
            break  # so deep that it cannot be walked any more
        elif action == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
    return plan


class Watch:
    """Notes what happens inside of a ``with`` and should not."""

    def __init__(self) -> None:
        self.on = False
        self.seen: Counter[str] = Counter()
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            mode = args[1]
            wrong = isinstance(mode, str) and any(letter in mode for letter in "wax+")
        elif event in ("compile", "exec"):
            # A changed block's code, as torch.fx writes it of the graph of the network in memory.
            text = args[0] if event == "compile" else args[0].co_filename
            name = args[1] if event == "compile" else text
            wrong = not str(name).startswith("<bidensify ") or MARK in str(text)
        else:
            wrong = event in WATCHED
        if wrong:
            self.on = False
            self.seen[f"{event} {str(args)[:200]}"] += 1
            self.on = True

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *unused: object) -> None:
        self.on = False


def main(folder: Path, plans: int, folders: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    student = bd.bidensify(model, example_inputs=x).eval()
    text = json.dumps(student.bidensify_plan.to_dict())
    plan = json.loads(text)
    assert len(plan["blocks"]) >= 2, "the network has no blocks to attack"
    packed = bd.pack(student)
    bd.save_pretrained(packed, folder / "packed")
    header = json.loads((folder / "packed" / "bidensify.json").read_text(encoding="utf-8"))
    rng, counts, errors, watch = Random(0), Counter[str](), Counter[str](), Watch()

    def attempt(read: Any, run: bool) -> None:
        stage = "read"
        try:
            with watch:
                applied = read()
                stage = "applied"
                if applied is not None and run:
                    with torch.no_grad():
                        applied(x)
                    stage = "ran"
        except BidensifyError as error:
            errors[type(error).__name__] += 1
        except Exception as error:
            # A plan that fits can still be of another network: then it fails as a network does, and only when it runs.
            if stage == "read":
                errors[f"UNEXPECTED {type(error).__name__}: {str(error)[:300]}"] += 1
        counts[stage] += 1

    def from_plan(data: Any) -> nn.Module:
        read = Plan.from_dict(data)
        return apply_plan(copy.deepcopy(model), read)

    def from_folder() -> nn.Module:
        return bd.from_pretrained(folder / "packed", model)

    for _ in range(2):
        # What is imported late is imported now; the complaint about a plan is one of these things.
        from_plan(plan)(x)
        from_folder()(x)
        for wrong in (
            {"version": 2},
            {**plan, "notes": [3]},
            {**plan, "config": {"method": "x"}},
            {**plan, "inputs": "\ud800"},
        ):
            with contextlib.suppress(BidensifyError):
                from_plan(wrong)
    # A replay asks the collector for every cache of the process; those of the libraries need not be looked at each time.
    gc.freeze()
    with watch:
        eval("1 + 1")
    assert {event.split()[0] for event in watch.seen} == {"compile", "exec"}, "the hook sees nothing"
    watch.seen.clear()
    for number in range(plans):
        data = mutate(text, rng, folder)
        attempt(lambda data=data: from_plan(data), run=number % 10 == 0)
    for _ in range(folders):
        changed = {**header, "plan": mutate(text, rng, folder)}
        changed.pop("sha256")
        try:
            body = json.dumps(
                changed, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
            ).encode()
        except (ValueError, UnicodeEncodeError, RecursionError):
            continue
        changed["sha256"] = hashlib.sha256(body).hexdigest()
        written = json.dumps(changed)
        (folder / "packed" / "bidensify.json").write_text(written, encoding="utf-8")
        counts["folders"] += 1
        attempt(from_folder, run=True)
    return {
        "counts": counts,
        "errors": errors,
        "seen": watch.seen,
        "written": [str(path) for path in folder.rglob(f"*{MARK}*")],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
