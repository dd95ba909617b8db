"""Whole networks whose activations have two bits, in all or in some layers: packed, stored, trained a step, compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bidensify as bd
from bidensify.deploy import available_kernels
from bidensify.models.unet import unet

MIXED = bd.BidensifyConfig(rules=(bd.Rule("decoder.*", {"act_bits": 2}),))
CONFIGS = [bd.BidensifyConfig(act_bits=2), MIXED, bd.BidensifyConfig(method="react", act_bits=2)]
last = torch.channels_last


def student_of(config: bd.BidensifyConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    student = bd.bidensify(unet(width=16), config)
    bd.calibrate(student, [torch.randn(2, 3, 48, 64)])
    return student.to(memory_format=last).eval()


@pytest.mark.parametrize("config", CONFIGS, ids=["all", "some", "react"])
def test_packed_and_loaded_networks_give_the_latent_ones_bits(config: bd.BidensifyConfig, tmp_path: Path) -> None:
    student = student_of(config)
    planes = {layer.binarizer.planes for _, layer in bd.nn.binary_layers(student)}
    assert planes == ({1, 2} if config is MIXED else {2})
    x = torch.randn(2, 3, 48, 64).contiguous(memory_format=last)
    with torch.no_grad():
        want = student(x)
        for kernel in available_kernels():
            assert torch.equal(bd.pack(student, kernel=kernel)(x), want), kernel
        bd.save_pretrained(bd.pack(student), tmp_path / "packed")
        assert torch.equal(bd.from_pretrained(tmp_path / "packed", unet(width=16))(x), want)
        bd.save_pretrained(student, tmp_path / "latent")
        again = bd.from_pretrained(tmp_path / "latent", unet(width=16)).to(memory_format=last).eval()
        assert torch.equal(again(x), want)
        half = [bd.pack(student, float_dtype=torch.bfloat16, kernel=kernel)(x) for kernel in available_kernels()]
    assert all(torch.equal(each, half[0]) for each in half)


def test_a_step_changes_every_part_and_the_student_still_packs() -> None:
    student = student_of(CONFIGS[0]).train()
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    x = torch.randn(2, 3, 48, 64).contiguous(memory_format=last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = student(x).float().square().mean()
    loss.backward()
    student(x).square().mean().backward()
    optimizer.step()
    still = [name for name, value in student.named_parameters() if torch.equal(value, before[name])]
    assert still == []
    student.eval()
    with torch.no_grad():
        assert torch.equal(bd.pack(student)(x), student(x))
