"""The banks of a super-network as one: what is written to it is written to them, also after they were replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sbs
from sbs.gates import movable
from tests.numerics import networks, states

SIZE = 8
SPACES = {
    "all": {},
    "one step and two": {"weight_bits": (4, 8), "activation_bits": (2, 4, 8)},
    "weights alone": {"activation_bits": (4,), "prune": False},
    "pruning alone": {"weight_bits": (4,), "activation_bits": (4,)},
    "nothing": {"weight_bits": (4,), "activation_bits": (4,), "prune": False},
}


@pytest.fixture(params=SPACES)
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return states.searched(networks.Residual(), SIZE, seed=5, group_size=2, **SPACES[request.param])


def test_what_is_written_to_it_is_written_to_the_banks(net):
    joint = net.joint_bank()
    for i, bank in enumerate(net.banks()):
        for name, own in bank.named_buffers():
            joint.get_buffer(name).add_(1)
            whole = joint.get_buffer(name)
            assert torch.equal(own, whole if own.dim() == 0 else joint.part(whole, i)), name
            bank.get_buffer(name).sub_(1)
    assert net.joint_bank() is joint


def test_the_gates_of_every_row_are_its_own(net):
    """Whether a gate may flip, and what one gate of a kind learns from others, as each bank by itself says."""
    joint = net.joint_bank()
    for bank in net.banks():
        generator = torch.Generator().manual_seed(3)
        for name in ("promised", "slope_open", "slope_closed", "scatter_closed", "weight_open", "weight_closed"):
            own = bank.get_buffer(name)
            own.copy_(torch.rand(own.shape, generator=generator) - (0.5 if "slope" in name else 0.0))
    images = torch.tensor(10.0)
    free, gain = movable(joint.decided()), joint.gain(images)
    for i, bank in enumerate(net.banks()):
        assert torch.equal(joint.part(free, i), movable(bank.decided()))
        torch.testing.assert_close(joint.part(gain, i), bank.gain(images))


def test_banks_that_were_replaced_are_joined_again(net):
    for other in (copy.deepcopy(net), net.double()):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        joint = other.joint_bank()
        assert joint.open.dtype == other.channel_gates.open.dtype
        for name, value in other.state_dict().items():
            assert torch.equal(value, before[name]), name
        joint.open.zero_()
        assert all(not bank.open.any() for bank in other.banks())
    sbs.after_step(net)
