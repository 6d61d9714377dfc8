"""A search on real digits: more pressure gives fewer bit-operations, by lower bits and by pruning."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import sbs
from tests.numerics import networks

LAMBDAS = (0.0, 0.03, 0.3, 1.0, 3.0)
EPOCHS, BATCH = 5, 120


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """1797 digits of 8x8 pixels as three equal channels, zero mean, unit variance."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    return ((x - x.mean()) / x.std()).expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels)


def _epochs(net: nn.Module, data: tuple[Tensor, Tensor], count: int, penalty: float | None) -> None:
    groups = sbs.param_groups(net)
    rates = {"decay": 0.05, "no_decay": 0.05, "clips": 0.005}
    optimizer = torch.optim.SGD([{"params": p, "lr": rates[k]} for k, p in groups.items() if p], momentum=0.9)
    order = torch.Generator().manual_seed(1)
    net.train()
    batches = [index for _ in range(count) for index in torch.randperm(len(data[0]), generator=order).split(BATCH)]
    for step, index in enumerate(batches):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(data[0][index]), data[1][index])
        if penalty is not None:
            loss = loss + penalty * sbs.bop_penalty(net, gradient=("weights", "activations")[step % 2])
        loss.backward()
        optimizer.step()
        sbs.after_step(net, steps=len(batches))


def _top1(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return (net.eval()(data[0]).argmax(1) == data[1]).float().mean().item() * 100


@pytest.fixture(scope="module")
def frontier(digits) -> dict[float, tuple[sbs.Policy, float, float]]:
    """Per lambda: policy, BOPs, top-1 of one search from the same start; the gates begin all open."""
    before = sbs.use_compiled(False)
    torch.manual_seed(0)
    model = networks.Residual(num_classes=10)
    _epochs(model, digits, 2 * EPOCHS, None)
    assert _top1(model, digits) > 90
    results = {}
    for penalty in LAMBDAS:
        torch.manual_seed(0)
        net = sbs.prepare(model, sbs.SearchSpace(group_size=2), digits[0][:1])
        sbs.calibrate(net, [digits[0][:240]])
        _epochs(net, digits, EPOCHS, penalty)
        policy = sbs.freeze(net)
        results[penalty] = policy, sbs.cost(model, (3, 8, 8), policy).bops, _top1(net, digits)
    sbs.use_compiled(before)
    return results


def test_bops_fall_as_lambda_grows(frontier):
    bops = [frontier[penalty][1] for penalty in LAMBDAS]
    assert all(low >= high for low, high in itertools.pairwise(bops)), bops
    assert bops[0] >= 4 * bops[-1]
    assert len(set(bops)) >= 3


def test_a_search_reaches_both_bits_and_pruning(frontier):
    layers = frontier[LAMBDAS[-1]][0].layers[1:-1]
    assert min(layer.weight_bits for layer in layers) < 8
    assert min(layer.activation_bits for layer in layers) < 8
    assert any(layer.kept for layer in layers)


def test_without_pressure_no_gate_moves_and_under_some_the_network_still_knows_its_digits(frontier):
    policy, most, top1 = frontier[0.0]
    assert {(layer.weight_bits, layer.activation_bits, layer.kept) for layer in policy.layers} == {(8, 8, None)}
    assert top1 > 90
    _, bops, top1 = frontier[0.3]
    assert bops < most / 3
    assert top1 > 90


def test_a_plain_loop_with_one_optimiser_and_one_rate_compresses(digits):
    """Nothing to set but lambda and how many steps there are."""
    torch.manual_seed(0)
    net = sbs.prepare(networks.Residual(num_classes=10), sbs.SearchSpace(group_size=2), digits[0][:1])
    sbs.calibrate(net, [digits[0][:240]])
    optimizer = torch.optim.Adam(net.train().parameters(), lr=0.01)
    batches = torch.randperm(len(digits[0])).split(60) * 4
    for index in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(digits[0][index]), digits[1][index]) + 0.3 * sbs.bop_penalty(net)
        loss.backward()
        optimizer.step()
        sbs.after_step(net, steps=len(batches))
    policy = sbs.freeze(net)
    small = sbs.compress(net, policy)
    assert sbs.bops_of(net) == sbs.cost(networks.Residual(num_classes=10), (3, 8, 8), policy).bops
    assert sbs.bops_of(net) < sbs.bops_range(net)[1] / 4
    assert _top1(small, digits) > 90


@pytest.mark.parametrize(
    ("space", "bits", "prunes"),
    [
        ({"prune": False}, True, False),
        ({"weight_bits": (8,), "activation_bits": (8,)}, False, True),
        ({"weight_bits": (32,), "activation_bits": (32,)}, False, True),
    ],
    ids=["quantise only", "prune only at 8 bits", "prune only"],
)
def test_ablations_by_switch_move_only_what_they_may(digits, space, bits, prunes):
    torch.manual_seed(0)
    model = networks.randomise(networks.Residual(num_classes=10), 1)
    net = sbs.prepare(model, sbs.SearchSpace(group_size=2, **space), digits[0][:1])
    sbs.calibrate(net, [digits[0][:240]])
    start = [(c.weight_bits, c.activation_bits) for c in sbs.freeze(net).layers]
    _epochs(net, digits, 2, 3.0)
    end = sbs.freeze(net).layers
    assert ([(c.weight_bits, c.activation_bits) for c in end] != start) is bits
    assert any(c.kept for c in end) is prunes
    moved = [bool(bank.flips.any()) for bank in net.banks()]
    assert moved == [bits, bits, prunes]
