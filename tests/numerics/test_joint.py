"""The three banks as one are three banks: the same numbers, gate by gate, as each of them by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import sbs
from sbs.gates import PACE, GateBank, audible, movable
from sbs.joint import JointBank, joined
from tests.numerics import networks

SHAPES = {"two steps": ((4, 2), (4, 2), (6,)), "unequal": ((4, 1), (4, 3), (6,)), "bits alone": ((4, 2), (4, 1), (0,))}
IMAGES, STEPS = torch.tensor(64.0), 120


def _banks(shapes: tuple[tuple[int, ...], ...]) -> list[GateBank]:
    return [GateBank(*shape).double() for shape in shapes]


def _step(bank: GateBank, pull: Tensor, price: Tensor) -> None:
    """What `sbs.decide` does to a bank, but for the limits of pruning."""
    bank.pull += pull
    is_open, wanted = bank.decided(), bank.wanted(PACE)
    bank.weigh(audible(is_open), 1 / STEPS, PACE.window_of(STEPS), PACE)
    bank.commit(torch.where(movable(is_open), wanted, is_open), 1 / STEPS, IMAGES)
    free = movable(bank.decided()) & bank.judged() & (bank.age >= PACE.hold)
    bank.move(price, bank.gain(IMAGES), free, torch.tensor(PACE.distance / STEPS))


@pytest.mark.parametrize("kind", SHAPES)
def test_the_banks_as_one_do_what_each_of_them_does_by_itself(kind):
    alone, together = _banks(SHAPES[kind]), _banks(SHAPES[kind])
    joint = JointBank(together)
    g = torch.Generator().manual_seed(0)

    def drawn(low: float, high: float) -> list[Tensor]:
        return [torch.rand(s, generator=g, dtype=torch.float64) * (high - low) + low for s in SHAPES[kind]]

    price, gain, bend = drawn(0.0, 2.0), drawn(0.0, 2.0), drawn(0.0, 2.0)
    for _ in range(STEPS):
        noise = drawn(-0.2, 0.2)
        pulls = [n - w + c * (b.decided() - 0.5) for n, w, c, b in zip(noise, gain, bend, alone, strict=True)]
        for bank, pull, cost in zip(alone, pulls, price, strict=True):
            _step(bank, pull, cost)
        _step(joint, joint.together(pulls), joint.together(price))
    assert sum(int(bank.flips.sum()) for bank in alone) > 10
    for i, (bank, other) in enumerate(zip(alone, together, strict=True)):
        assert torch.equal(joint.part(joint.open, i), bank.open)
        for (name, own), theirs in zip(bank.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(theirs, own, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_banks_that_were_moved_or_copied_are_joined_anew():
    net = sbs.prepare(networks.Residual(), sbs.SearchSpace(group_size=2), torch.zeros(1, 3, 8, 8))
    joint = net.joint_bank()
    assert net.joint_bank() is joint
    net.double()
    assert net.joint_bank() is not joint
    other = copy.deepcopy(net)
    for each in (net, other):
        with torch.no_grad():
            each.joint_bank().thresholds.fill_(2.0 if each is net else 3.0)
    assert {float(bank.thresholds.max()) for bank in net.banks()} == {2.0}
    assert {float(bank.thresholds.min()) for bank in other.banks()} == {3.0}
    assert joined(net.banks(), net.joint_bank()) is net.joint_bank()
