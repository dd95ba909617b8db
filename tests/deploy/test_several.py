"""A file's outputs against its network's, where rounding alone may turn signs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bidensify.deploy.export.several import judge, rounded, several
from bidensify.errors import CheckError


def outputs(by: float, count: int = 5) -> list[list[Tensor]]:
    """Of five inputs, ``by`` of their mean size from those of ``outputs(0)``."""
    return [[torch.full((2, 3), float(i + 1)) * (1 + by)] for i in range(count)]


def never() -> list[list[Tensor]]:
    raise AssertionError("a network whose file agrees is not run again")


def test_what_agrees_is_not_asked_twice() -> None:
    found = judge("net", outputs(0), outputs(5e-4), never)
    assert (found.median, found.note) == (pytest.approx(5e-4, rel=1e-3), "")


def test_one_input_on_which_a_sign_turned() -> None:
    given = outputs(1e-6)
    given[3] = [given[3][0] * 2]
    found = judge("net", outputs(0), given, never)
    assert found.median < 1e-5
    assert found.largest == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(("file", "own"), [(0.71, 0.68), (0.6, 0.68), (0.002, 0.0015)])
def test_what_rounding_makes_of_the_network_itself_is_no_fault_of_the_file(file: float, own: float) -> None:
    found = judge("net", outputs(0), outputs(file), lambda: outputs(own))
    assert found.median == pytest.approx(file, rel=1e-3)
    assert f"moves this network's own outputs by {own:.2g}" in found.note


@pytest.mark.parametrize(("file", "own"), [(1.3, 0.68), (0.71, 1e-6), (0.002, 5e-4)])
def test_what_goes_beyond_that_is_refused(file: float, own: float) -> None:
    with pytest.raises(CheckError, match="rounding its inputs makes of its own .*; nothing was written"):
        judge("net", outputs(0), outputs(file), lambda: outputs(own))


@pytest.mark.parametrize("network", [0.0, math.nan])
def test_a_file_of_nan_is_refused_whatever_rounding_does(network: float) -> None:
    own = f"the network's {0 if network == 0 else 6}"
    with pytest.raises(CheckError, match=f"output 0 holds 6 NaN of 6 values, {own}; nothing was written"):
        judge("net", outputs(network), outputs(math.nan), lambda: outputs(1.0))


def test_values_that_are_no_numbers_agree_with_the_same() -> None:
    odd = [math.inf, -math.inf, math.nan]
    wanted = [[torch.tensor([*odd, 1.0, 2.0])]] * 3
    assert judge("net", wanted, [[torch.tensor([*odd, 1.0, 2.003])]] * 3, None).median == pytest.approx(1e-3, rel=1e-2)
    assert judge("net", wanted, [[torch.tensor([-math.inf, *odd[1:], 1.0, 2.0])]] * 3, None).median == math.inf
    with pytest.raises(CheckError, match="output 0 holds 2 NaN of 5 values, the network's 1"):
        judge("net", wanted, [[torch.tensor([math.nan, *odd[1:], 1.0, 2.0])]] * 3, None)


def test_an_int8_file_is_the_users_to_judge() -> None:
    assert judge("net", outputs(0), outputs(0.4), None).median == pytest.approx(0.4, rel=1e-3)


def test_other_shapes_are_refused_whatever_rounding_does() -> None:
    with pytest.raises(CheckError, match=r"outputs have shapes \[\(3, 2\)\], the network's \[\(2, 3\)\]"):
        judge("net", outputs(0), [[x[0].T] for x in outputs(0)], lambda: outputs(1.0))


def test_rounded_inputs_are_other_inputs_by_a_millionth() -> None:
    runs = several((torch.randn(1, 3, 8, 8), torch.arange(4)), {"mask": torch.rand(2, 2)})
    for (args, kwargs), (moved, named) in zip(runs, rounded(runs), strict=True):
        ratio = (moved[0].double() / args[0].double() - 1).abs()
        assert 1e-7 < ratio.max() < 1.2e-6
        assert torch.equal(moved[1], args[1])
        assert not torch.equal(named["mask"], kwargs["mask"])
        assert torch.allclose(named["mask"], kwargs["mask"], rtol=1e-5)
