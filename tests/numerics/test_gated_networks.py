"""Gates in a network: one step of a layer at a time, rest at the end, and a search that goes on from its state dict."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import sbs
from sbs.gates import PACE
from tests.numerics import networks

SIZE, STEPS = 8, 60


def _net(**space: object) -> sbs.SuperNet:
    """Calibrated, all gates open, always the same."""
    torch.manual_seed(0)
    net = sbs.prepare(
        networks.randomise(networks.Residual(), 1),
        sbs.SearchSpace(group_size=2, **space),
        torch.zeros(1, 3, SIZE, SIZE),
    )
    sbs.calibrate(net, [networks.images(8, SIZE, 1)])
    return net.train()


def _train(net: sbs.SuperNet, steps: range, pressure: float, loss_scale: float = 1.0) -> None:
    """Steps of a search of `STEPS`; what multiplies the loss the learning rate takes back."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05 / loss_scale)
    for step in steps:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(networks.images(10, SIZE, 100 + step)), torch.arange(10) % 5)
        (loss_scale * (loss + pressure * sbs.bop_penalty(net))).backward()
        optimizer.step()
        sbs.after_step(net, steps=STEPS, loss_scale=loss_scale)


def _press(net: sbs.SuperNet, steps: int, pressure: float = 1.0) -> None:
    """A step in which the loss says nothing and BOPs are all that counts."""
    (pressure * sbs.bop_penalty(net)).backward()
    sbs.after_step(net, steps=steps)


def _bits(net: sbs.SuperNet) -> list[list[int]]:
    """Of every layer, weights and activations."""
    layers = sbs.freeze(net).layers
    return [[getattr(layer, f"{side}_bits") for layer in layers] for side in ("weight", "activation")]


def test_layers_lose_one_step_of_bits_at_a_time():
    """Under nothing but pressure: from 8 to 2 bits by way of 4, and each for a while."""
    net = _net()
    seen = []
    for _ in range(200):
        _press(net, 200)
        seen.append([*itertools.chain(*_bits(net))])
    assert set(seen[-1]) == {2, 8}  # first and last layers keep theirs
    for layer in zip(*seen, strict=True):
        path = [bits for bits, _ in itertools.groupby(layer)]
        assert path in ([8], [8, 4, 2])
        if len(path) > 1:
            assert layer.count(4) >= 200 * PACE.hold


def test_a_step_below_the_highest_open_one_waits_for_it():
    """Two thresholds beyond their statistics at once, as when these fall: the layer still takes one step after another.

    And a step above a closed one does not open before it.
    """
    net = _net(prune=False)
    bank = net.weight_gates
    for margin, path in ((-0.5, [4, 2]), (0.9, [4, 8])):
        for bits in path:
            with torch.no_grad():
                bank.thresholds[0] = bank.statistic[0] - margin
            sbs.after_step(net)
            assert _bits(net)[0][1] == bits


def test_at_the_end_of_a_search_no_gate_moves_whatever_its_threshold_says():
    net = _net()
    steps = 20
    while not sbs.at_rest(int(net.steps_done), steps):
        _press(net, steps)
    opened = [bank.open.clone() for bank in net.banks()]
    flips = [bank.flips.clone() for bank in net.banks()]
    assert any(not gates.all() for gates in opened)
    with torch.no_grad():
        for bank in net.banks():
            bank.thresholds.copy_(bank.statistic + torch.where(bank.open > 0, 1.0, -bank.statistic))
    before = [bank.thresholds.clone() for bank in (net.weight_gates, net.activation_gates)]
    for _ in range(2 * steps):  # also beyond the steps that were told
        _press(net, steps)
    for bank, gates, count in zip(net.banks(), opened, flips, strict=True):
        assert torch.equal(bank.open, gates)
        assert torch.equal(bank.flips, count)
    for bank, thresholds in zip((net.weight_gates, net.activation_gates), before, strict=True):
        torch.testing.assert_close(bank.thresholds, thresholds)


@pytest.mark.parametrize("gradient", ["weights", "activations"])
def test_gates_that_the_penalty_leaves_alone_stay_where_they_are(gradient):
    net = _net()
    for _ in range(STEPS // 2):
        sbs.bop_penalty(net, gradient=gradient).backward()
        sbs.after_step(net, steps=STEPS)
    moved = {side: bool(getattr(net, f"{side}_gates").thresholds.any()) for side in ("weight", "activation", "channel")}
    assert moved == {"weight": gradient == "weights", "activation": gradient == "activations", "channel": True}


def test_a_loss_that_was_scaled_for_half_precision_is_the_same_search():
    """By a power of two, which rounds nothing: the same network to the bit."""
    nets = _net(), _net()
    for net, scale in zip(nets, (1.0, 2.0**14), strict=True):
        _train(net, range(STEPS // 2), 0.05, scale)
    assert all(bank.flips.any() for bank in nets[0].banks())
    for (name, ours), theirs in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_search_goes_on_from_its_state_dict_to_the_bit(tmp_path):
    """In the middle, with gates of every kind that have flipped and others on their way."""
    net = _net()
    _train(net, range(2 * STEPS // 5), 0.05)
    assert all(bank.flips.any() for bank in net.banks())
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = sbs.prepare(networks.Residual(), net.space, torch.zeros(1, 3, SIZE, SIZE)).train()
    again.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    before = [bank.flips.sum() for bank in net.banks()]
    for each in (net, again):
        _train(each, range(2 * STEPS // 5, STEPS), 0.05)
    assert sum(bank.flips.sum() for bank in net.banks()) > sum(before)
    for (name, ours), theirs in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
