"""The pressure that leads to a budget, against a count by hand of what closes under each one."""

from __future__ import annotations

import math

import pytest
import torch

import sbs
from tests.numerics.test_landing import SIZE, WIDTH, Narrow, narrow_bops

STEP = 10 ** (8 / 127)  # between the pressures that are tried, eight powers of ten in 128


@torch.no_grad()
def _tried(seed: int) -> tuple[sbs.SuperNet, list[list[float]]]:
    """A network whose gates are all open, and what each of them saves: known from both sides, of all sizes."""
    torch.manual_seed(0)
    net = sbs.prepare(Narrow(), sbs.SearchSpace(group_size=2), torch.zeros(1, 3, SIZE, SIZE))
    generator, saved = torch.Generator().manual_seed(seed), []
    for bank in net.banks():
        values = 10 ** (-2 * torch.rand(bank.open.shape, generator=generator))
        bend = torch.rand(bank.open.shape, generator=generator)
        bank.slope_open.copy_(-values + bend)
        bank.slope_closed.copy_(-values - bend)
        bank.weight_open.fill_(1.0)
        bank.weight_closed.fill_(1.0)
        saved.append(values.flatten().tolist())
    return net, saved


def _worths(saved: list[list[float]]) -> list[list[float]]:
    """Loss per log BOPs of every gate, all others being open: steps to 4 and 8 bits of two layers, and four groups."""
    most = math.log(narrow_bops((8, 8), (8, 8), WIDTH))
    weight, activation, groups = saved
    with_bits = {0: (2, 8), 1: (4, 8), 2: (8, 2), 3: (8, 4)}
    costs = [
        [most - math.log(narrow_bops(with_bits[i], (8, 8), WIDTH)) for i in range(4)],
        [most - math.log(narrow_bops((8, 8), with_bits[i], WIDTH)) for i in range(4)],
        [most - math.log(narrow_bops((8, 8), (8, 8), WIDTH - 2))] * 4,
    ]
    return [
        [s / c for s, c in zip(*pair, strict=True)] for pair in zip((weight, activation, groups), costs, strict=True)
    ]


def _settled(worths: list[list[float]], pressure: float) -> int:
    """BOPs once every gate that is worth no more than the pressure is closed; half of the groups stay at least."""

    def bits(to_4: float, to_8: float) -> int:
        return 2 if to_4 <= pressure else 4 if to_8 <= pressure else 8

    sides = [(bits(*side[:2]), bits(*side[2:])) for side in worths[:2]]
    groups = max(2, sum(worth > pressure for worth in worths[2]))
    return narrow_bops(*sides, kept=2 * groups)


@pytest.mark.parametrize("seed", range(4))
def test_the_pressure_for_a_budget_is_the_least_that_meets_it(seed):
    net, saved = _tried(seed)
    worths = _worths(saved)
    low, high = sbs.bops_range(net)
    for place in (0.02, 0.2, 0.4, 0.6, 0.8, 0.98):
        goal = low * (high / low) ** place
        found = float(sbs.pressure_for(net, torch.tensor(goal, dtype=torch.float64).log()))
        least = min(worth for side in worths for worth in side if _settled(worths, worth) <= goal)
        assert least * (1 - 1e-6) <= found <= least * STEP * (1 + 1e-6)
        assert _settled(worths, found) <= goal


def test_budgets_out_of_reach_get_the_ends_of_the_scale():
    net, _ = _tried(0)
    low, high = sbs.bops_range(net)
    for goal, end in ((0.5 * low, 1e3), (2.0 * high, 1e-5)):
        assert float(sbs.pressure_for(net, torch.tensor(goal, dtype=torch.float64).log())) == pytest.approx(end)
