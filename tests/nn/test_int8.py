"""int8 layers: values against NumPy and torch's own operators, gradients, ranges, files, what a program of them runs."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import Int8, Int8Layer, make_int8

LAYERS = {
    "conv": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2),
    "circular": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, groups=2),
    "linear": lambda: nn.Linear(8, 6),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3)),
}


def rounded(layer: nn.Module) -> Any:
    layer.__class__ = make_int8(type(layer))
    assert isinstance(layer, Int8Layer)
    layer.install_int8()
    return layer


def given_to(name: str, seed: int = 0) -> Tensor:
    shape = (2, 5, 7, 8) if name == "linear" else (2, 8, 5, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def on_levels(x: npt.NDArray[Any], step: Any, zero: Any, least: int, most: int) -> npt.NDArray[Any]:
    """NumPy's own, in double precision."""
    return (np.clip(np.round(x / step + zero), least, most) - zero) * step


@pytest.mark.parametrize("name", LAYERS)
def test_values_are_those_of_the_float_layer_on_rounded_numbers(name: str) -> None:
    torch.manual_seed(1)
    layer = LAYERS[name]()
    x = given_to(name)
    weight = layer.weight.detach().double().numpy()
    groups = getattr(layer, "groups", 1)
    steps = np.zeros_like(weight)
    for channel in range(6):
        # Where the weights lie that feed this output channel.
        if name == "transposed":
            inside = (slice(channel // 3 * 4, channel // 3 * 4 + 4), channel % 3)
        else:
            inside = (channel,)  # type: ignore[assignment]
        steps[inside] = np.abs(weight[inside]).max() / 127
    assert groups in (1, 2)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    wanted_weight = torch.from_numpy(on_levels(weight, steps, 0, -127, 127)).float()
    wanted_x = torch.from_numpy(on_levels(x.double().numpy(), step, round(-low / step), 0, 255)).float()
    function: Any = {"transposed": nn.functional.conv_transpose2d, "linear": nn.functional.linear}.get(
        name, nn.functional.conv2d
    )
    options = {"conv": {"stride": 2, "padding": 1, "groups": 2}, "transposed": {"stride": 2, "padding": 1, "groups": 2}}
    if name == "circular":
        wanted_x = nn.functional.pad(wanted_x, (1, 1, 1, 1), mode="circular")
    bias = None if layer.bias is None else layer.bias.detach()
    wanted = function(wanted_x, wanted_weight, bias, **options.get(name, {}))
    made, exact = rounded(layer), layer
    made.int8.begin_calibration()
    made(x)
    made.int8.end_calibration()
    got = made(x)
    # A value that lies between two levels to rounding may fall to either: then all is off by a step at most there.
    assert float((got - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())
    assert float(((got - wanted).abs() > 1e-4).float().mean()) < 0.02
    assert exact is made


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_rounding_is_torchs(seed: int, scale: float, shift: float) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * scale + shift
    part = Int8()
    part.begin_calibration()
    part(x * 0.7)
    part.end_calibration()
    assert part.affine is not None
    step, zero = part.affine
    assert part.low <= 0 <= part.high
    got, wanted = part(x), torch.fake_quantize_per_tensor_affine(x, step, zero, 0, 255)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6 * step) or float((got - wanted).abs().max()) <= step * 1.001
    assert float(part(torch.zeros(()))) == 0.0
    weight = part.weight(x)
    steps = x.abs().amax(1) / 127
    wanted = torch.fake_quantize_per_channel_affine(x, steps, torch.zeros(3, dtype=torch.int32), 0, -127, 127)
    assert float((weight - wanted).abs().max()) <= float(steps.max()) * 1.001
    assert float(((weight - wanted).abs() > 1e-3 * steps[:, None]).float().mean()) < 0.02
    # Rounded again it stays: the files of a runtime, which find the steps anew, hold the same weights.
    assert torch.allclose(part.weight(weight), weight, rtol=1e-5)


def test_gradients_go_through_within_the_range_and_are_zero_outside() -> None:
    part = Int8()
    part.begin_calibration()
    part(torch.tensor([-1.0, 2.0]))
    part.end_calibration()
    x = torch.tensor([-3.0, -0.5, 0.3, 1.9, 2.5], requires_grad=True)
    part(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    layer = rounded(nn.Conv2d(4, 4, 3))
    layer(torch.randn(1, 4, 6, 6)).square().sum().backward()
    assert float(layer.weight.grad.abs().min()) > 0


def test_with_a_gradient_it_computes_what_it_does_without() -> None:
    layer, x = rounded(nn.Conv2d(8, 6, 3)), given_to("conv")
    with torch.no_grad():
        wanted = layer(x)
    assert torch.equal(layer(x.requires_grad_()), wanted)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore")
def test_copies_files_and_programs_compute_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    layer, x = rounded(LAYERS[name]()).eval(), given_to(name)
    layer.int8.begin_calibration()
    layer(x)
    layer.int8.end_calibration()
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), y)
        if name != "parametrized":  # which torch does not pickle
            assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
        save_model(layer, str(tmp_path / "layer.safetensors"))
        other = rounded(LAYERS[name]()).eval()
        assert not torch.equal(other(x), y)
        load_model(other, str(tmp_path / "layer.safetensors"))
        assert torch.equal(other(x), y)
        compiled = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), y, atol=1e-5)
        program = torch.export.export(layer, (x,))
        step = float(layer.int8.high - layer.int8.low) / 255
        assert float((program.module()(x) - y).abs().max()) <= 8 * step


def test_a_range_keeps_its_values_whatever_the_network_is_cast_to() -> None:
    layer = rounded(nn.Conv2d(8, 6, 3))
    layer.int8.begin_calibration()
    layer(given_to("conv"))
    layer.int8.end_calibration()
    low = float(layer.int8.low)
    layer.to(torch.bfloat16)
    assert float(layer.int8.low) == low
    assert layer(given_to("conv").bfloat16()).dtype == torch.bfloat16


def test_calibration_gives_every_layer_the_range_that_its_input_has() -> None:
    torch.manual_seed(0)
    first, second = rounded(nn.Conv2d(3, 4, 3, padding=1)), rounded(nn.Conv2d(4, 4, 3, padding=1))
    net = nn.Sequential(first, nn.BatchNorm2d(4), second)
    batches = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    bd.calibrate(net, batches)
    values = torch.stack(batches)
    assert (float(first.int8.low), float(first.int8.high)) == (float(values.min()), float(values.max()))
    # What the second layer then sees is within its range, but for what other statistics of the norm move.
    seen: list[Tensor] = []
    second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.train()
    for batch in batches:
        net(batch)
    assert float(second.int8.high) == pytest.approx(max(float(x.max()) for x in seen), rel=0.02)
    assert float(second.int8.low) == pytest.approx(min(float(x.min()) for x in seen), rel=0.02)
    # Norms alone: the ranges are found again.
    bd.calibrate(net, [2 * batch for batch in batches], thresholds=False)
    assert float(first.int8.high) == 2 * float(values.max())


def test_before_calibration_each_input_has_its_own_range() -> None:
    layer, x = rounded(nn.Conv2d(8, 6, 3)), given_to("conv")
    with torch.no_grad():
        float_layer = nn.Conv2d(8, 6, 3)
        float_layer.load_state_dict(layer.state_dict(), strict=False)
        for scale in (1e-3, 1, 1e3):
            y = float_layer(x * scale)
            assert float((layer(x * scale) - y).abs().max()) < 0.03 * float(y.abs().max())


def test_ranges_that_something_else_writes_are_used() -> None:
    """An average of models copies buffers without a word."""
    torch.manual_seed(0)
    layer = make_int8(nn.Conv2d)(3, 4, 3)
    layer.install_int8()
    model = nn.Sequential(layer).eval()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    x = torch.randn(2, 3, 8, 8)
    bd.calibrate(model, [x])
    average.update_parameters(model)
    wider = 2 * x
    assert torch.equal(average(wider), model(wider))
    again = copy.deepcopy(average)
    assert torch.equal(again(wider), model(wider))
