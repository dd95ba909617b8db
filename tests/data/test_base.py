"""Registry, and seeds that hold in worker processes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import bidensify as bd
from bidensify.data import DataInfo, DenseDataset, Sample, Seeded, available_datasets, build_dataset, register_dataset
from bidensify.errors import ConfigError


class Draws(DenseDataset):
    """Each sample holds what its transform drew."""

    info = DataInfo(num_classes=2, class_names=("a", "b"), palette=((0, 0, 0), (1, 1, 1)))

    def __init__(self, split: str = "train", *, length: int, transforms: object = None) -> None:
        super().__init__(lambda sample: {**sample, "draw": torch.rand(4)})
        self.length = length

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> Sample:
        return {"image": torch.tensor(index)}


def test_registry() -> None:
    register_dataset("draws_of_this_test")(Draws)
    assert {"scenes", "image_mask_folder", "draws_of_this_test"} <= set(available_datasets())
    assert len(build_dataset("draws_of_this_test", "train", length=3)) == 3
    with pytest.raises(ConfigError, match="needs the option length"):
        build_dataset("draws_of_this_test", "train")
    with pytest.raises(ConfigError, match="lenght.*its options are length"):
        build_dataset("draws_of_this_test", "train", lenght=3)


def test_a_name_registered_again_goes_to_the_newer_one() -> None:
    """As when a notebook's cell runs twice."""

    def cell(length: int) -> None:
        @bd.register_data_set("cell_of_this_test")
        class Cell(Draws):
            def __init__(self, split: str, *, transforms: object = None) -> None:
                super().__init__(split, length=length)

    cell(1)
    with pytest.warns(UserWarning, match=r"'cell_of_this_test' is registered again: .*Cell takes over from .*Cell"):
        cell(2)
    assert len(build_dataset("cell_of_this_test", "train")) == 2
    with pytest.raises(ConfigError, match="'' cannot be a data set's name"):
        bd.register_data_set("")
    with pytest.raises(ConfigError, match="must be a class or a function"):
        bd.register_data_set("number")(3)  # type: ignore[type-var]


class Habits(Draws):
    """A transform as people write them: three sources of random numbers."""

    def __init__(self) -> None:
        super().__init__(length=8)
        self.transforms = lambda sample: {
            "draw": torch.tensor([np.random.rand(), random.random(), torch.rand(()).item()], dtype=torch.float64)
        }


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_generator_follows_seed_epoch_and_index_alone(workers: int) -> None:
    seeded = Seeded(Habits(), 5)
    loader = DataLoader(seeded, batch_size=2, num_workers=workers)
    states = np.random.get_state()[1].copy(), random.getstate()
    seen = []
    for epoch in range(3):
        seeded.set_epoch(epoch)
        seen.append(torch.cat([batch["draw"] for batch in loader]))
        assert torch.equal(seen[-1], torch.stack([seeded[index]["draw"] for index in range(8)]))
    assert len(torch.cat(seen).unique(dim=0)) == 24
    assert all(len(torch.cat(seen)[:, kind].unique()) == 24 for kind in range(3))
    assert np.array_equal(states[0], np.random.get_state()[1])
    assert states[1] == random.getstate()


def test_negative_and_missing_indices() -> None:
    dataset = Draws(length=3)
    assert int(dataset[-1]["image"]) == 2
    for index in (3, -4):
        with pytest.raises(IndexError):
            dataset[index]
    seeded = Seeded(dataset, 0)
    assert torch.equal(seeded[-1]["draw"], seeded[2]["draw"])


def test_seeded_leaves_the_callers_random_state() -> None:
    seeded = Seeded(Draws(length=2), 7)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    seeded[0]
    assert torch.equal(torch.rand(3), expected)


def test_close_seeds_epochs_and_indices_draw_differently() -> None:
    draws = set()
    for seed in range(4):
        seeded = Seeded(Draws(length=4), seed)
        for epoch in range(4):
            seeded.set_epoch(epoch)
            draws |= {tuple(seeded[index]["draw"].tolist()) for index in range(4)}
    assert len(draws) == 64


def test_persistent_workers_see_the_epoch() -> None:
    seeded = Seeded(Draws(length=6), 1)
    loader = DataLoader(seeded, batch_size=2, num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 2):
        seeded.set_epoch(epoch)
        got = torch.cat([batch["draw"] for batch in loader])
        assert torch.equal(got, torch.stack([seeded[index]["draw"] for index in range(6)]))
