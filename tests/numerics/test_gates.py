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

IMAGES = 128


@dataclass(frozen=True)
class Losses:
    """L(g) = -worth * g + curve / 2 * (g**2 - g) of every gate; a batch's slope scatters. All (gates,).

    L(0) - L(1) is `worth`, whatever `curve`. curve > 0: closed a gate is missed more than it is felt while open.
    scatter: variance of the slope, by that which Fisher's information makes of `curve` for a batch of IMAGES.
    """

    worth: Tensor
    curve: Tensor
    scatter: Tensor

    def slope(self, gates: Tensor) -> Tensor:
        return -self.worth + self.curve * (gates - 0.5)

    def noise(self, generator: torch.Generator) -> Tensor:
        deviation = (self.scatter * self.curve / IMAGES).sqrt()
        return deviation * torch.randn(len(self.curve), generator=generator)


def _drawn(count: int, seed: int, scatter: float = 1.0) -> tuple[Losses, Tensor]:
    """Losses and prices of all sizes."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=g) * (high - low) + low

    size = 10 ** uniform(-1.5, 1)
    losses = Losses(size * uniform(-0.3, 1.0), size * uniform(0, 6), torch.full((count,), scatter))
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
    part: range | None = None,
) -> Searched:
    """A search, or a part of it, in which the statistics tremble about 1; loss and price times `scale`."""
    g = torch.Generator().manual_seed(1)
    bank = bank or GateBank(len(price))
    share, window, images = 1 / steps, pace.window_of(steps), torch.tensor(float(IMAGES))
    everyone, history = torch.ones(len(price)) > 0, []
    for step in part or range(steps):
        bank.statistic.copy_(1 + tremble * torch.randn(len(price), generator=g))
        bank.pull += scale * (losses.slope(bank.decided()) + losses.noise(g))
        rate = pace.rate(torch.tensor(step * share, dtype=torch.float64))
        wanted = torch.where(rate > 0, bank.wanted(pace), bank.decided())
        bank.weigh(everyone, share, window, pace)
        bank.commit(wanted, share, images)
        free = bank.judged() & (bank.age >= pace.hold)
        bank.move(scale * price, bank.gain(images), free, pace.distance * share * rate)
        history.append(bank.decided())
    return Searched(bank, torch.stack(history))


class OneSided(GateBank):
    """Follows the slope of the side that each gate is on, as a straight-through gradient does."""

    def gain(self, images: Tensor) -> Tensor:
        return torch.where(self.decided() > 0, self.slope_open, self.slope_closed)


def _clear(losses: Losses, price: Tensor) -> Tensor:
    """Gates for which price and worth are not nearly the same."""
    return ((price - losses.worth) / (price + losses.worth.abs())).abs() > 0.2


def _circling(losses: Losses, price: Tensor) -> Tensor:
    """Gates that cost more than they are felt while open, and less than they are missed while closed."""
    ones = torch.ones(len(price))
    return (price > -losses.slope(ones)) & (price < -losses.slope(0 * ones))


@pytest.mark.parametrize("scatter", [0.0, 0.5, 1.0])
def test_a_gate_closes_for_good_exactly_if_its_price_exceeds_what_the_loss_would_lose(scatter):
    """Whether the scatter foretells all of the other side, a part of it, or nothing; and with few flips."""
    losses, price = _drawn(1000, 0, scatter)
    found = _search(losses, price, 500)
    right = (price > losses.worth) == (found.bank.open == 0)
    clear, circling = _clear(losses, price), _circling(losses, price)
    assert clear.float().mean() > 0.8
    assert (circling & (price < losses.worth)).sum() > 100
    assert right[clear].float().mean() > 0.995
    assert right.float().mean() > 0.98
    assert (found.bank.flips <= 3).float().mean() > 0.995
    if scatter == 0.0:
        assert right[clear].all()
        assert found.bank.flips.max() <= 2


def _heard(bank: GateBank, *slopes: float) -> None:
    """A hundred steps in which slopes scatter by a quarter: by Fisher's information a curvature of 8 at 128 images."""
    for step in range(100):
        bank.pull.copy_(torch.tensor(slopes) + (0.25 if step % 2 else -0.25))
        bank.weigh(torch.ones(len(slopes)) > 0, 0.01, 1.0, PACE)


def test_what_closing_costs_is_foretold_by_the_parabola_through_one_side_and_measured_by_both():
    """By hand: a slope of 3 while open, with a curvature of 8, makes L(1) - L(0) = 3 - 8 / 2; then -5 while closed."""
    bank, images = GateBank(1), torch.tensor(128.0)
    _heard(bank, 3.0)
    assert bank.foretold(images).item() == pytest.approx(-1.0, rel=3e-3)
    bank.commit(torch.zeros(1), 0.01, images)
    assert bank.promised.item() == pytest.approx(1.0, rel=3e-3)
    bank.age.fill_(1.0)
    for _ in range(10):
        _heard(bank, -5.0)
    assert bank.gain(images).item() == pytest.approx((3.0 - 5.0) / 2, rel=3e-3)
    assert bank.foretold(images).item() == pytest.approx(-5.0 + 8.0 / 2, rel=1e-2)


def test_what_is_foretold_is_believed_as_far_as_it_came_true_where_gates_were_tried():
    """By hand: two gates promised a cost of 1 each, of which 0.8 and 0.4 were found; a third one's is foretold as 3.

    The guess of three tenths counts as one gate: (0.8 + 0.4 + 0.3) / 3 of it is believed.
    """
    bank, images = GateBank(3), torch.tensor(128.0)
    _heard(bank, 3.0, 3.0, 1.0)
    assert bank.gain(images)[2].item() == pytest.approx(0.3 * -3.0, rel=3e-3)
    bank.commit(torch.tensor([0.0, 0.0, 1.0]), 0.01, images)
    bank.age.fill_(1.0)
    for _ in range(10):
        _heard(bank, -4.6, -3.8, 1.0)
    assert bank.gain(images)[:2].tolist() == pytest.approx([-0.8, -0.4], rel=3e-3)
    assert bank.gain(images)[2].item() == pytest.approx((0.8 + 0.4 + 0.3) / 3 * -3.0, rel=3e-3)


def test_gates_that_follow_one_side_alone_run_in_circles():
    """What the mean of both sides is for; in bands that do not widen, which hold even circles up in the end."""
    losses, price = _drawn(1000, 3, 0.1)
    circling = _circling(losses, price) & _clear(losses, price)
    assert circling.sum() > 100
    pace = replace(PACE, widening=1.0)
    assert _search(losses, price, 500, pace=pace, bank=OneSided(1000)).bank.flips[circling].median() >= 6
    assert _search(losses, price, 500, pace=pace).bank.flips[circling].median() <= 2


def test_the_pace_does_not_depend_on_the_number_of_steps():
    """The same gates flip, as often and at the same share of the search, in 800 and in 2,400 steps."""
    losses, price = _drawn(500, 4, 0.0)
    assert PACE.window_of(800) == PACE.window  # in fewer steps means are over a larger share
    short, long = (_search(losses, price, steps, tremble=0.0) for steps in (800, 2400))
    clear = _clear(losses, price)
    assert torch.equal(short.bank.open[clear], long.bank.open[clear])
    assert torch.equal(short.bank.flips[clear], long.bank.flips[clear])
    assert {0.0, 1.0, 2.0} == set(short.bank.flips[clear].tolist())
    closed = [1 - found.open.mean(dim=0)[clear] for found in (short, long)]  # share of the search
    torch.testing.assert_close(*closed, rtol=0, atol=PACE.hold)


@pytest.mark.parametrize("exponent", [-20, 20])
def test_the_scale_of_loss_and_price_together_does_not_matter_where_nothing_scatters(exponent):
    """A power of two, which rounds nothing: every threshold ends where it did, to the bit. (A variance has a scale.)"""
    losses, price = _drawn(500, 5, 0.0)
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
    """Nothing but the state dict is left of the first part; gates have just flipped, and stand still for a while."""
    losses, price = _drawn(300, 6)
    bank, parts = GateBank(300), (range(40), range(40, 400))
    _search(losses, price, 400, bank=bank, part=parts[0])
    assert (bank.age < PACE.hold).any()
    again = GateBank(300)
    again.load_state_dict(copy.deepcopy(bank.state_dict()))
    ends = [_search(losses, price, 400, bank=each, part=parts[1]) for each in (bank, again)]
    assert torch.equal(ends[0].open, ends[1].open)
    for (name, ours), theirs in zip(bank.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_gradient_that_is_not_finite_is_not_heard():
    losses, price = _drawn(100, 7)
    want = _search(losses, price, 100).bank

    class Deafened(GateBank):
        """Gets, after every step, what one that overflowed would leave."""

        def weigh(self, audible: Tensor, share: float, window: float, pace: Pace) -> None:
            super().weigh(audible, share, window, pace)
            for overflow in ("nan", "inf"):
                self.pull.fill_(float(overflow))
                super().weigh(audible, share, window, pace)

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
