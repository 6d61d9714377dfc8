"""Binary gates with thresholds (SBS, 3.2) that move by evidence from both sides of a gate, and settle (ours).

A gate is open while its statistic lies above its threshold. The straight-through gradient says how the loss changes
with the gate *where the gate stands*: an open gate hardly feels what a closed one misses badly, so thresholds that
follow it run in circles about their statistic. The mean of both sides is the trapezoid rule for what the flip itself
costs, L(open) - L(closed); thresholds follow that. `docs/method.md`, section 3, has the whole argument.

The statistics are buffers that decide the *next* step: every rank sees the same numbers, and evaluation selects the
same bits as training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOMENTUM = 0.1
"""Of the running means of the statistics."""

_LEFT = 0.3


@dataclass(frozen=True)
class Pace:
    """How thresholds travel; times are shares of the whole search, so that the number of its steps does not matter.

    distance: what a gate travels in a search in which its pressure meets no resistance; statistics are about 1. hold:
    how long a flipped gate stands still while the weights answer. window: length of the running means over steps, at
    least `fewest` of them; a gate is judged by at least a third of that. band: margin beyond which a gate that never
    flipped flips; every flip widens its own by `widening`. slow, still: the thresholds slow down from the one time on
    and stand still from the other.
    """

    distance: float = 40.0
    hold: float = 0.02
    window: float = 0.03
    fewest: int = 24
    band: float = 0.05
    widening: float = 2.0
    slow: float = 0.6
    still: float = 0.9

    def rate(self, progress: Tensor) -> Tensor:
        """Share of the full speed at a time of the search."""
        return ((self.still - progress) / (self.still - self.slow)).clamp(0.0, 1.0)

    def window_of(self, steps: int) -> float:
        """Share of the search over which gradients are averaged."""
        return max(self.window, self.fewest / steps)


PACE = Pace()


class GateBank(nn.Module):
    """The gates of one kind, as one array: bit gates (layers, steps) or channel gates (groups,).

    thresholds, statistic, open: what decides. flips: how often each gate has flipped. age: share of the search since
    its last flip. For each side, while a gate was open and while it was closed: slope, running mean of dL/dg; scatter,
    its variance from step to step; weight, the share of the search that they rest on (0: never seen). promised: what
    closing the gate was foretold to cost, in nats, when it closed. window: the share that running means are over.
    """

    thresholds: Tensor
    statistic: Tensor
    open: Tensor
    flips: Tensor
    age: Tensor
    slope_open: Tensor
    slope_closed: Tensor
    scatter_open: Tensor
    scatter_closed: Tensor
    weight_open: Tensor
    weight_closed: Tensor
    promised: Tensor
    window: Tensor
    pull: Tensor
    _SHARP = 4.0

    def __init__(self, *shape: int) -> None:
        super().__init__()
        zeros = torch.zeros(shape)
        self.register_buffer("thresholds", zeros.clone())
        self.register_buffer("statistic", torch.ones(shape))
        self.register_buffer("open", torch.ones(shape))
        self.register_buffer("flips", zeros.clone())
        self.register_buffer("age", torch.ones(shape))
        for side in ("open", "closed"):
            for what in ("slope", "scatter", "weight"):
                self.register_buffer(f"{what}_{side}", zeros.clone())
        self.register_buffer("promised", zeros.clone())
        self.register_buffer("window", torch.zeros(()))
        self.register_buffer("pull", zeros.clone(), persistent=False)

    def gates(self) -> Tensor:
        """The decided gates, zeros and ones; a backward pass through them adds dL/dg to `pull`."""
        gates = self.decided()
        if torch.is_grad_enabled() and gates.numel():
            gates.requires_grad_().register_hook(self._felt)
        return gates

    def _felt(self, gradient: Tensor) -> None:
        self.pull += gradient.detach()

    def decided(self) -> Tensor:
        """The same, detached. A network whose buffers were averaged over steps has the gates of most of them."""
        return (self.open >= 0.5).to(self.open.dtype)

    def margin(self) -> Tensor:
        """Statistic minus threshold: how far each gate is from its flip."""
        return self.statistic - self.thresholds

    def shared(self) -> tuple[Tensor, ...]:
        """What ranks on different hardware might compute differently in the last bit."""
        sides = (self.slope_open, self.slope_closed, self.scatter_open, self.scatter_closed)
        return self.statistic, self.thresholds, self.open, *sides

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the thresholds from 0 to 1 above their statistic: as far beyond it as they start below it, about."""
        self.thresholds.copy_(self.thresholds.clamp_min(0).minimum(self.statistic + 1))

    @torch.no_grad()
    def weigh(self, audible: Tensor, share: float, window: float, pace: Pace) -> None:
        """Take the step's `pull` into the running means of the side each gate is on, and forget it.

        audible: the gates whose gradient says something. share: of the search that the step is. A gate that has just
        flipped is not listened to.
        """
        self.window.fill_(window)
        finite = self.pull.isfinite()
        pull, heard = torch.where(finite, self.pull, 0.0), audible & finite & (self.age >= pace.hold)
        is_open = self.decided() > 0
        for side, slope, scatter, weight in (
            (is_open, self.slope_open, self.scatter_open, self.weight_open),
            (~is_open, self.slope_closed, self.scatter_closed, self.weight_closed),
        ):
            listening = heard & side
            grown = (weight + share).clamp(max=window)
            part = share / grown
            away = pull - slope
            # a running mean and variance, weighted by age (West 1979)
            scatter.copy_(torch.where(listening, (1 - part) * (scatter + part * away.square()), scatter))
            slope.copy_(torch.where(listening, slope + part * away, slope))
            weight.copy_(torch.where(listening, grown, weight))
        self.pull.zero_()

    def foretold(self, images: Tensor) -> Tensor:
        """L(open) - L(closed) by the second-order expansion from the side that a gate is on, before weights adapt.

        The curvature is the Fisher information, and that is the variance of a batch's gradient times its `images`.
        """
        bend_open, bend_closed = 0.5 * images * self.scatter_open, 0.5 * images * self.scatter_closed
        return torch.where(self.decided() > 0, self.slope_open - bend_open, self.slope_closed + bend_closed)

    def gain(self, images: Tensor) -> Tensor:
        """What the loss gains by a gate's opening, L(open) - L(closed); the more negative, the better.

        Of a gate that was tried, from both sides by the trapezoid rule: what is left once the weights have adapted. Of
        another, what is foretold, times the share that adapting left of it where gates of its kind were tried.
        """
        tried = (self.weight_open > 0) & (self.weight_closed > 0)
        return torch.where(tried, 0.5 * (self.slope_open + self.slope_closed), self._left() * self.foretold(images))

    def _left(self) -> Tensor:
        """Share of what was foretold that is left of it where gates of a kind are closed: (steps,) or ()."""
        tried = (self.decided() == 0) & self.judged() & (self.promised > 0)
        found = self._total((-0.5 * (self.slope_open + self.slope_closed)).clamp_min(0).where(tried, 0.0))
        promised = self._total(self.promised.where(tried, 0.0))
        # the guess counts as much as one gate that was tried
        guess = promised / self._total(tried).clamp_min(1)
        share = (found + _LEFT * guess) / (promised + guess).clamp_min(torch.finfo(promised.dtype).tiny)
        return torch.where(promised > 0, share, _LEFT)

    def _total(self, figures: Tensor) -> Tensor:
        """Sums over the gates of a kind."""
        return figures.sum(dim=0)

    def judged(self) -> Tensor:
        """The gates whose present side has been seen for long enough."""
        return torch.where(self.decided() > 0, self.weight_open, self.weight_closed) >= 2 / 3 * self.window

    @torch.no_grad()
    def move(self, price: Tensor, gain: Tensor, movable: Tensor, way: Tensor) -> None:
        """Move the thresholds: up where `price` (lambda * what an open gate costs) outweighs what the loss gains.

        way: how far at full speed. A gate's speed is the balance of the two between -1 and 1, so that the scale of
        neither matters, nor the size of its layer. Without a price nothing moves.
        """
        balance = (price + gain) / (price.abs() + gain.abs()).clamp_min(torch.finfo(price.dtype).tiny)
        balance = (self._SHARP * balance).clamp(-1, 1)
        s = torch.sigmoid(self.margin())
        moved = torch.where(movable & (price != 0), way * 4 * s * (1 - s) * balance, 0.0)
        self.thresholds += moved.to(self.thresholds.dtype)
        self.clamp()

    def band(self, pace: Pace) -> Tensor:
        """Margin within which each gate stays as it is."""
        return pace.band * pace.widening**self.flips

    def wanted(self, pace: Pace) -> Tensor:
        """Gates by the sign of their margin; inside its band, which every flip widens, a gate stays as it is."""
        band, margin = self.band(pace), self.margin()
        return torch.where(margin >= band, 1.0, torch.where(margin < -band, 0.0, self.decided()))

    @torch.no_grad()
    def commit(self, decided: Tensor, share: float, images: Tensor) -> None:
        """Set the gates to `decided` (zeros and ones); count flips and time.

        What is known of the side that a gate comes to, or foretold of it, stands until it has been seen anew.
        """
        opens, closes = (decided > 0) & (self.decided() == 0), (decided == 0) & (self.decided() > 0)
        foretold, gain = self.foretold(images), self.gain(images)
        self.promised.copy_(torch.where(closes, -foretold, self.promised))
        untried = closes & (self.weight_closed == 0)
        self.slope_closed.copy_(torch.where(untried, 2 * gain - self.slope_open, self.slope_closed))
        for flips, weight in ((opens, self.weight_open), (closes, self.weight_closed)):
            weight.copy_(torch.where(flips, self.window / 3, weight))
        flipped = opens | closes
        self.flips += flipped
        self.age.copy_(torch.where(flipped, 0.0, self.age + share))
        self.open.copy_(decided)


def audible(open_gates: Tensor) -> Tensor:
    """The gates whose gradient says something: channel gates, and bit gates whose lower ones are all open."""
    if open_gates.dim() == 1:
        return torch.ones_like(open_gates, dtype=torch.bool)
    return _reached(open_gates)[:, :-1] > 0


def movable(open_gates: Tensor) -> Tensor:
    """The gates that may flip: channel gates, and of a layer's bit gates the highest open one and the one above it."""
    if open_gates.dim() == 1:
        return torch.ones_like(open_gates, dtype=torch.bool)
    reached = _reached(open_gates)
    above = torch.cat([reached[:, 2:], 0 * reached[:, :1]], dim=1)
    return (reached[:, :-1] > 0) & (above == 0)


def _reached(open_gates: Tensor) -> Tensor:
    """Ones up to the first closed gate: (layers, steps) -> (layers, steps + 1), the lowest bit-width first."""
    return torch.cat([torch.ones_like(open_gates[:, :1]), open_gates], dim=1).cumprod(dim=1)


def effective_bits(gates: Tensor, bits: Sequence[int]) -> Tensor:
    """b_1 + g_2 * (b_2 - b_1 + g_3 * (...)) for gates (..., layers, steps): bits per layer, differentiable."""
    result = torch.zeros(gates.shape[:-1], dtype=gates.dtype, device=gates.device)
    for j in reversed(range(len(bits) - 1)):
        result = gates[..., j] * (bits[j + 1] - bits[j] + result)
    return result + bits[0]


def selected(open_gates: Tensor) -> Tensor:
    """Index of the selected bit-width per layer: the number of gates open before the first closed one."""
    return open_gates.cumprod(dim=1).sum(dim=1).long()
