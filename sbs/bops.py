"""BOPs of a super-network's gates (convention mac_product), what each gate costs, and which pressure leads where."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sbs.gates import effective_bits
from sbs.supernet import SuperNet, supernet_of

Gates = Sequence[Tensor]
"""Zeros and ones by bank, in the order of `SuperNet.banks()`: weights' bits, activations' bits, channel groups."""

_LEAST, _MOST, _STEPS = -5.0, 3.0, 128  # powers of ten of the multipliers that are tried


def bops_under(net: SuperNet, gates: Gates) -> Tensor:
    """BOPs of one image under `gates`, float64: sums of whole numbers, differentiable in the gates.

    Dimensions in front of the banks' own are kept: one sum for each of many settings of the gates.
    """
    weight, activation, channel = gates
    bits = _bits(net, weight, net.space.weight_bits) * _bits(net, activation, net.space.activation_bits)
    return (net.macs(channel) * bits).sum(dim=-1)


def prices(net: SuperNet, gates: Gates) -> list[Tensor]:
    """log BOPs with a gate open minus with it closed, the others as they are: of every gate, by bank.

    BOPs are of first order in each single gate, so their derivative is the exact difference.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [gate.detach().to(torch.float64, copy=True).requires_grad_() for gate in gates]
        total = bops_under(net, leaves)
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    total = total.detach()
    result = []
    for gate, slope in zip(leaves, found, strict=True):
        difference = torch.zeros_like(gate) if slope is None else slope
        is_open = gate.detach()
        dear, cheap = total + (1 - is_open) * difference, total - is_open * difference
        result.append(dear.log() - cheap.clamp_min(1.0).log())
    return result


@torch.no_grad()
def worths(net: SuperNet, gates: Gates) -> list[Tensor]:
    """The loss that each gate saves while it is open, by log BOPs that it costs: the lambda at which it would close."""
    result = []
    for bank, price in zip(net.banks(), prices(net, gates), strict=True):
        # a step of bits above a closed one costs nothing and saves nothing before that has opened
        result.append(torch.where(price > 0, -bank.gain(net.images).double() / price, 0.0))
    return result


@torch.no_grad()
def pressure_for(net: SuperNet, log_bops: Tensor) -> Tensor:
    """The least lambda under which the gates would settle at no more than `log_bops`, by what is known of them now.

    Under lambda a gate settles closed where the loss gains less by its opening than lambda times what it costs. Stays
    on the device; float64, between 1e-5 and 1e3.
    """
    net = supernet_of(net, "pressure_for")
    worth = worths(net, [bank.decided() for bank in net.banks()])
    worth[2] = torch.where(held_open(net, worth[2]), torch.inf, worth[2])
    tried = torch.logspace(_LEAST, _MOST, _STEPS, dtype=torch.float64, device=log_bops.device)
    settled = [(value > tried.view(-1, *[1] * value.dim())).double() for value in worth]
    above = bops_under(net, settled).log() > log_bops
    return tried.take(above.sum().clamp_max(_STEPS - 1))  # an index would be read by the host


def held_open(net: SuperNet, claim: Tensor) -> Tensor:
    """The channel gates with the largest claims of each layer: as many as max_prune_share keeps open, (groups,)."""
    order = claim.argsort(descending=True, stable=True)
    order = order[net.layer_index[order].argsort(stable=True)]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return place - net.first_gate < net.least_open


def _bits(net: SuperNet, gates: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Bits of every layer (..., layers), the first and last included."""
    searched = effective_bits(gates.double(), bits)
    edge = searched.new_full((*searched.shape[:-1], 1), float(net.space.first_last_bits))
    return torch.cat([searched, edge], dim=-1)[..., net.macs.searched_index.to(searched.device)]
