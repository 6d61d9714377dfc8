"""What after_step keeps within bounds, when gates flip, and which parameters an optimiser is given."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sbs
from sbs.gates import PACE
from tests.numerics import networks, states

SIZE = 8


@pytest.fixture
def net() -> nn.Module:
    """A super-network with groups of one channel, calibrated, all gates open."""
    net = sbs.prepare(
        networks.randomise(networks.Residual(), 1), sbs.SearchSpace(group_size=1), torch.zeros(1, 3, 8, 8)
    )
    sbs.calibrate(net, [networks.images(8, SIZE, 1)])
    return net


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_at_most_a_set_share_of_a_layer_closes_and_the_strongest_groups_stay(share):
    space = sbs.SearchSpace(group_size=1, max_prune_share=share)
    net = sbs.prepare(networks.randomise(networks.Residual(), 1), space, torch.zeros(1, 3, 8, 8))
    sbs.calibrate(net, [networks.images(8, SIZE, 1)])
    with torch.no_grad():
        net.channel_gates.thresholds.fill_(3.0)  # statistics lie about 1
    for _ in range(3):
        sbs.after_step(net)
    for name in ("conv_a", "conv_c"):
        weight = net.model.get_submodule(name).weight.detach()
        strength = weight.abs().flatten(1).mean(1)
        kept = sbs.freeze(net).layer(name).kept or tuple(range(len(weight)))
        assert len(kept) == len(weight) - int(share * len(weight))
        assert set(kept) == set(strength.topk(len(kept)).indices.tolist())


def test_thresholds_and_clips_are_clamped(net):
    start = {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith("_clip")}
    with torch.no_grad():
        net.weight_gates.thresholds.fill_(-5.0)
        net.activation_gates.thresholds.fill_(50.0)
        net.channel_gates.thresholds.fill_(-5.0)
        for name in start:
            net.get_parameter(name).fill_(-1.0)
    sbs.after_step(net)
    assert (net.weight_gates.thresholds == 0).all()
    assert torch.equal(net.activation_gates.thresholds, net.activation_gates.statistic + 1)
    assert (net.channel_gates.thresholds == 0).all()
    for name, value in start.items():
        torch.testing.assert_close(net.get_parameter(name).detach(), 1e-3 * value)


def test_every_pruning_threshold_can_pass_its_own_statistic_so_that_every_group_could_close(net):
    """By hand: it ends 1 above the statistic; the rest as it was set."""
    bank, (start, stop) = net.channel_gates, net.group_slices[0]
    strongest = start + int(bank.statistic[start:stop].argmax())
    with torch.no_grad():
        bank.thresholds[start:stop] = 0.125
        bank.thresholds[strongest] = 100.0
        bank.thresholds[stop:] = 0.25
    sbs.after_step(net)
    assert bank.thresholds[strongest] == bank.statistic[strongest] + 1
    others = [gate for gate in range(start, stop) if gate != strongest]
    assert (bank.thresholds[others] == 0.125).all()
    assert (bank.thresholds[stop:] == 0.25).all()
    assert bank.open[start:stop].tolist() == [float(gate != strongest) for gate in range(start, stop)]


def test_thresholds_of_groups_that_are_held_open_are_no_higher_than_their_statistic(net):
    """Else they would have to come all the way back before another group could take their place."""
    bank = net.channel_gates
    with torch.no_grad():
        bank.thresholds.fill_(100.0)
    sbs.after_step(net)
    held = bank.open == 1
    assert held.any()
    assert (bank.thresholds[held] <= bank.statistic[held]).all()


def test_a_group_that_closes_leaves_the_moments_of_the_next_pass(net):
    """Standardised are the weights that are kept: the next pass must not use moments from before."""
    x = networks.images(8, SIZE, 2)
    net.train()(x)
    with torch.no_grad():
        net.channel_gates.thresholds[net.channel_gates.statistic.argmax()] = 100.0
    sbs.after_step(net)
    assert (net.channel_gates.open == 0).any()
    fresh = sbs.prepare(networks.Residual(), net.space, torch.zeros(1, 3, 8, 8))
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(net(x), fresh.train()(x))


def test_two_passes_before_a_step_count_as_one_batch(net):
    """As when gradients are accumulated; in float64, batch norms on their running statistics."""
    nets = [net.double().train(), copy.deepcopy(net)]
    for each in nets:
        for m in each.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
    x = networks.images(8, SIZE, 2, torch.float64)
    nets[0](x)
    nets[1](x[:3]), nets[1](x[3:])
    for each in nets:
        sbs.after_step(each)
    torch.testing.assert_close(nets[0].activation_gates.statistic, nets[1].activation_gates.statistic)


def test_statistics_of_channel_groups_by_hand():
    """Groups of three on 8 channels: mean |w| of each, the last one of two, over their mean."""
    net = sbs.prepare(
        networks.randomise(networks.Residual(), 1), sbs.SearchSpace(group_size=3), torch.zeros(1, 3, 8, 8)
    )
    sbs.calibrate(net, [networks.images(8, SIZE, 1)])
    start, stop = net.group_slices[0]
    weight = net.model.get_submodule(net.graph.groups[0].root).weight.detach()
    means = torch.stack([part.abs().mean() for part in weight.split(3)])
    torch.testing.assert_close(net.channel_gates.statistic[start:stop], means / means.mean())


def test_a_gate_closes_and_opens_again_with_its_threshold_and_flips_are_counted(net):
    """By hand: the band within which a gate stays as it is grows by a factor of its own with every flip."""
    bank = net.weight_gates
    steps = [  # margin in first bands, open, flips
        (-0.9, 1, 0),
        (-1.1, 0, 1),
        (-1.1, 0, 1),
        (0.9 * PACE.widening, 0, 1),
        (1.1 * PACE.widening, 1, 2),
        (-1.1 * PACE.widening, 1, 2),
        (-0.9 * PACE.widening**2, 1, 2),
        (-1.1 * PACE.widening**2, 0, 3),
    ]
    for bands, opened, flips in steps:
        with torch.no_grad():
            bank.thresholds[0, 1] = bank.statistic[0, 1] - bands * PACE.band
        sbs.after_step(net)
        assert bank.open[0, 1] == opened
        assert bank.flips[0, 1] == bank.flips.sum() == flips


def test_a_statistic_that_trembles_about_its_threshold_does_not_flip_the_gate(net):
    bank = net.weight_gates
    for sign in (1, -1, 1, -1):
        with torch.no_grad():
            bank.thresholds[0, 0] = bank.statistic[0, 0] + sign * 0.5 * PACE.band
        sbs.after_step(net)
    assert not bank.flips.any()


def test_without_a_forward_pass_the_activation_statistics_stay(net):
    before = net.activation_gates.statistic.clone()
    sbs.after_step(net)
    assert torch.equal(net.activation_gates.statistic, before)


def test_evaluation_selects_bits_by_the_same_buffers_and_changes_none(net):
    """And a step without gradients changes but the time, and how long gates have been listened to."""
    before = {n: b.clone() for n, b in net.named_buffers()}
    with torch.no_grad():
        net.eval()(10 * networks.images(8, SIZE, 2))
    for name, value in net.named_buffers():
        assert torch.equal(value, before[name]), name
    sbs.after_step(net, steps=100)
    for name, value in net.named_buffers():
        if name == "steps_done" or name.endswith(".age"):
            torch.testing.assert_close(value, before[name] + (1 if name == "steps_done" else 0.01))
        elif not name.endswith((".weight_open", ".window")):
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["float", "super-network", "compressed"])
def test_param_groups_hold_every_parameter_once(net, kind):
    model = {"float": networks.Inverted(), "super-network": net, "compressed": sbs.compress(net, sbs.freeze(net))}[kind]
    groups = sbs.param_groups(model)
    assert set(groups) == {"decay", "no_decay", "clips"}
    members = [p for group in groups.values() for p in group]
    assert len({id(p) for p in members}) == len(members)
    assert {id(p) for p in members} == {id(p) for p in model.parameters() if p.numel()}
    assert all(p.dim() >= 2 for p in groups["decay"])
    expected = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {id(p) for p in groups["decay"]} == expected
    assert not any("gates" in name for name, _ in model.named_parameters())
    assert bool(groups["clips"]) is (kind != "float")


def test_telemetry_tells_shares_by_hand():
    net = states.searched(networks.Residual(), SIZE, seed=3, group_size=2)
    told = sbs.telemetry(net)
    assert all(isinstance(v, float) for v in told.values())
    assert told["gates/open_weight_4"] == pytest.approx(net.weight_gates.open[:, 0].mean().item())
    reached = [c.activation_bits == 8 for c in sbs.freeze(net).layers[1:-1]]  # a closed step closes those above it
    assert told["gates/open_activation_8"] == pytest.approx(sum(reached) / len(reached))
    bits = [c.weight_bits for c in sbs.freeze(net).layers[1:-1]]
    assert told["gates/mean_weight_bits"] == pytest.approx(sum(bits) / len(bits))
    banks = (net.weight_gates, net.activation_gates, net.channel_gates)
    assert told["gates/flips"] == sum(int(b.flips.sum()) for b in banks) > 0
    gates = net.channel_gates.open.tolist()
    assert told["gates/open_channel"] == pytest.approx(sum(gates) / len(gates))
    assert 0 < told["gates/open_channel"] != 0.5
    for side, bank in zip(("weight", "activation", "channel"), banks, strict=True):
        away = [abs(s - t) for s, t in zip(bank.statistic.flatten(), bank.thresholds.flatten(), strict=True)]
        assert told[f"gates/margin_{side}"] == pytest.approx(min(away).item())


def test_margins_name_every_gate():
    net = states.searched(networks.Residual(), SIZE, seed=3, group_size=2)
    margins = sbs.margins(net)
    assert list(margins) == ["conv_a", "conv_b", "conv_c", "conv_d", "short"]
    assert {len(gates["weight"]) for gates in margins.values()} == {2}
    assert {name: len(gates["channel"]) for name, gates in margins.items() if "channel" in gates} == {
        "conv_a": 4,
        "conv_c": 8,
    }
    row = net.searched.index("conv_d")
    bank, channels = net.activation_gates, net.channel_gates
    for j in range(2):
        away = bank.statistic[row, j] - bank.thresholds[row, j]
        assert margins["conv_d"]["activation"][j] == pytest.approx(away.item())
    assert margins["conv_c"]["channel"][-1] == pytest.approx((channels.statistic[-1] - channels.thresholds[-1]).item())
    alone = sbs.prepare(networks.Residual(), sbs.SearchSpace((8,), (8,), prune=False), torch.zeros(1, 3, 8, 8))
    assert sbs.margins(alone) == {}


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_weights_replaced_through_data_are_standardised_anew(prune, mode):
    """The idioms of averaged weights, `p.data.copy_(average)` before an evaluation, and of projections in training."""
    model = networks.randomise(networks.Residual(), 1)
    net = sbs.prepare(model, sbs.SearchSpace(prune=prune), torch.zeros(1, 3, SIZE, SIZE))
    x = networks.images(8, SIZE, 1)
    sbs.calibrate(net, [x])
    net.train()(x)
    sbs.after_step(net)
    for p in net.model.parameters():
        p.data.copy_(p.data * 0.5 + 0.1 * p.data.abs())
    fresh = sbs.prepare(model, sbs.SearchSpace(prune=prune), torch.zeros(1, 3, SIZE, SIZE))
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(net.train(mode == "train")(x), fresh.train(mode == "train")(x))
