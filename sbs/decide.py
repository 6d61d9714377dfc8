"""One step of the search's gates: decide them by their thresholds, then move those by what loss and pressure said."""

import torch
from torch import Tensor

from sbs import gate_statistics
from sbs.bops import prices
from sbs.gates import PACE, GateBank, movable
from sbs.layers import clamp_clips
from sbs.supernet import SuperNet


@torch.no_grad()
def step(net: SuperNet, steps: int) -> None:
    """What a super-network does after an optimiser's step; `steps`: how many the whole search has.

    What decides is equal on all ranks to the last bit: comparisons of numbers that one all-reduce has made equal. What
    thresholds are moved by is computed on every rank and made equal by the next one.
    """
    share = torch.full_like(net.progress, 1.0 / steps)
    net.forget_contexts()
    clamp_clips(net.model)
    gate_statistics.update(net)
    weight, activation, channel = net.banks()
    heard = [movable(weight.decided()), movable(activation.decided()), channel.decided() >= 0]
    wanted = [weight.wanted(PACE), activation.wanted(PACE), _within_limits(net, channel)]
    for bank, audible in zip(net.banks(), heard, strict=True):
        bank.weigh(audible, share, PACE)
    rate = PACE.rate(net.progress)
    for bank, decided in zip(net.banks(), wanted, strict=True):
        bank.commit(torch.where(rate > 0, decided, bank.decided()), share)
    heard = [movable(weight.decided()), movable(activation.decided()), heard[2]]
    for bank, price, audible, pressure in zip(
        net.banks(), prices(net, [bank.decided() for bank in net.banks()]), heard, net.pressure.unbind(0), strict=True
    ):
        bank.move(pressure * price, audible, share, rate, PACE)
    net.progress += share
    net.pressure.zero_()
    net.refresh_kept()


def _within_limits(net: SuperNet, bank: GateBank) -> Tensor:
    """The channel gates that are wanted, and of those that want to close as many open as max_prune_share demands.

    The ones that are open stay before the ones that are not, then those nearest to opening. Whatever is held open has
    its threshold no higher than its statistic.
    """
    wanted = bank.wanted(PACE)
    if not net.group_slices:
        return wanted
    # margins lie within a few units: whoever wants to be open comes first, then whoever is
    claim = bank.margin().clamp(-5, 5) + 100 * wanted + 20 * bank.decided()
    order = claim.argsort(descending=True, stable=True)
    order = order[net.layer_index[order].argsort(stable=True)]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    held = (place - net.first_gate < net.least_open) & (wanted == 0)
    bank.thresholds.copy_(torch.where(held, bank.thresholds.minimum(bank.statistic), bank.thresholds))
    return torch.where(held, 1.0, wanted)
