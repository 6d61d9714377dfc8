"""Bringing a super-network into a given state through its public surface: thresholds set, gates decided."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sbs
from tests.numerics import networks


def searched(
    model: nn.Module,
    size: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    batch: int = 4,
    absorb_relus: bool = False,
    **space: object,
) -> nn.Module:
    """A calibrated super-network whose gates are partly closed, as if a search had moved its thresholds."""
    model = networks.randomise(model, seed)
    example = torch.zeros(1, 3, size, size)
    net = sbs.prepare(model, sbs.SearchSpace(**space), example, absorb_relus=absorb_relus).to(dtype)
    sbs.calibrate(net, [networks.images(batch, size, seed + i, dtype) for i in range(2)])
    scatter_thresholds(net, seed)
    return net


@torch.no_grad()
def scatter_thresholds(net: nn.Module, seed: int) -> None:
    """Open and close gates at random, every threshold at least 0.05 from its statistic."""
    generator = torch.Generator().manual_seed(seed)

    def offsets(bank: nn.Module) -> Tensor:
        away = torch.rand(bank.statistic.shape, generator=generator) * 0.5 + 0.05
        side = torch.where(torch.rand(bank.statistic.shape, generator=generator) < 0.5, 1.0, -1.0)
        if bank is net.channel_gates:
            for start, stop in net.group_slices:  # the largest group of every layer stays
                part = bank.statistic[start:stop]
                side[start:stop][part > part.max() - 0.1] = -1.0
                away[start:stop] = away[start:stop].clamp(max=0.1)
        return (away * side).to(bank.statistic.dtype)

    banks = {bank: offsets(bank) for bank in (net.weight_gates, net.activation_gates, net.channel_gates)}
    for _ in range(3):  # closing a group moves the weight statistics of its neighbours: follow them
        for bank, offset in banks.items():
            bank.thresholds.copy_(bank.statistic + offset)
            if bank is not net.channel_gates:  # by themselves they would take one step at a time
                bank.open.copy_(offset < 0)
        sbs.after_step(net)
    for bank in banks:
        bank.age.fill_(1.0)  # no gate has just flipped
