"""Gates by themselves, each with a loss written down: which of them close, how often they flip, and at what pace.

Every gate has its own L(g) with L(0) - L(1) known, as a pull dL/dg that depends on where the gate stands. For a
parabola the mean of both slopes is exact, so the right answer is known: closed if the price exceeds L(0) - L(1).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sbs.gates import PACE, GateBank, Pace, movable, selected


@dataclass(frozen=True)
class Losses:
    """L(g) = -worth * g + curve / 2 * (g**2 - g) of every gate, and the noise of its measured slope; all (gates,).

    L(0) - L(1) is `worth`, whatever `curve`. curve > 0: closed a gate is missed more than it is felt while open.
    """

    worth: Tensor
    curve: Tensor
    noise: Tensor

    def slope(self, gates: Tensor) -> Tensor:
        return -self.worth + self.curve * (gates - 0.5)


def _drawn(count: int, seed: int) -> tuple[Losses, Tensor]:
    """Losses and prices of all sizes."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=g) * (high - low) + low

    size = 10 ** uniform(-4, 2)
    worth = size * uniform(-0.3, 1.0)
    losses = Losses(worth, size * uniform(0, 6), size * uniform(0, 0.5))
    return losses, (size * uniform(0.05, 2.0)).double()


@dataclass(frozen=True)
class Searched:
    """A bank at the end of a search, and its gates after every step: (steps, gates)."""

    bank: GateBank
    open: Tensor


def _search(
    losses: Losses,
    price: Tensor,
    steps: int,
    *,
    bank: GateBank | None = None,
    pace: Pace = PACE,
    scale: float = 1.0,
    tremble: float = 0.01,
) -> Searched:
    """A whole search in which the statistics tremble about 1; loss and price times `scale`."""
    g = torch.Generator().manual_seed(1)
    bank = bank or GateBank(len(price))
    share, everyone = torch.tensor(1.0 / steps, dtype=torch.float64), torch.ones(len(price)) > 0
    history = []
    for step in range(steps):
        bank.statistic.copy_(1 + tremble * torch.randn(len(price), generator=g))
        noise = losses.noise * torch.randn(len(price), generator=g)
        bank.pull += scale * (losses.slope(bank.decided()) + noise)
        rate = pace.rate(step * share)
        wanted = torch.where(rate > 0, bank.wanted(pace), bank.decided())
        bank.weigh(everyone, share, pace)
        bank.commit(wanted, share)
        bank.move(scale * price, everyone, share, rate, pace)
        history.append(bank.decided())
    return Searched(bank, torch.stack(history))


class OneSided(GateBank):
    """Follows the slope of the side that each gate is on, as a straight-through gradient does."""

    def slope(self) -> Tensor:
        return torch.where(self.decided() > 0, self.slope_open, self.slope_closed)


def _balance(price: Tensor, slope: Tensor) -> Tensor:
    """How clearly the one outweighs the other, from -1 to 1."""
    return (price + slope) / (price + slope.abs())


def _clear(losses: Losses, price: Tensor) -> Tensor:
    """Gates whose case is clear, at once and on both sides together; the rest may lack the time to come round."""
    at_once, for_good = _balance(price, losses.slope(torch.ones(len(price)))), _balance(price, -losses.worth)
    return (at_once.abs() > 0.3) & (for_good.abs() > 0.3)


@pytest.mark.parametrize("seed", range(3))
def test_a_gate_closes_for_good_exactly_if_its_price_exceeds_what_the_loss_would_lose(seed):
    losses, price = _drawn(1000, seed)
    found = _search(losses, price, 500)
    right = (price > losses.worth) == (found.bank.open == 0)
    clear = _clear(losses, price)
    assert clear.float().mean() > 0.6
    assert right[clear].all()
    assert right.float().mean() > 0.95
    # they close, for open they are hardly felt, and open again
    came_back = clear & (price > -losses.slope(torch.ones(1000))) & (price < losses.worth)
    assert came_back.sum() > 50
    assert (found.bank.flips[came_back] == 2).all()
    assert found.bank.flips.max() <= 3


def test_gates_that_follow_one_side_alone_run_in_circles():
    """What the mean of both sides is for; in bands that do not widen, which hold even circles up in the end."""
    losses, price = _drawn(1000, 3)
    circling = (price > -losses.slope(torch.ones(1000))) & (price < -losses.slope(torch.zeros(1000)))
    assert circling.sum() > 100
    pace = replace(PACE, widening=1.0)
    assert _search(losses, price, 500, pace=pace, bank=OneSided(1000)).bank.flips[circling].median() >= 6
    assert _search(losses, price, 500, pace=pace).bank.flips[circling].median() <= 2


def test_the_pace_does_not_depend_on_the_number_of_steps():
    """The same gates flip, as often and at the same share of the search, in 200 and in 2,000 steps."""
    losses, price = _drawn(1000, 4)
    silent = replace(losses, noise=torch.zeros(1000))
    short, long = (_search(silent, price, steps, tremble=0.0) for steps in (200, 2000))
    clear = _clear(losses, price)
    assert torch.equal(short.bank.open[clear], long.bank.open[clear])
    assert torch.equal(short.bank.flips[clear], long.bank.flips[clear])
    assert (short.bank.flips[clear] == 2).any()
    assert (short.bank.flips[clear] == 0).any()
    closed = [1 - found.open.mean(dim=0)[clear] for found in (short, long)]  # share of the search
    torch.testing.assert_close(*closed, rtol=0, atol=PACE.hold + 2 / 200)


@pytest.mark.parametrize("exponent", [-20, 20])
def test_the_scale_of_loss_and_price_together_does_not_matter(exponent):
    """A power of two, which rounds nothing: every threshold ends where it did, to the bit."""
    losses, price = _drawn(500, 5)
    plain, scaled = (_search(losses, price, 200, scale=scale) for scale in (1.0, 2.0**exponent))
    assert torch.equal(plain.open, scaled.open)
    assert torch.equal(plain.bank.thresholds, scaled.bank.thresholds)
    assert plain.bank.flips.any()


def test_prices_alone_are_another_search():
    """Else the test above would hold for gates that look at nothing."""
    losses, price = _drawn(500, 5)
    opened = [_search(losses, scale * price, 200).bank.open.sum() for scale in (0.1, 1.0, 10.0)]
    assert opened[0] > 1.2 * opened[1] > 1.2 * opened[2]


def test_a_search_that_stops_half_way_goes_on_from_its_state():
    """Nothing but the state dict is left of the first half."""
    losses, price = _drawn(300, 6)
    bank = GateBank(300)
    _search(losses, price, 100, bank=bank)
    again = GateBank(300)
    again.load_state_dict(copy.deepcopy(bank.state_dict()))
    ends = [_search(losses, price, 100, bank=each) for each in (bank, again)]
    assert torch.equal(ends[0].open, ends[1].open)
    for (name, ours), theirs in zip(bank.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_gradient_that_is_not_finite_is_not_heard():
    losses, price = _drawn(100, 7)
    want = _search(losses, price, 100).bank

    class Deafened(GateBank):
        """Gets, every now and then, what a step that overflowed would leave."""

        def weigh(self, movable: Tensor, share: Tensor, pace: Pace) -> None:
            super().weigh(movable, share, pace)
            self.pull.fill_(float("nan"))
            super().weigh(movable, share, pace)

    found = _search(losses, price, 100, bank=Deafened(100)).bank
    assert torch.equal(found.open, want.open)
    assert torch.equal(found.slope_open, want.slope_open)
    assert found.slope_open.isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_movable_gates_are_those_whose_flip_is_one_step_of_the_layer(steps):
    """Of all bit gates without an open one above a closed one, by trying every flip."""
    for opened in range(steps + 1):
        gates = torch.tensor([[1.0] * opened + [0.0] * (steps - opened)])
        for gate in range(steps):
            flipped = gates.clone()
            flipped[0, gate] = 1 - flipped[0, gate]
            before, after = int(selected(gates)), int(selected(flipped))
            assert bool(movable(gates)[0, gate]) == (abs(after - before) == 1), (gates, gate)
