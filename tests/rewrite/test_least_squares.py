"""``fit_scales`` against NumPy's own least squares, and that it leaves nothing further from the teacher than calibration does."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.nn import binary_layers

SIZE = (3, 24, 24)


class Net(nn.Module):
    """A plain layer, a residual block whose add its bypass replaces, a prediction layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.plain, self.plain_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.block = Block()
        self.head = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain_norm(self.plain(self.stem(x))).relu()
        out: Tensor = self.head(self.block(x))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)) + x).relu()


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    model.train()
    with torch.no_grad():
        for image in batches():
            model(image)
    return model.eval()


def batches(count: int = 2) -> list[Tensor]:
    return [torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(n)) for n in range(count)]


@pytest.mark.parametrize("method", ["bidense", "bidense-in-paper"])
def test_scales_and_shifts_are_numpys_least_squares(method: str) -> None:
    teacher = network()
    student = bd.bidensify(teacher, method=method, example_inputs=torch.zeros(2, *SIZE))
    plan = {layer.path: layer for layer in student.bidensify_plan.binary}
    assert set(plan) == {"plain", "block.conv"}
    assert [plan[path].replaces_add for path in plan] == [False, True]
    # One batch: each layer is fitted on what it reads afterwards, too.
    (x,) = batches(1)
    bd.fit_scales(student, teacher, [x])
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in binary_layers(student):
        layer.register_forward_pre_hook(
            lambda module, args, path=path: seen.__setitem__(
                path, (args[0], module.conv_only(module.binarizer(args[0])))
            )
        )
    with torch.no_grad():
        student.eval()(x)
        plain = teacher.plain_norm(teacher.plain(teacher.stem(x)))  # type: ignore[operator]
        after = plain.relu()
        wanted = {"plain": plain, "block.conv": teacher.block.norm(teacher.block.conv(after)) + after}  # type: ignore[union-attr,operator]
    for path, layer in binary_layers(student):
        read, sums = seen[path]
        assert layer.bypass is not None
        target = (wanted[path] - layer.bypass(read)).movedim(1, 0).flatten(1).double().numpy()
        if method == "bidense":
            # What leaves the layer is to be the activation of what the teacher has: so much less the bypass, before a PReLU of
            # slope 0.25 and its shift.
            after = layer.activation.bias_out.detach().double().view(-1, 1).numpy()
            side = layer.bypass(read).movedim(1, 0).flatten(1).double().numpy()
            given = wanted[path].movedim(1, 0).flatten(1).double().numpy()
            left = np.maximum(given, 0) + 0.25 * np.minimum(given, 0) + after - side - after
            target = np.maximum(left, 0) + 4 * np.minimum(left, 0)
        norm = layer.norm
        assert isinstance(norm, nn.BatchNorm2d)
        for channel, (ours, theirs) in enumerate(zip(sums.detach().movedim(1, 0).flatten(1).double().numpy(), target)):
            solved = np.linalg.lstsq(np.stack([ours, np.ones_like(ours)], 1), theirs, rcond=None)[0]
            deviation = float((norm.running_var[channel] + norm.eps).sqrt())  # type: ignore[index]
            scale = float(norm.weight[channel].detach()) / deviation
            shift = float(norm.bias[channel].detach()) - scale * float(norm.running_mean[channel])  # type: ignore[index]
            assert scale == pytest.approx(solved[0], rel=1e-3, abs=1e-5)
            assert shift == pytest.approx(solved[1], rel=1e-3, abs=1e-4)


def test_the_prediction_layer_is_a_regression() -> None:
    teacher = network()
    student = bd.bidensify(teacher, example_inputs=torch.zeros(2, *SIZE))
    images = batches()
    bd.fit_scales(student, teacher, images)
    read: list[Tensor] = []
    student.get_submodule("head").register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        given = torch.cat([student.eval()(x) for x in images])
        wanted = torch.cat([teacher(x) for x in images])
    rows = nn.functional.unfold(torch.cat(read), 3, padding=1).transpose(1, 2).flatten(0, 1).double().numpy()
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    target = wanted.movedim(1, -1).flatten(0, 2).double().numpy()
    solved = rows @ np.linalg.lstsq(rows, target, rcond=None)[0]
    least = float(((solved - target) ** 2).mean())
    assert float((given - wanted).square().mean()) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("bits", [1, 2])
def test_it_is_nearer_to_the_teacher_than_calibration_is_and_packs(bits: int) -> None:
    teacher, images = network(), batches(4)
    config = bd.BidensifyConfig(act_bits=bits)
    errors = []
    for fit in (False, True):
        student = bd.bidensify(teacher, config, example_inputs=torch.zeros(2, *SIZE))
        before = {path: layer.latent_weight.clone() for path, layer in binary_layers(student)}
        if fit:
            bd.fit_scales(student, teacher, images[:3])
        else:
            bd.calibrate(student, images[:3])
        student.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            y = student(images[3])
            errors.append(float((y - teacher(images[3])).square().mean()))
            assert torch.equal(bd.pack(student)(images[3]), y)
        assert all(torch.equal(layer.latent_weight, before[path]) for path, layer in binary_layers(student))
        assert not any(layer._forward_pre_hooks or layer.binarizer.calibrating for _, layer in binary_layers(student))
    assert errors[1] < 0.8 * errors[0]


def test_mistakes_are_told() -> None:
    teacher = network()
    student = bd.bidensify(teacher, example_inputs=torch.zeros(2, *SIZE))
    for pair, message in (
        ((teacher, teacher), "the student is float"),
        ((student, student), "the teacher is latent"),
        ((bd.pack(student), teacher), "the student is packed"),
    ):
        with pytest.raises(ConfigError, match=message):
            bd.fit_scales(*pair, batches())
    with pytest.raises(ConfigError, match="no batch was given"):
        bd.fit_scales(student, teacher, [])
    with pytest.raises(ConfigError, match="the teacher has no layer 'stem.0'"):
        bd.fit_scales(student, nn.Sequential(nn.Conv2d(3, 4, 3)), batches())


def test_activations_in_place_change_nothing() -> None:
    """A layer without a norm hands its own output to the activation behind it."""

    def fitted(inplace: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace)]
        model = nn.Sequential(*layers, nn.Conv2d(16, 5, 1)).eval()
        student = bd.bidensify(model)
        bd.fit_scales(student, model, [torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))])
        return dict(student.state_dict())

    wanted, got = fitted(False), fitted(True)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in got.items())
