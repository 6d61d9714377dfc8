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


@dataclass(frozen=True)
class Pace:
    """How thresholds travel; lengths of time are shares of the whole search, so that its steps do not matter.

    distance: what the average gate would travel in a search in which its pressure met no resistance; statistics are
    about 1. hold: how long a flipped gate stands still while the weights answer. window: length of the running means
    of the loss's gradients. band: margin beyond which a gate that never flipped flips; every flip widens its own by
    `widening`. slow, still: the thresholds slow down from the one time on and stand still from the other.
    """

    distance: float = 8.0
    hold: float = 0.02
    window: float = 0.03
    band: float = 0.05
    widening: float = 2.0
    slow: float = 0.6
    still: float = 0.9

    def rate(self, progress: Tensor) -> Tensor:
        """Share of the full speed at a time of the search."""
        return ((self.still - progress) / (self.still - self.slow)).clamp(0.0, 1.0)


PACE = Pace()


class GateBank(nn.Module):
    """The gates of one kind, as one array: bit gates (layers, steps) or channel gates (groups,).

    thresholds, statistic, open: what decides. flips: how often each gate has flipped. age: share of the search since
    its last flip. slope_open, slope_closed: running means of dL/dg from while it was open and closed, over weight_open
    and weight_closed of the search (0: that side was never seen).
    """

    thresholds: Tensor
    statistic: Tensor
    open: Tensor
    flips: Tensor
    age: Tensor
    slope_open: Tensor
    slope_closed: Tensor
    weight_open: Tensor
    weight_closed: Tensor
    pull: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        zeros = torch.zeros(shape)
        self.register_buffer("thresholds", zeros.clone())
        self.register_buffer("statistic", torch.ones(shape))
        self.register_buffer("open", torch.ones(shape))
        self.register_buffer("flips", zeros.clone())
        self.register_buffer("age", torch.ones(shape))
        for side in ("open", "closed"):
            self.register_buffer(f"slope_{side}", zeros.clone())
            self.register_buffer(f"weight_{side}", zeros.clone())
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
        return self.statistic, self.thresholds, self.open, self.slope_open, self.slope_closed

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the thresholds from 0 to 1 above their statistic: as far beyond it as they start below it, about."""
        self.thresholds.copy_(self.thresholds.clamp_min(0).minimum(self.statistic + 1))

    @torch.no_grad()
    def weigh(self, movable: Tensor, share: Tensor, pace: Pace) -> None:
        """Take the step's `pull` into the running means of the side each gate is on, and forget it.

        movable: the gates whose flip is a step that the layer can take now; the others have no say.
        share: of the search that the step is. A gate that has just flipped is not listened to.
        """
        pull = torch.where(self.pull.isfinite(), self.pull, 0.0)
        heard = movable & self.pull.isfinite() & (self.age >= pace.hold)
        is_open = self.decided() > 0
        for side, slope, weight in (
            (is_open, self.slope_open, self.weight_open),
            (~is_open, self.slope_closed, self.weight_closed),
        ):
            listening = heard & side
            grown = (weight + share).clamp(max=pace.window)
            moved = torch.lerp(slope, pull, (share / grown).to(slope.dtype).expand_as(slope))
            slope.copy_(torch.where(listening, moved, slope))
            weight.copy_(torch.where(listening, grown, weight))
        self.pull.zero_()

    def slope(self) -> Tensor:
        """What the loss would gain by a gate's opening, dL/dg by the trapezoid rule; one-sided where one is known."""
        known_open, known_closed = self.weight_open > 0, self.weight_closed > 0
        both = 0.5 * (self.slope_open + self.slope_closed)
        return torch.where(known_open & known_closed, both, torch.where(known_open, self.slope_open, self.slope_closed))

    @torch.no_grad()
    def move(self, price: Tensor, movable: Tensor, share: Tensor, rate: Tensor, pace: Pace) -> None:
        """Move the thresholds: up where `price` (lambda * what an open gate costs) outweighs what the loss gains.

        A gate's speed is the balance of the two between -1 and 1, so that the scale of neither matters, nor the size
        of its layer. Without a price nothing moves.
        """
        gain = self.slope()
        balance = (price + gain) / (price.abs() + gain.abs()).clamp_min(torch.finfo(price.dtype).tiny)
        s = torch.sigmoid(self.margin())
        way = pace.distance * share * rate * 4 * s * (1 - s) * balance
        way = torch.where(movable & (price != 0) & (self.age >= pace.hold), way, 0.0)
        self.thresholds += way.to(self.thresholds.dtype)
        self.clamp()

    def wanted(self, pace: Pace) -> Tensor:
        """Gates by the sign of their margin; inside its band, which every flip widens, a gate stays as it is."""
        band = pace.band * pace.widening**self.flips
        margin = self.margin()
        return torch.where(margin >= band, 1.0, torch.where(margin < -band, 0.0, self.decided()))

    @torch.no_grad()
    def commit(self, decided: Tensor, share: Tensor) -> None:
        """Set the gates to `decided` (zeros and ones); count flips and time."""
        flipped = decided != self.open
        self.flips += flipped
        self.age.copy_(torch.where(flipped, 0.0, self.age + share))
        self.open.copy_(decided)


def movable(open_gates: Tensor) -> Tensor:
    """Bit gates (layers, steps) whose flip changes a layer by one step: the highest open one and the one above it."""
    edge = torch.ones_like(open_gates[:, :1])
    reached = torch.cat([edge, open_gates], dim=1).cumprod(dim=1)
    above = torch.cat([reached[:, 2:], 0 * edge], dim=1)
    return (reached[:, :-1] > 0) & (above == 0)


def effective_bits(gates: Tensor, bits: Sequence[int]) -> Tensor:
    """b_1 + g_2 * (b_2 - b_1 + g_3 * (...)) for gates (layers, steps): bits per layer, differentiable in the gates."""
    result = torch.zeros(gates.shape[0], dtype=gates.dtype, device=gates.device)
    for j in reversed(range(len(bits) - 1)):
        result = gates[:, j] * (bits[j + 1] - bits[j] + result)
    return result + bits[0]


def selected(open_gates: Tensor) -> Tensor:
    """Index of the selected bit-width per layer: the number of gates open before the first closed one."""
    return open_gates.cumprod(dim=1).sum(dim=1).long()
