"""The statistics that gates compare with their thresholds, brought up to date after every step (SBS, 3.2)."""

import torch
from torch import Tensor

from sbs.constants import constant
from sbs.gates import MOMENTUM
from sbs.layers import Residuals
from sbs.ranks import agree
from sbs.space import levels
from sbs.supernet import SuperNet
from sbs.weights import importance, moments, statistics


@torch.no_grad()
def update(net: SuperNet, momentum: float = MOMENTUM) -> None:
    """Statistics of this step's weights and batches, and what the loss and the pressure said of the gates.

    The same on all ranks, after one all-reduce of a few numbers per gate where torch.distributed is initialised.
    """
    collected, passed = _collected(net), net.take_passed()
    _update_weights(net)
    _update_channels(net)
    agree([collected, passed], [bank.pull for bank in net.banks()] + [net.pressure], net.banks())
    net.images.copy_(torch.where(passed > 0, passed.to(net.images.dtype), net.images))
    _update_activations(net, collected, momentum)


@torch.no_grad()
def start(net: SuperNet) -> None:
    """Take the statistics from what calibration collected, in place of the running means; no gate moves."""
    net.joint_bank()
    update(net, momentum=1.0)
    net.forget_pulls()
    net.refresh_kept()
    net.mark_started()


def _collected(net: SuperNet) -> Tensor:
    """Residual sums and counts of this rank's batches, (searched layers, bit-widths), float64; then forgotten."""
    bank, layers = net.activation_gates, net.searched_layers()
    pending = [layer.pending_activation for layer in layers]
    for layer in layers:
        layer.pending_activation = None
    # every rank takes part in the all-reduce, also one that saw no batch
    empty = bank.statistic.new_zeros(bank.statistic.shape[1])
    if bank.thresholds.numel() == 0:
        return empty.double()
    sums = torch.stack([empty if p is None else p.sums.to(empty) for p in pending])
    return torch.cat([sums, _counts(pending, empty).unsqueeze(1)], dim=1).double()


def _counts(pending: list[Residuals | None], empty: Tensor) -> Tensor:
    """How many values each layer's sums are of, (layers,)."""
    single = [p for p in pending if p is not None and isinstance(p.count, int) and p.sums.dtype == empty.dtype]
    numbers = None
    if len(single) == len(pending):
        numbers = constant(tuple(float(p.count) for p in single), empty.dtype, empty.device)
    if numbers is not None:
        whole = empty.new_ones(())
        return numbers * torch.stack([whole if p.share is None else p.share for p in single])
    return torch.stack([empty.new_zeros(()) if p is None else p.counted().to(empty) for p in pending])


def _update_activations(net: SuperNet, table: Tensor, momentum: float) -> None:
    bank = net.activation_gates
    if bank.thresholds.numel() == 0:
        return
    fresh = (table[:, :-1] / table[:, -1:].clamp_min(1)).to(bank.statistic.dtype)
    # a batch that overflowed says nothing; let in, it would stay in the running mean for ever
    seen = (table[:, -1:] > 0) & fresh.isfinite().all(dim=1, keepdim=True)
    bank.statistic.copy_(torch.where(seen, torch.lerp(bank.statistic, fresh, momentum), bank.statistic))


def _update_weights(net: SuperNet) -> None:
    if net.weight_gates.thresholds.numel() == 0:
        return
    layers, searched = net.coded_layers(), len(net.searched)
    means, stds = moments([layer.weight for layer in layers], [layer.kept for layer in layers])
    net.leave_moments(means, stds)
    # behind the searched layers there may be the first and the last
    layers, means, stds = layers[:searched], means[:searched], stds[:searched]
    scales = torch.stack([layer.weight_clip for layer in layers]) * stds
    grid = tuple(levels(b) for b in net.space.weight_bits)
    found = statistics([layer.weight for layer in layers], means, scales, grid, [layer.kept for layer in layers])
    net.weight_gates.statistic.copy_(found)


def _update_channels(net: SuperNet) -> None:
    if not net.group_slices:
        return
    roots = [net.model.get_parameter(f"{group.root}.weight") for group in net.graph.groups]
    lengths = tuple(stop - start for start, stop in net.group_slices)
    net.channel_gates.statistic.copy_(importance(roots, net.group_members, net.group_sizes, lengths))
