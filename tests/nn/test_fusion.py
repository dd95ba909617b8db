"""fusion_up / fusion_down against NumPy loops, on the whole grid of channel counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bidensify.nn import fusion, fusion_down, fusion_matrix, fusion_up

LIMIT = 130


def down_matrix(channels: int, groups: int) -> np.ndarray:
    """Channel i goes into group i mod ``groups``; a group is averaged."""
    matrix = np.zeros((groups, channels))
    for group in range(groups):
        members = list(range(group, channels, groups))
        matrix[group, members] = 1.0 / len(members)
    return matrix


def reference_matrix(channels: int, out: int) -> np.ndarray:
    if out < channels:
        return down_matrix(channels, out)
    copies, remainder = divmod(out, channels)
    blocks = [np.eye(channels)] * copies
    if remainder:
        blocks.append(down_matrix(channels, remainder))
    return np.concatenate(blocks)


@pytest.mark.parametrize("start", range(1, LIMIT + 1, 13))
def test_whole_grid(start: int) -> None:
    for channels in range(start, min(start + 13, LIMIT + 1)):
        for out in range(1, LIMIT + 1):
            matrix = fusion_matrix(channels, out).numpy()
            assert matrix.shape == (out, channels)
            np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=0, atol=1e-12, err_msg=f"{channels} -> {out}")
            assert (matrix >= 0).all()
            difference = np.abs(matrix - reference_matrix(channels, out)).max()
            assert difference < 1e-12, f"{channels} -> {out}"


def test_down_inverts_up_exactly_where_one_count_divides_the_other() -> None:
    for channels in range(1, LIMIT + 1):
        # Multiples of 1/64 add up without rounding, so that equality is the method's and not the arithmetic's.
        x = torch.randint(-512, 512, (1, channels, 1, 1)) / 64
        for factor in range(1, LIMIT // channels + 1):
            up = fusion_up(x, channels * factor)
            assert up.shape[1] == channels * factor
            assert torch.equal(fusion_down(up, channels), x)


def test_up_copies_before_it_averages() -> None:
    x = torch.arange(1.0, 4.0).reshape(1, 3, 1, 1)
    assert fusion_up(x, 8).flatten().tolist() == [1, 2, 3, 1, 2, 3, 2, 2]
    assert fusion_up(x, 3) is x
    assert fusion_down(x, 2).flatten().tolist() == [2.0, 2.0]
    assert fusion_down(torch.arange(5.0).reshape(1, 5, 1, 1), 2).flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize(("channels", "out"), [(6, 4), (4, 6), (5, 5), (7, 3), (3, 7), (8, 2), (2, 8), (4, 1), (1, 4)])
def test_other_dimensions_and_layouts(channels: int, out: int) -> None:
    x = torch.randn(2, channels, 5, 3)
    expected = torch.einsum("oc,nchw->nohw", fusion_matrix(channels, out).float(), x)
    torch.testing.assert_close(fusion(x, out), expected)
    torch.testing.assert_close(fusion(x.movedim(1, -1), out, dim=-1), expected.movedim(1, -1))
    last = fusion(x.contiguous(memory_format=torch.channels_last), out)
    torch.testing.assert_close(last, expected)
    # One channel is in both formats at once, and repeating it gives the plain one.
    assert channels == 1 or last.is_contiguous(memory_format=torch.channels_last)


def test_gradient_is_the_transposed_matrix() -> None:
    for channels, out in ((6, 4), (4, 6), (8, 4), (4, 8), (5, 12)):
        x = torch.randn(2, channels, 3, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t, o=out: fusion(t, o), (x,))


def test_errors_quote_what_was_given() -> None:
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"out_channels=3 is below the input's 4 channels; use fusion_down"):
        fusion_up(x, 3)
    with pytest.raises(ValueError, match=r"out_channels=5 is above the input's 4 channels; use fusion_up"):
        fusion_down(x, 5)
    with pytest.raises(ValueError, match=r"out_channels=0 must be a positive integer"):
        fusion_down(x, 0)
    with pytest.raises(ValueError, match=r"out_channels=2\.5 must be a positive integer"):
        fusion_up(x, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dim=4 is outside the input's 4 dimensions"):
        fusion_up(x, 8, dim=4)
