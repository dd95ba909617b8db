"""What is checked on each network of the zoo: every check compares the rewritten network with the original."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import bidensify as bd
from bidensify.nn import BinaryLayer, RPReLU, binary_layers
from bidensify.rewrite import Plan, apply_plan
from bidensify.rewrite.record.recorder import record
from zoo.figures import check_pack, check_scale, check_signs
from zoo.networks import Entry
from zoo.signal import joined_signals
from zoo.subject import ABSENT, PASS, CheckFailed, Subject, close, first_difference, require, structure, tensors

__all__ = ["CHECKS", "examine"]


def gradients(subject: Subject, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a random projection of all outputs, in training mode, by parameter name."""
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        for layer in subject.plan.kept:
            bias = (
                getattr(model.get_submodule(layer.path), "bias", None) if layer.reason == "prediction layer" else None
            )
            if bias is not None:
                # A depth that ends in a ReLU can be 0 everywhere at random weights, and then has no gradient at all.
                bias += 1
    torch.manual_seed(0)
    found = [t for t in tensors(model(*subject.args, **subject.kwargs)) if t.is_floating_point() and t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    loss = sum((t * torch.randn(t.shape, generator=generator)).mean() for t in found)
    require(isinstance(loss, Tensor), "no output takes part in a gradient")
    assert isinstance(loss, Tensor)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_backward(subject: Subject) -> dict[str, Any]:
    """Each latent weight that had a gradient has one, and so has its binarizer; finite, all of them."""
    silent = []
    before = gradients(subject, subject.model)
    after = gradients(subject, subject.student)
    for path, _ in binary_layers(subject.student):
        if f"{path}.weight" not in before:
            continue
        for name in ("weight", "binarizer.k", "binarizer.b", "binarizer.a"):
            grad = after.get(f"{path}.{name}")
            require(grad is not None, f"{path}.{name} gets no gradient")
            assert grad is not None
            require(bool(grad.isfinite().all()), f"{path}.{name} gets a gradient that is not finite")
        if before[f"{path}.weight"].abs().max() > 0 and not after[f"{path}.weight"].abs().max() > 0:
            silent.append(path)
    # Zeros are what the STE gives where no input lies near its threshold; figures, but many are a network that cannot learn.
    require(
        len(silent) <= 0.02 * len(subject.plan.binary), f"latent weights get gradients of zeros: {', '.join(silent)}"
    )
    return {"status": PASS, "zero_gradients": silent}


def check_class(subject: Subject) -> None:
    """The network and all its blocks and layers are instances of what they were (absorbed norms and activations aside)."""
    gone = {item.path for item in subject.plan.activations}
    for path, module in subject.model.named_modules():
        if path in gone or any(path.startswith(f"{each}.") for each in gone):
            continue
        twin = subject.student.get_submodule(path)
        require(isinstance(twin, type(module)), f"{path}: {type(twin).__name__} is no {type(module).__name__}")
    name = type(subject.model).__name__
    require(type(subject.student).__name__ == name, f"the class is {type(subject.student).__name__}, was {name}")


def check_structure(subject: Subject) -> None:
    """Containers, shapes and dtypes of the output at batch 2."""
    now, before = structure(subject.run(subject.student)), structure(subject.expected)
    require(now == before, f"the output is {now}, was {before}")


def check_save_pretrained(subject: Subject) -> str:
    """The library's own ``save_pretrained`` writes every value, and its own loader or a second rewrite gives the output."""
    from safetensors.torch import load_file

    if not hasattr(subject.model, "save_pretrained"):
        return ABSENT
    own = subject.student.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        subject.student.save_pretrained(folder)  # type: ignore[operator]
        state = load_file(Path(folder) / "model.safetensors")
        if subject.entry.source == "transformers":
            # transformers renames some weights in its files, so it is asked to read what it wrote.
            twin = type(subject.model).from_pretrained(folder)  # type: ignore[attr-defined]
        else:
            twin = bd.bidensify(subject.model, example_inputs=subject.example, verify=False)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
            # A tensor that two names share is written under one of them.
            absent = {name: value for name, value in own.items() if name not in state}
            written = {own[name].data_ptr() for name in state}
            lost = [name for name, value in absent.items() if value.data_ptr() not in written]
            require(not lost, f"save_pretrained wrote no {', '.join(lost[:3])}")
            twin.load_state_dict({**absent, **state})
    again = twin.state_dict()
    for name, value in own.items():
        require(name in again and torch.equal(again[name], value), f"{name} differs after save_pretrained")
    # Values that are read from a file lie elsewhere in memory, and sums of vectors begin at another element.
    difference = close(subject.run(twin.eval()), subject.run(subject.student), 1e-5)
    require(not difference, f"after reloading: {difference}")
    return PASS


def check_round_trip(subject: Subject) -> None:
    """``bd.save_pretrained`` and ``bd.from_pretrained`` give the same output."""
    with tempfile.TemporaryDirectory() as folder:
        bd.save_pretrained(subject.student, folder)
        twin = bd.from_pretrained(folder, subject.model)
    difference = first_difference(subject.run(twin), subject.run(subject.student))
    require(not difference, difference)


def check_deepcopy(subject: Subject) -> None:
    """A deep copy gives the same output and shares no parameter."""
    twin = copy.deepcopy(subject.student)
    difference = first_difference(subject.run(twin), subject.run(subject.student))
    require(not difference, difference)
    own = {p.data_ptr() for p in subject.student.parameters() if p.numel()}
    require(all(p.data_ptr() not in own for p in twin.parameters() if p.numel()), "it shares parameters")


def check_again(subject: Subject) -> None:
    """A second rewrite of the same network has the same plan and the same parameters."""
    twin = bd.bidensify(subject.model, example_inputs=subject.example, verify=False)
    require(twin.bidensify_plan.to_dict() == subject.plan.to_dict(), "a second rewrite has another plan")  # type: ignore[union-attr,operator]
    own = subject.student.state_dict()
    for name, value in twin.state_dict().items():
        require(torch.equal(value, own[name]), f"a second rewrite has another {name}")


def _apart(got: Any, expected: Any) -> float:
    """The largest difference of two outputs' tensors, in norms of the expected one."""
    found = 0.0
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        if a.is_floating_point() and a.numel():
            found = max(found, ((a - b).norm() / b.norm().clamp(min=1e-12)).item())
    return found


def _captured(subject: Subject, capture: Callable[..., Callable[..., Any]]) -> str:
    """Captures the rewritten network and compares its output with the eager one's; where that fails, asks the original."""
    args, kwargs = subject.args, subject.kwargs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                got = capture(copy.deepcopy(subject.student), args, kwargs)(*args, **kwargs)
        except Exception:
            torch._dynamo.reset()
            try:
                capture(copy.deepcopy(subject.model), args, kwargs)(*args, **kwargs)
            except Exception:
                return ABSENT
            raise
        torch._dynamo.reset()
        apart = _apart(got, subject.run(subject.student))
        if apart >= 1e-3:
            # A captured network rounds in another order, and one sign that flips for it moves others. In float64 both
            # have the same arithmetic, and a wrong graph would differ all the same.
            twin = copy.deepcopy(subject.student).double()
            args, kwargs = tree_map(_double, (args, kwargs))
            with torch.no_grad(), _float_means_double():
                torch.manual_seed(0)
                expected = twin(*args, **kwargs)
                torch.manual_seed(0)
                wide = _apart(capture(copy.deepcopy(twin), args, kwargs)(*args, **kwargs), expected)
            torch._dynamo.reset()
            require(wide < 1e-9, f"the output differs from eager by {apart:.3g} of its norm, in float64 by {wide:.3g}")
    return PASS


@contextlib.contextmanager
def _float_means_double() -> Iterator[None]:
    """Where a network's own code says ``.float()`` (RAFT's coordinates), it stays in float64."""
    kept = Tensor.float
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.float = kept  # type: ignore[method-assign]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_compile(subject: Subject) -> str:
    """``torch.compile(fullgraph=True, backend="eager")``: the capture of the whole graph, whatever then compiles it."""
    return _captured(subject, lambda model, *_: torch.compile(model, fullgraph=True, backend="eager"))


def check_export(subject: Subject) -> str:
    """``torch.export.export`` and a run of what it gives."""
    return _captured(
        subject, lambda model, args, kwargs: torch.export.export(model, args, kwargs).module(check_guards=False)
    )


def check_kept(subject: Subject) -> None:
    """The plan's blocks with generated code and not one layer, norm or activation exchanged: the original, bit for bit."""
    data = subject.plan.to_dict()
    for layer in data["layers"]:
        layer.update(action="keep", way="", method="", bypass=False, norm=None, activation=False, layer_scale=None)
    data["activations"] = []
    for block in data["blocks"]:
        block.update(edits=[], modules={})
    twin = apply_plan(copy.deepcopy(subject.model), Plan.from_dict(data))
    difference = first_difference(subject.run(twin), subject.expected)
    require(not difference, difference)


def check_signal(subject: Subject) -> str:
    """``signal.joined_signals``: one full-precision signal joins each binary layer's output."""
    counts = joined_signals(record(subject.student, subject.example))
    require(bool(counts), "no binary layer ran")
    wrong = {path: each for path, each in counts.items() if each not in ([1], [])}
    shown = ", ".join(f"{path} {'/'.join(map(str, each))}" for path, each in list(wrong.items())[:6])
    require(not wrong, f"{len(wrong)} of {len(counts)} layers: signals joined {shown}")
    return PASS


def layers_of(subject: Subject) -> dict[str, Any]:
    """What the plan did, in numbers."""
    plan = subject.plan
    kept = Counter(layer.reason for layer in plan.kept)
    ways = Counter(layer.way for layer in plan.binary)
    unnamed = [layer.path for layer in plan.kept if not layer.reason]
    return {
        "layers": len(plan.layers),
        "binary": len(plan.binary),
        "kept": dict(sorted(kept.items())),
        "unnamed": unnamed,
        "mac_share": round(plan.binary_mac_share(), 4),
        "eligible_mac_share": round(plan.binary_mac_share(eligible_only=True), 4),
        "way_path": ways["path"],
        "way_block": ways["block"],
        "notes": list(plan.notes),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "activations": sum(isinstance(m, RPReLU) for m in subject.student.modules()),
        "binary_modules": sum(isinstance(m, BinaryLayer) for m in subject.student.modules()),
    }


CHECKS: dict[str, Callable[[Subject], Any]] = {
    "backward": check_backward,
    "class": check_class,
    "structure": check_structure,
    "save_pretrained": check_save_pretrained,
    "round_trip": check_round_trip,
    "deepcopy": check_deepcopy,
    "again": check_again,
    "kept": check_kept,
    "signal": check_signal,
    "scale": check_scale,
    "signs": check_signs,
    "pack": check_pack,
    "compile": check_compile,
    "export": check_export,
}


def examine(
    entry: Entry,
    progress: Callable[[str], None] = lambda text: None,
    checks: Mapping[str, Callable[[Subject], Any]] = CHECKS,
) -> dict[str, Any]:
    """Builds, rewrites and checks one network.

    Returns:
        A JSON-able row: "name", then "refused" (why the library itself does not build or run it) or "convert" ("pass"
        or the message), "seconds", "layers" (see ``layers_of``) and "checks": name -> {"status": ..., ...}.
    """
    row: dict[str, Any] = {"name": entry.name}
    if entry.unavailable:
        return {**row, "refused": entry.unavailable}
    try:
        subject = Subject(entry)
    except Exception as error:
        return {**row, "refused": _short(error)}
    progress("converts")
    try:
        subject.convert()
    except Exception as error:
        return {**row, "convert": _short(error), "seconds": 0.0}
    row.update(convert=PASS, seconds=round(subject.seconds, 1), plan=layers_of(subject), checks={})
    for name, check in checks.items():
        progress(name)
        try:
            result = check(subject)
        except Exception as error:
            result = _short(error)
        row["checks"][name] = result if isinstance(result, dict) else {"status": result or PASS}
    return row


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, CheckFailed) else f"{type(error).__name__}: "
    return (name + text)[:400]
