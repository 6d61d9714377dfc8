"""One step of the search's gates: decide them by their thresholds, then move those by what loss and pressure said."""

import torch
from torch import Tensor

from sbs import gate_statistics
from sbs.bops import held_open, prices
from sbs.errors import SbsError
from sbs.gates import PACE, audible, movable
from sbs.joint import CHANNEL, JointBank
from sbs.layers import clamp_clips
from sbs.supernet import SuperNet


@torch.no_grad()
def step(net: SuperNet, steps: int, loss_scale: float = 1.0) -> None:
    """What a super-network does after an optimiser's step; `steps`: how many the whole search has.

    What decides is equal on all ranks: comparisons of numbers that one all-reduce has made equal, or that follow from
    these by the same few operations. What thresholds are moved by is made equal by the next all-reduce.
    """
    if steps < 1:
        raise SbsError(f"after_step() got steps={steps}: give the number of steps of the whole search")
    net.forget_contexts()
    clamp_clips(net.model)
    if loss_scale != 1.0:
        torch._foreach_div_([net.pressure, *(bank.pull for bank in net.banks())], loss_scale)
    gate_statistics.update(net)
    rate, share, window = PACE.rate(net.steps_done.double() / steps), 1 / steps, PACE.window_of(steps)
    bank = net.joint_bank()
    _decide(net, bank, rate, share, window)
    _move(net, bank, rate, share)
    net.steps_done += 1
    net.pressure.zero_()
    net.refresh_kept()


def at_rest(steps_done: int, steps: int) -> bool:
    """Whether gates stand still after so many of a search's steps: from there on only weights and clips are trained."""
    return steps_done / steps >= PACE.still


def _decide(net: SuperNet, bank: JointBank, rate: Tensor, share: float, window: float) -> None:
    """Take in what the step said of the gates as they were, then flip those whose thresholds say so."""
    wanted = bank.wanted(PACE)
    _keep_within_limits(net, bank.part(wanted, CHANNEL))
    is_open = bank.decided()
    bank.weigh(audible(is_open), share, window, PACE)
    # a statistic that falls may want to close a step whose turn it is not
    free = movable(is_open) & (rate > 0)
    bank.commit(torch.where(free, wanted, is_open), share, net.images)


def _move(net: SuperNet, bank: JointBank, rate: Tensor, share: float) -> None:
    """Move the thresholds of the gates that may flip and have been seen for long enough."""
    is_open = bank.decided()
    price = bank.together(prices(net, [bank.part(is_open, i) for i in range(len(net.banks()))]))
    free = movable(is_open) & bank.judged() & (bank.age >= PACE.hold)
    pressure = net.pressure[bank.kind].unsqueeze(1)
    bank.move(pressure * price, bank.gain(net.images), free, PACE.distance * share * rate)


def _keep_within_limits(net: SuperNet, wanted: Tensor) -> None:
    """Of the channel gates that want to close, want as many open as max_prune_share demands.

    The ones that are open stay before the ones that are not, then those nearest to opening. Whatever is held open has
    its threshold no higher than its statistic.
    """
    if not net.group_slices:
        return
    bank = net.channel_gates
    # margins lie within a few units: whoever wants to be open comes first, then whoever is
    held = held_open(net, bank.margin().clamp(-5, 5) + 100 * wanted + 20 * bank.decided()) & (wanted == 0)
    bank.thresholds.copy_(torch.where(held, bank.thresholds.minimum(bank.statistic), bank.thresholds))
    wanted += held
