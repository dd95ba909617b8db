"""What holds for every network that is rewritten, whatever it looks like; each check raises an AssertionError that says where."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from case import Case, same, same_state
from torch import Tensor, nn
from zoo.signal import joined_signals

import bidensify as bd
from bidensify.errors import PackError
from bidensify.nn import RPReLU, binary_layers
from bidensify.rewrite import Plan, apply_plan
from bidensify.rewrite.record.recorded import specs, tensors_in
from bidensify.rewrite.record.recorder import record

__all__ = ["CHECKS", "Case", "examine", "undone"]


def check_plan(case: Case) -> None:
    """The dry run says what is done, and what is done is what the plan says, layer by layer."""
    dry = bd.plan(case.model, case.config, example_inputs=case.inputs)
    assert dry.to_dict() == case.plan.to_dict(), "plan() and bidensify() have different plans"
    modules = dict(case.student.named_modules())
    planned = {layer.path: layer for layer in case.plan.binary}
    assert planned.keys() == dict(binary_layers(case.student)).keys(), "planned and binary layers differ"
    for layer in case.plan.layers:
        if layer.kind == "function":
            continue
        module = modules[layer.path]
        assert isinstance(module, type(case.model.get_submodule(layer.path))), layer.path
        if layer.action == "binary":
            assert (module.bypass is not None) == layer.bypass, f"{layer.path}: bypass"
            assert isinstance(module.activation, RPReLU) == layer.activation, f"{layer.path}: activation"
            assert layer.norm is None or isinstance(modules[layer.norm], (nn.Identity, nn.Sequential)), layer.path
        else:
            assert layer.reason, f"{layer.path} stays without a reason"
    flags = {path: module.training for path, module in case.model.named_modules()}
    for path, module in case.student.named_modules():
        owner = path
        while owner not in flags:
            owner = owner.rpartition(".")[0]
        assert module.training == flags[owner], f"{path}: training={module.training}"


def check_structure(case: Case) -> None:
    """Containers and shapes of the output."""
    with torch.no_grad():
        before, now = case.model(*copy.deepcopy(case.inputs)), case.student(*copy.deepcopy(case.inputs))
    assert specs(before) == specs(now), f"the output is {specs(now)}, was {specs(before)}"


def check_kept(case: Case) -> None:
    """With generated code and not one thing exchanged: the original, bit for bit."""
    data = case.plan.to_dict()
    for layer in data["layers"]:
        layer.update(action="keep", way="", method="", bypass=False, norm=None, activation=False, layer_scale=None)
    data["activations"] = []
    for block in data["blocks"]:
        block.update(edits=[], modules={})
    twin = apply_plan(copy.deepcopy(case.model), Plan.from_dict(data))
    same(case.run(twin), case.run(case.model), "kept")


def undone(case: Case) -> nn.Module:
    """The rewritten network with the float layer, the absorbed norm and a ReLU put back into every binary layer.

    Where residual adds stay (``residual="keep"``) and every activation is a ReLU, this is the original again: whatever
    was moved, split or generated is where it was.
    """
    twin = copy.deepcopy(case.student)
    plans = {layer.path: layer for layer in case.plan.binary}
    for path, layer in binary_layers(twin):
        own = copy.deepcopy(case.model.get_submodule(path))
        norm = plans[path].norm
        steps = [own] + ([copy.deepcopy(case.model.get_submodule(norm))] if norm else [])
        if norm and hasattr(steps[-1], "act"):
            steps[-1].act = nn.Identity()
        if plans[path].activation:
            steps.append(nn.ReLU())

        def forward(x: Tensor, *args: Any, steps: list[nn.Module] = steps, **kwargs: Any) -> Tensor:
            x = steps[0](x, *args, **kwargs)
            for step in steps[1:]:
                x = step(x)
            return x

        for step in steps:
            step.eval().double()
        layer.forward = forward  # type: ignore[method-assign]
    for module in twin.modules():
        if isinstance(module, RPReLU):
            module.forward = torch.relu  # type: ignore[method-assign,assignment]
    return twin


def check_undone(case: Case) -> None:
    """See ``undone``; asked of networks whose activations are all ReLUs."""
    if not getattr(case.model, "only_relu", False):
        return
    config = bd.BidensifyConfig(residual="keep")
    kept = Case(case.model, case.inputs, config)
    twin = undone(kept).eval().double()
    with torch.no_grad():
        got = tensors_in(twin(*case.wide()))
    same(got, case.run(case.model), "undone")


def check_signal(case: Case) -> None:
    """One full-precision signal joins each binary layer's output.

    Where code adds and takes away what it likes (``any_order``), a layer may be read both where the signal is and where it
    is not, and has one too many or none on one of the ways; on all of them it must not.
    """
    counts = joined_signals(record(case.student, case.inputs))
    assert counts, "no binary layer ran"
    loose = getattr(case.model, "any_order", False)
    wrong = {path: each for path, each in counts.items() if each != [1] and each and not (loose and 1 in each)}
    assert not wrong, f"signals joined: {wrong}"


def _calibrated(case: Case) -> nn.Module:
    student = copy.deepcopy(case.student)
    other = tuple(0.9 * x.flip(-1) + 0.05 if isinstance(x, Tensor) else x for x in case.inputs)
    bd.calibrate(student, [other])
    return student.eval()


def check_pack(case: Case) -> None:
    """Each packed layer gives what its latent twin gives, bit for bit; a packed network survives its file.

    Where a layer cannot be packed, the plan has said so.
    """
    student = _calibrated(case)
    if any("padding_mode" in note for note in case.plan.notes):
        try:
            bd.pack(copy.deepcopy(student))
        except PackError:
            return
        raise AssertionError("the plan says that a layer cannot be packed, but it can")
    packed = bd.pack(copy.deepcopy(student))
    seen: dict[str, tuple[Any, Any]] = {}
    for path, layer in binary_layers(student):

        def note(module: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
            # A residual add in place writes into the layer's own output.
            seen[path] = (tuple(a.clone() if isinstance(a, Tensor) else a for a in args), output.clone())

        layer.register_forward_hook(note)
    with torch.no_grad():
        student(*copy.deepcopy(case.inputs))
        assert seen, "no binary layer ran"
        for path, (args, output) in seen.items():
            got = packed.get_submodule(path)(*args)
            assert torch.equal(got, output), f"{path}: packed differs by up to {(got - output).abs().max().item():.3g}"
        packed(*copy.deepcopy(case.inputs))
    with tempfile.TemporaryDirectory() as folder:
        bd.save_pretrained(packed, folder)
        same_state(bd.from_pretrained(folder, copy.deepcopy(case.model)), packed, "a saved packed network")


def check_round_trip(case: Case) -> None:
    """state_dict and save_pretrained carry everything."""
    student = _calibrated(case)
    twin = case.convert()
    twin.load_state_dict(student.state_dict())
    same_state(twin, student, "state_dict")
    same(case.run(twin), case.run(student), "state_dict")
    with tempfile.TemporaryDirectory() as folder:
        bd.save_pretrained(student, folder)
        again = bd.from_pretrained(folder, copy.deepcopy(case.model))
    same_state(again, student, "from_pretrained")
    same(case.run(again), case.run(student), "from_pretrained")


def check_original_state(case: Case) -> None:
    """A state_dict of the original loads strictly, and gives what the rewrite of a network with its values is."""
    source = copy.deepcopy(case.model)
    with torch.no_grad():
        for value in [*source.parameters(), *source.buffers()]:
            if value.is_floating_point():
                value.add_(0.25)
    state = source.state_dict()
    student = copy.deepcopy(case.student)
    student.load_state_dict(state)
    same_state(student, apply_plan(source, case.plan), "a state_dict of the original")


def check_replay(case: Case) -> None:
    """The plan's JSON, whole and compact, replayed on the meta device, gives the same network; twice is the same."""
    for compact in (False, True):
        plan = Plan.from_dict(json.loads(json.dumps(case.plan.to_dict(compact=compact))))
        assert plan.to_dict() == case.plan.to_dict(), "JSON changes the plan"
    twin = apply_plan(copy.deepcopy(case.model).to("meta"), plan)
    assert list(twin.state_dict()) == list(case.student.state_dict()), "meta: other keys"
    twin.load_state_dict(case.student.state_dict(), assign=True)
    again = case.convert()
    assert again.bidensify_plan.to_dict() == case.plan.to_dict(), "a second plan differs"  # type: ignore[union-attr,operator]
    same_state(again, case.student, "a second rewrite")
    same(case.run(again), case.run(case.student), "a second rewrite")


def check_copies(case: Case) -> None:
    """A deep copy shares nothing and gives the same."""
    twin = copy.deepcopy(case.student)
    own = {p.data_ptr() for p in case.student.parameters() if p.numel()}
    assert all(p.data_ptr() not in own for p in twin.parameters() if p.numel()), "a copy shares parameters"
    same(case.run(twin), case.run(case.student), "deepcopy")


def _gradients(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    model = copy.deepcopy(model).train()
    torch.manual_seed(0)
    outputs = [t for t in tensors_in(model(*copy.deepcopy(inputs))) if t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    sum((t * torch.randn(t.shape, generator=generator)).mean() for t in outputs).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_backward(case: Case) -> None:
    """Gradients reach every latent weight and binarizer that they reached before, and are finite."""
    try:
        before = _gradients(case.model, case.inputs)
    except RuntimeError:
        # The network itself writes in place into what its gradient needs.
        return
    after = _gradients(_calibrated(case), case.inputs)
    for path, layer in binary_layers(case.student):
        names = [name for name, value in layer.named_parameters() if any(value is p for p in layer.latent_parameters())]
        if not any(f"{path}.{name}" in before for name in names):
            continue
        for name in (*names, "binarizer.k", "binarizer.b", "binarizer.a"):
            grad = after.get(f"{path}.{name}")
            assert grad is not None, f"{path}.{name} gets no gradient"
            assert bool(grad.isfinite().all()), f"{path}.{name} gets a gradient that is not finite"
        assert any(after[f"{path}.{name}"].abs().max() > 0 for name in names), f"{path}: gradients of zeros"


def _captured(case: Case, capture: Callable[[nn.Module], Callable[..., Any]], what: str) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            capture(copy.deepcopy(case.model).eval())(*copy.deepcopy(case.inputs))
        except Exception:
            return
        finally:
            torch._dynamo.reset()
        student = copy.deepcopy(case.student).eval().double()
        got = tensors_in(capture(student)(*case.wide()))
        torch._dynamo.reset()
        same(got, case.run(case.student), what)


def check_compile(case: Case) -> None:
    """The rewritten network is captured whole where the original is."""
    _captured(case, lambda model: torch.compile(model, backend="eager", fullgraph=True), "compile")


def check_export(case: Case) -> None:
    """The rewritten network exports where the original does."""

    def capture(model: nn.Module) -> Callable[..., Any]:
        inputs = case.wide() if next(model.parameters()).dtype == torch.float64 else case.inputs
        return torch.export.export(model, copy.deepcopy(inputs)).module(check_guards=False)

    _captured(case, capture, "export")


CHECKS: Mapping[str, Callable[[Case], None]] = {
    "plan": check_plan,
    "structure": check_structure,
    "kept": check_kept,
    "undone": check_undone,
    "signal": check_signal,
    "pack": check_pack,
    "round_trip": check_round_trip,
    "original_state": check_original_state,
    "replay": check_replay,
    "copies": check_copies,
    "backward": check_backward,
    "compile": check_compile,
    "export": check_export,
}


def examine(model: nn.Module, inputs: tuple[Any, ...], without: tuple[str, ...] = ()) -> Case:
    """Rewrites a network and runs every check but those named in ``without``."""
    case = Case(model, inputs)
    for name, check in CHECKS.items():
        if name not in without:
            check(case)
    return case
