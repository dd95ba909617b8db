"""torch's own tools on binary and packed networks: tracing, parameters by name, parametrizations, pruning, TorchScript."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.nn import RPReLU, binary_layers

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Padded(nn.Conv2d):
    """A convolution of somebody's own, which torch.fx would trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), Padded(8, 8, 3), nn.ConvTranspose2d(8, 8, 2, 2)
        self.act, self.tokens, self.head = nn.ReLU(), nn.Linear(8, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        x = self.act(self.stem(x)) + torch.relu(self.b(torch.relu(self.a(self.stem(x)))))[..., ::2, ::2]
        x = self.tokens(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x if scale is None else x * scale)


def states() -> list[Any]:
    student = bd.bidensify(Net().eval())
    assert len(list(binary_layers(student))) == 3
    return [student, bd.pack(bd.bidensify(Net().eval()))]


@pytest.mark.parametrize("state", [0, 1])
def test_networks_are_traced_with_binary_and_packed_layers_as_steps(state: int) -> None:
    model = states()[state]
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(traced(X), model(X))
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    assert {"stem", "a", "b", "act", "tokens", "head"} <= called


def test_a_traced_student_trains_as_it_does_itself() -> None:
    student = states()[0].train()
    traced = torch.fx.symbolic_trace(student)
    traced(X).square().mean().backward()
    grads = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    assert any("binarizer" in name for name in grads)
    student.zero_grad()
    student(X).square().mean().backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, grads[name], atol=1e-6), name


def test_torchvisions_and_timms_feature_extractors() -> None:
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    student = bd.bidensify(torchvision.models.resnet18(weights=None)).eval()
    for model in (student, bd.pack(student)):
        with torch.no_grad():
            features = create_feature_extractor(model, ["layer2", "layer4"])(X)
        assert [tuple(value.shape) for value in features.values()] == [(2, 128, 4, 4), (2, 512, 1, 1)]


def test_activations_are_steps_wherever_they_stand() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), RPReLU(4)))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]


def test_every_name_of_named_parameters_gives_that_parameter() -> None:
    student = states()[0]
    for name, parameter in student.named_parameters():
        assert student.get_parameter(name) is parameter, name
    assert set(student.a.weight.detach().abs().unique().tolist()) != set(
        student.a.latent_weight.abs().unique().tolist()
    )


def test_what_would_exchange_the_weight_is_refused() -> None:
    student = states()[0]
    before = student.a.weight.detach().clone()
    with pytest.raises(ConfigError, match="parametrize before the rewrite"):
        parametrize.register_parametrization(student.a, "weight", nn.Identity())
    with pytest.raises(ConfigError, match="a bit has no zero"):
        prune.l1_unstructured(student.a, "weight", 0.5)
    assert torch.equal(student.a.weight, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("state", [0, 1])
def test_torchscript_is_refused_with_what_to_do(state: int) -> None:
    with pytest.raises(ConfigError, match="use torch.jit.trace, or bidensify.export"):
        torch.jit.script(states()[state])


INITS: dict[str, Callable[[Tensor], Any]] = {
    "normal_": lambda w: nn.init.normal_(w, 0.5, 0.1),
    "kaiming_normal_": nn.init.kaiming_normal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "trunc_normal_": nn.init.trunc_normal_,
    "orthogonal_": nn.init.orthogonal_,
    "dirac_": nn.init.dirac_,
    "data.normal_": lambda w: w.data.normal_(0.5, 0.1),
    "data.copy_": lambda w: w.data.copy_(torch.rand(w.shape)),
    "detach.copy_": lambda w: w.detach().copy_(torch.rand(w.shape)),
}


@pytest.mark.parametrize("init", INITS)
def test_what_is_written_to_the_weight_is_written_to_the_latent_weight(init: str) -> None:
    layer, plain = states()[0].a, nn.Conv2d(8, 8, 3)
    latent = layer.latent_weight
    torch.manual_seed(1)
    INITS[init](layer.weight)
    torch.manual_seed(1)
    INITS[init](plain.weight)
    assert layer.latent_weight is latent
    assert torch.equal(latent, plain.weight)
    assert layer.weight[0].abs().unique().numel() == 1


def test_parts_of_the_weight_are_written_and_in_place_sums_reach_it() -> None:
    layer = states()[0].a
    latent = layer.latent_weight
    before = latent.detach().clone()
    with torch.no_grad():
        layer.weight[0] = 3.0
        layer.weight[1].mul_(2.0)
        layer.weight.view(8, -1)[2].zero_()
        layer.weight *= 0.5
    assert layer.latent_weight is latent
    assert (latent[0] == 1.5).all()
    assert torch.equal(latent[1], before[1])
    assert (latent[2] == 0).all()
    assert torch.equal(latent[3:], before[3:] * 0.5)
    layer.weight.data = before
    assert torch.equal(latent, before)


def test_gradient_and_flag_of_the_weight_are_the_parameters() -> None:
    student = states()[0].train()
    student(X).square().mean().backward()
    layer = student.a
    assert layer.weight.grad is layer.latent_weight.grad
    layer.weight.grad.zero_()
    assert not layer.latent_weight.grad.any()
    layer.weight.grad = None
    assert layer.latent_weight.grad is None
    layer.weight.requires_grad_(False)
    assert not layer.latent_weight.requires_grad
    layer.weight.requires_grad = True
    assert layer.latent_weight.requires_grad


def test_the_weight_as_a_value_is_a_plain_tensor() -> None:
    layer = states()[0].a
    assert type(layer.weight * 2) is Tensor
    assert type(copy.deepcopy(layer.weight)) is Tensor
    assert torch.equal(layer.weight, layer.weight_binarizer(layer.latent_weight))
    layer.weight.sum().backward()
    assert layer.latent_weight.grad is not None
    with pytest.raises(TypeError, match="as parameter 'weight'"):
        layer.weight = torch.zeros(8, 8, 3, 3)


def test_a_layer_is_initialised_again_by_its_own_rules() -> None:
    layer, plain = states()[0].a, nn.Conv2d(8, 8, 3, bias=False)
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    plain.reset_parameters()
    assert torch.equal(layer.latent_weight, plain.weight)


def test_another_memory_format_keeps_the_latent_values() -> None:
    student = states()[0]
    before = student.a.latent_weight.detach().clone()
    nn.utils.convert_conv2d_weight_memory_format(student, torch.channels_last)  # type: ignore[arg-type]
    assert torch.equal(student.a.latent_weight, before)
    assert student.a.latent_weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_hooks_that_make_the_weight_make_the_latent_one(normed: Callable[[nn.Module], nn.Module]) -> None:
    student, plain = states()[0].train(), nn.Conv2d(8, 8, 3, bias=False)
    plain.load_state_dict({"weight": student.a.latent_weight})
    torch.manual_seed(1)
    normed(student.a)
    torch.manual_seed(1)
    normed(plain)
    student(X).square().mean().backward()
    plain(torch.randn(2, 8, 16, 16))
    assert torch.allclose(student.a.latent_weight, plain.weight, atol=1e-6)
    assert student.a.weight.detach()[0].unique().numel() == 2
    made_of = [name for name, value in student.a.named_parameters() if name.startswith("weight_") and value.grad.any()]
    assert made_of


def test_functional_calls_and_swaps_by_name_use_what_they_are_given() -> None:
    student = states()[0].eval()
    state = {name: value.detach() for name, value in student.named_parameters()}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(student, state, (X,)), student(X))
        flipped = state | {"a.weight": -state["a.weight"]}
        got = torch.func.functional_call(student, flipped, (X,))
        student.a.weight.neg_()
        assert torch.equal(got, student(X))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("group") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = model(X).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def test_distributed_checkpoints_hold_latent_weights(group: None, tmp_path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as by_name

    student, other = states()[0].train(), bd.bidensify(Net().eval()).train()
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    step(student, optimizer)
    model_state, optimizer_state = by_name.get_state_dict(student, optimizer)
    assert torch.equal(model_state["a.weight"], student.a.latent_weight)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=os.fspath(tmp_path))
    other_optimizer = torch.optim.Adam(other.parameters(), 0.01)
    fresh, fresh_optimizer = by_name.get_state_dict(other, other_optimizer)
    checkpoint.load({"model": fresh, "optimizer": fresh_optimizer}, checkpoint_id=os.fspath(tmp_path))
    by_name.set_state_dict(other, other_optimizer, model_state_dict=fresh, optim_state_dict=fresh_optimizer)
    assert torch.equal(other.a.latent_weight, student.a.latent_weight)
    assert torch.equal(step(other, other_optimizer), step(student, optimizer))
    assert torch.equal(other.a.latent_weight, student.a.latent_weight)


@pytest.mark.parametrize("kind", ["fully_shard", "FSDP", "FSDP flattened"])
def test_sharded_students_train_as_they_do_whole(group: None, kind: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    whole, student = states()[0].train(), bd.bidensify(Net().eval()).train()
    if kind == "fully_shard":
        fully_shard(student.a, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        sharded: nn.Module = fully_shard(student, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    else:
        sharded = FullyShardedDataParallel(student, device_id=torch.device("cpu"), use_orig_params=kind == "FSDP")
    want, got = torch.optim.SGD(whole.parameters(), 0.1), torch.optim.SGD(sharded.parameters(), 0.1)
    for _ in range(3):
        assert torch.allclose(step(whole, want), step(sharded, got), rtol=1e-5)


def test_no_parameter_is_without_dimensions_and_states_that_have_such_load(tmp_path: Path) -> None:
    from bidensify.methods import available_methods
    from bidensify.models.weights import load_weights

    for method in (name for name in available_methods() if not name.startswith("own-")):
        try:
            student = bd.bidensify(Net().eval(), method=method)
        except bd.errors.BidensifyError:
            continue  # takes no convolutions
        flat = {name for name, value in student.named_parameters() if value.dim() == 0}
        assert not flat, method
    student, other = states()[0], bd.bidensify(Net().eval())
    with torch.no_grad():
        student.a.binarizer.a.fill_(0.25)
    state = student.state_dict()
    state["a.binarizer.a"] = state["a.binarizer.a"].reshape(())
    other.load_state_dict(state)
    assert other.a.binarizer.a.tolist() == [0.25]
    torch.save(state, tmp_path / "old.pth")
    other = bd.bidensify(Net().eval())
    load_weights(other, tmp_path / "old.pth")
    assert other.a.binarizer.a.tolist() == [0.25]
