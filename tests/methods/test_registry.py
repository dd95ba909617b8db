"""The registry of methods, and the contract that every method keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.methods import LayerParts, LayerSpec, get_method
from bidensify.nn import SignBinarizer, WeightBinarizer, binary_layers


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.act = nn.ReLU()
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.up(self.body(self.stem(x)))))


@pytest.mark.parametrize("name", ["a b", "keep", "", None, 3])
def test_names_that_no_method_can_have(name: object) -> None:
    with pytest.raises(ConfigError, match="cannot be a method's name; use letters"):
        bd.register_method(name)  # type: ignore[arg-type]


def test_what_is_no_method() -> None:
    with pytest.raises(ConfigError, match=r"activation=3 must be a function of \(channels, dim\)"):
        bd.register_method("no_method", activation=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="3 must be a function of"):
        bd.register_method("no_method")(3)  # type: ignore[arg-type]
    bd.register_method("no_method")(lambda spec, config: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="the method 'no_method' gave None for LayerSpec.*LayerParts"):
        bd.bidensify(Small(), method="no_method")


def test_both_methods_are_registered() -> None:
    assert {"bidense", "bnn"} <= set(bd.available_methods())


def takes_convolutions(name: str) -> bool:
    keeps = get_method(name).keeps
    return keeps is None or not keeps(LayerSpec("conv2d", 8, 8, kernel_size=(3, 3)))


@pytest.mark.parametrize("method", [name for name in bd.available_methods() if takes_convolutions(name)])
class TestContract:
    """What every method must give."""

    def test_weights_have_two_values_per_output_channel(self, method: str) -> None:
        student = bd.bidensify(Small(), method=method)
        for path, layer in binary_layers(student):
            weight, (signs, scale, offset) = layer.weight.detach(), layer.binary_weight()
            assert all(row.unique().numel() <= 2 for row in layer.weight_binarizer.rows(weight)), path
            like = layer.weight_binarizer.like
            again = like(scale, signs) * signs + (0 if offset is None else like(offset, signs))
            assert torch.allclose(weight, again, atol=1e-6), path

    def test_activations_have_two_values_per_sample(self, method: str) -> None:
        student = bd.bidensify(Small(), method=method).eval()
        for _, layer in binary_layers(student):
            x = torch.randn(2, layer.binarizer.channels, 6, 7)
            beta, low, high = layer.binarizer.codes(x)
            flips = layer.binarizer.flips()
            turn = 1 if flips is None else flips.view(1, -1, 1, 1)
            assert torch.allclose(layer.binarizer(x), torch.where(x >= beta, high, low) * turn)

    def test_trains(self, method: str) -> None:
        torch.manual_seed(0)
        student = bd.bidensify(Small(), method=method)
        x = torch.randn(4, 3, 16, 16)
        bd.calibrate(student, [x])
        target = (x.mean(1) > 0).long().repeat_interleave(2, 1).repeat_interleave(2, 2)
        optimizer = torch.optim.Adam(student.parameters(), 1e-2)
        losses = []
        for _ in range(40):
            loss = nn.functional.cross_entropy(student(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert all(layer.latent_weight.grad is not None for _, layer in binary_layers(student))

    def test_packs_to_the_same_output(self, method: str) -> None:
        student = bd.bidensify(Small(), method=method)
        bd.calibrate(student, [torch.randn(4, 3, 16, 16)])
        x = torch.randn(2, 3, 12, 20)
        with torch.no_grad():
            assert torch.allclose(bd.pack(student)(x), student.eval()(x), atol=1e-5)

    def test_deepcopy_gives_the_same(self, method: str) -> None:
        student = bd.bidensify(Small(), method=method).eval()
        x = torch.randn(1, 3, 8, 8)
        assert torch.equal(copy.deepcopy(student)(x), student(x))


def test_a_method_of_the_users_own() -> None:
    @bd.register_method("plain-sign", citation="none")
    def plain(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        return LayerParts(
            SignBinarizer(spec.in_channels, spec.dim, ste="polynomial"),
            WeightBinarizer(transposed=spec.transposed, groups=spec.groups),
        )

    student = bd.bidensify(Small(), method="plain-sign")
    assert {layer.method for _, layer in binary_layers(student)} == {"plain-sign"}
    assert all(layer.bypass is None for _, layer in binary_layers(student))
    with pytest.warns(UserWarning, match="'plain-sign' is registered again: the newer one takes over"):
        bd.register_method("plain-sign", bypass="same")(plain)
    assert get_method("plain-sign").bypass == "same"


@pytest.mark.parametrize("name", ["keep", "binarize", "a b", "", "9x"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a method's name"):
        bd.register_method(name)(lambda spec, config: None)  # type: ignore[arg-type, return-value]


def test_unknown_method() -> None:
    with pytest.raises(ConfigError, match="unknown method 'bidence'; did you mean 'bidense'"):
        get_method("bidence")


def test_bits_of_activations_are_what_the_method_was_registered_with() -> None:
    with pytest.raises(ConfigError, match=r"act_bits=\(1, 3\) must be \(1,\), \(1, 2\) or \(2,\)"):
        bd.register_method("threes", act_bits=(1, 3))
    spec = LayerSpec("conv2d", 4, 4)
    with pytest.raises(ConfigError, match="act_bits=2: the method 'irnet' has activations of 1 bit; 2 have bidense"):
        get_method("irnet").parts(spec, bd.BidensifyConfig(method="irnet", act_bits=2))
    bd.register_method("forgets", act_bits=(1, 2))(plain)
    with pytest.raises(ConfigError, match="'forgets' gave SignBinarizer, whose planes=1, for act_bits=2"):
        get_method("forgets").parts(spec, bd.BidensifyConfig(method="forgets", act_bits=2))


def plain(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
    return LayerParts(SignBinarizer(spec.in_channels, spec.dim), WeightBinarizer(transposed=spec.transposed))


@pytest.mark.parametrize("frame", ["bidense", "bidense-paper"])
def test_the_same_parts_stand_in_the_authors_layer_or_in_bidenses(frame: str) -> None:
    own = bd.bidensify(Small(), bd.BidensifyConfig(method="bnn"))
    framed = bd.bidensify(Small(), bd.BidensifyConfig(method="bnn", frame=frame))
    bidense = bd.bidensify(Small(), method="bidense" if frame == "bidense" else "bidense-in-paper")
    assert len(list(binary_layers(own))) == len(list(binary_layers(bidense))) > 0
    for (path, ours), (_, theirs), (_, model) in zip(binary_layers(own), binary_layers(framed), binary_layers(bidense)):
        assert type(ours.binarizer) is type(theirs.binarizer) is SignBinarizer, path
        assert ours.bypass is None
        assert theirs.bypass is not None
        assert theirs.activation_first is model.activation_first is (frame == "bidense")
        assert theirs.method == f"bnn-in-{frame}"
    assert {type(layer.activation).__name__ for _, layer in binary_layers(framed)} <= {"RPReLU", "Identity"}
    again = bd.bidensify(Small(), bd.BidensifyConfig(method="bnn", frame=frame))
    assert again.bidensify_plan == framed.bidensify_plan
    with pytest.raises(ConfigError, match="frame='mine'.* own, bidense"):
        bd.BidensifyConfig(frame="mine")


def test_what_a_method_says_of_its_layers_is_done() -> None:
    bd.register_method(
        "around", bypass="same", norm="none", activation_first=True, residual="keep",
        activation=lambda channels, dim: nn.Hardtanh(),
        keeps=lambda spec: "too wide" if spec.kind == "conv_transpose2d" else "",
    )(plain)  # fmt: skip
    student = bd.bidensify(Small(), method="around")
    layers = dict(binary_layers(student))
    assert list(layers) == ["body.0"]
    assert layers["body.0"].bypass is not None
    assert layers["body.0"].activation_first
    kept = {layer.path: layer.reason for layer in student.bidensify_plan.kept}
    assert kept["up"] == "around keeps it: too wide"
    bare = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 2, 1))
    found = dict(binary_layers(bd.bidensify(bare, method="around")))
    assert {path: (layer.norm is None, layer.bypass is None) for path, layer in found.items()} == {
        "1": (True, True), "2": (True, False),
    }  # fmt: skip


def test_a_method_is_told_of_the_layer() -> None:
    told: dict[tuple[int, int], LayerSpec] = {}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.a = nn.Conv2d(8, 10, (3, 1), stride=(2, 1), dilation=(1, 2))
            self.b = nn.Conv2d(10, 12, 1)
            self.head = nn.Conv2d(12, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.b(self.a(self.stem(x).relu())))

    def noting(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        told[spec.in_channels, spec.out_channels] = spec
        return plain(spec, config)

    bd.register_method("noting")(noting)
    net = Net()
    bd.bidensify(net, method="noting")
    first, second = told[8, 10], told[10, 12]
    assert (first.kernel_size, first.stride, first.dilation) == ((3, 1), (2, 1), (1, 2))
    assert first.fan_in == 24
    assert first.nonnegative
    assert not second.nonnegative
    assert torch.equal(first.weight, net.a.weight)
