"""Whole super-networks against chains written by hand: loss, every gradient, BOPs, and the next step's statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sbs
from sbs.bops import prices
from sbs.gates import movable
from tests.numerics import networks, oracle, states
from tests.numerics.chain_networks import CHAINS

SIZE = 8


def _macs(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, _, out, name=name: counts.__setitem__(name, out[0].numel() * m.weight[0].numel())
            )
    model.eval()(torch.zeros(1, 3, SIZE, SIZE))
    return counts


def _pair(kind: str, seed: int, **space):
    torch.manual_seed(seed)
    model = networks.USER_NETWORKS[kind]()
    space = {"group_size": 2, "max_prune_share": 0.9} | space
    net = states.searched(model, SIZE, seed=seed, dtype=torch.float64, absorb_relus=True, **space)
    net.train()
    return net, CHAINS[kind](net, _macs(networks.USER_NETWORKS[kind]()))


def _by_gates(net, banks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is known of the gates, in the order of `SuperNet.banks()`, under the chain's names."""
    named = {}
    for side, values in zip(("weight", "activation"), banks, strict=False):
        named |= {f"{side} thresholds of {name}": values[row] for row, name in enumerate(net.searched)}
    for group, (start, stop) in zip(net.graph.groups, net.group_slices, strict=True):
        named[f"gates of {group.root}"] = banks[2][start:stop]
    return named


def _statistic(name: str) -> str:
    """Under which name a chain has the statistics of the gates that it has the thresholds of under this one."""
    return name.replace("thresholds of ", "")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", CHAINS)
def test_loss_and_every_gradient(kind, seed):
    net, chain = _pair(kind, seed)
    assert 0 < net.channel_gates.open.mean() < 1
    x, y = networks.images(4, SIZE, 99 + seed, torch.float64), torch.arange(4) % 5
    gradient = ("joint", "weights", "activations")[seed]

    want = chain.forward(x)
    F.cross_entropy(want, y).backward()
    got = net(x)
    penalty = sbs.bop_penalty(net, gradient=gradient)
    (F.cross_entropy(got, y) + 0.3 * penalty).backward()

    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert penalty.item() == pytest.approx(chain.log_bops().item(), rel=1e-6)
    leaves = {name: p.grad for name, p in net.model.named_parameters()}
    leaves |= _by_gates(net, [bank.pull for bank in net.banks()])
    compared = 0
    for name, leaf in chain.leaves.items():
        if name == f"{chain.order[0]}.activation_clip":
            continue  # the image's clip is calibrated, not learnt
        if leaf.grad is None or leaf.numel() == 0:
            assert leaves[name] is None or not leaves[name].any(), name
            continue
        felt = oracle.gate_gradient(chain.statistics[_statistic(name)], leaf) if "of" in name.split() else leaf.grad
        torch.testing.assert_close(leaves[name].double(), felt, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        compared += bool(leaf.grad.abs().sum() > 0)
    assert compared >= 25
    felt = {"joint": (1, 1, 1), "weights": (1, 0, 1), "activations": (0, 1, 1)}[gradient]
    assert net.pressure.tolist() == pytest.approx([0.3 * side for side in felt])


@pytest.mark.parametrize("kind", CHAINS)
def test_prices_are_what_closing_or_opening_each_single_gate_changes(kind):
    """Of log BOPs, counted out by the chain with one threshold moved past its statistic, either way."""
    net, chain = _pair(kind, 1)
    found = _by_gates(net, prices(net, [bank.decided() for bank in net.banks()]))
    told = {name: leaf for name, leaf in chain.leaves.items() if "of" in name.split()}
    assert told.keys() == found.keys()
    behind = 0
    for name, leaf in told.items():
        for gate in range(leaf.numel()):
            before, costs = leaf[gate].item(), []
            for away in (1.0, -1.0):
                with torch.no_grad():
                    leaf[gate] = chain.statistics[_statistic(name)][gate] + away
                costs.append(chain.log_bops().item())
            with torch.no_grad():
                leaf[gate] = before
            assert found[name][gate].item() == pytest.approx(costs[1] - costs[0], rel=1e-9, abs=1e-12), (name, gate)
            behind += costs[0] == costs[1]
    assert 0 < behind < sum(leaf.numel() for leaf in told.values()) / 2  # gates behind a closed one cost nothing


@pytest.mark.parametrize("kind", CHAINS)
def test_statistics_after_a_step(kind):
    """Activation statistics move by one momentum towards the batch's; weight and group statistics are exact at once."""
    net, chain = _pair(kind, 3)
    before = {name: chain.statistics[f"activation {name}"] for name in chain.order[1:-1]}
    x = networks.images(4, SIZE, 7, torch.float64)
    with torch.no_grad():
        chain.forward(x)
    net(x)
    with torch.no_grad():  # what an optimiser would do: statistics of the weights are those after the step
        for name in chain.order:
            noise = torch.randn(chain.leaves[f"{name}.weight"].shape, dtype=torch.float64) * 0.05
            chain.leaves[f"{name}.weight"] += noise
            net.model.get_submodule(name).weight += noise
    sbs.after_step(net)
    rates = []
    for row, name in enumerate(chain.order[1:-1]):
        moved = net.activation_gates.statistic[row] - before[name]
        rates += (moved / (chain.seen[name] - before[name])).tolist()
        torch.testing.assert_close(net.weight_gates.statistic[row], chain.weight_statistics(name), rtol=1e-9, atol=1e-9)
    assert rates == pytest.approx([rates[0]] * len(rates), rel=1e-6)
    assert 0 < rates[0] < 1
    for group, (start, stop) in zip(net.graph.groups, net.group_slices, strict=True):
        want = oracle.pruning_statistics(chain.leaves[f"{group.root}.weight"], net.space.group_size)
        torch.testing.assert_close(net.channel_gates.statistic[start:stop], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", CHAINS)
def test_penalty_is_the_log_of_the_cost_of_the_frozen_network(kind):
    net, _ = _pair(kind, 4)
    report = sbs.cost(net, (3, SIZE, SIZE))
    assert sbs.bop_penalty(net).exp().item() == pytest.approx(report.bops, rel=1e-5)
    assert sbs.cost(networks.USER_NETWORKS[kind](), (3, SIZE, SIZE), sbs.freeze(net)).bops == report.bops


def test_thresholds_are_pushed_up_by_the_penalty_and_a_closed_group_still_feels_the_loss():
    net, _ = _pair("residual", 5)
    before = [bank.thresholds.clone() for bank in net.banks()]
    for bank in net.banks():  # as if every gate had been heard for long, and had said nothing
        bank.weight_open.fill_(1.0)
        bank.weight_closed.fill_(1.0)
    costs = [price > 0 for price in prices(net, [bank.decided() for bank in net.banks()])]
    sbs.bop_penalty(net).backward()
    sbs.after_step(net)
    for bank, start, dear, can in zip(
        net.banks(), before, costs, [movable(bank.open) for bank in net.banks()], strict=True
    ):
        assert (dear & can).any()
        assert (bank.thresholds[dear & can] > start[dear & can]).all()
        assert torch.equal(bank.thresholds[~(dear & can)], start[~(dear & can)])
    x, y = networks.images(4, SIZE, 1, torch.float64), torch.arange(4) % 5
    F.cross_entropy(net(x), y).backward()
    closed = net.channel_gates.open == 0
    assert closed.any()
    assert (net.channel_gates.pull[closed] != 0).all()
