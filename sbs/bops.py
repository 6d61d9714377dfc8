"""BOPs of a super-network's gates (convention mac_product), and what each gate costs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sbs.gates import effective_bits
from sbs.supernet import SuperNet

Gates = Sequence[Tensor]
"""Zeros and ones by bank, in the order of `SuperNet.banks()`: weights' bits, activations' bits, channel groups."""


def bops_under(net: SuperNet, gates: Gates) -> Tensor:
    """BOPs of one image under `gates`, a float64 scalar: a sum of whole numbers. Differentiable in the gates."""
    weight, activation, channel = gates
    bits = _bits(net, weight, net.space.weight_bits) * _bits(net, activation, net.space.activation_bits)
    return (net.macs(channel) * bits).sum()


def prices(net: SuperNet, gates: Gates) -> list[Tensor]:
    """log BOPs with a gate open minus with it closed, the others as they are: of every gate, by bank.

    BOPs are of first order in each single gate, so their derivative is the exact difference.
    """
    with torch.enable_grad():
        leaves = [gate.detach().double().requires_grad_() for gate in gates]
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


def _bits(net: SuperNet, gates: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Bits of every layer (layers,), the first and last included."""
    searched = effective_bits(gates.double(), bits)
    padded = torch.cat([searched, searched.new_full((1,), float(net.space.first_last_bits))])
    return padded[net.macs.searched_index.to(padded.device)]
