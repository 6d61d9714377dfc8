"""The search objective's second term, log BOPs of the gates, and what an optimiser needs to know of a network.

L = CE(y, f(x)) + lambda * log(BOPs(gates)) (SBS, section 3.4; natural logarithm, convention mac_product).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from sbs.errors import SbsError
from sbs.gates import GateBank, effective_bits
from sbs.layers import QuantizedLayer, clamp_clips
from sbs.supernet import SuperNet, supernet_of

Gradient = Literal["joint", "weights", "activations"]
GRADIENTS = ("joint", "weights", "activations")


def bop_penalty(net: SuperNet, gradient: Gradient = "joint") -> Tensor:
    """log(BOPs) of the super-network's gates, a scalar differentiable in the thresholds.

    gradient: which bit gates get a gradient, "weights", "activations" or both; the paper's code alternates between the
    two from step to step. Channel gates always get theirs.
    """
    net = supernet_of(net, "bop_penalty")
    if gradient not in GRADIENTS:
        raise SbsError(f"gradient={gradient!r} is unknown; use one of {', '.join(GRADIENTS)}")
    weight = _bits(net, "weight", gradient in ("joint", "weights"))
    activation = _bits(net, "activation", gradient in ("joint", "activations"))
    macs = net.macs(net.channel_gates.gates())
    return (macs * weight * activation).sum().log().to(weight.dtype)


def _bits(net: SuperNet, side: str, differentiable: bool) -> Tensor:
    """Bits of every layer (layers,), the first and last included."""
    bank: GateBank = getattr(net, f"{side}_gates")
    bits: tuple[int, ...] = getattr(net.space, f"{side}_bits")
    if bank.thresholds.shape[1]:
        gates = bank.gates() if differentiable else bank.decided()
        searched = effective_bits(gates, bits)
    else:
        searched = bank.open.new_full((len(net.searched),), float(bits[0]))
    padded = torch.cat([searched, searched.new_full((1,), float(net.space.first_last_bits))])
    return padded[net.macs.searched_index]


def param_groups(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters of any network by what an optimiser should do with them.

    "decay": convolution and linear weights; "no_decay": biases and norms; "clips"; "bit_thresholds";
    "prune_thresholds". Every key is present, with [] where the network has none.
    """
    groups: dict[str, list[nn.Parameter]] = {
        "decay": [],
        "no_decay": [],
        "clips": [],
        "bit_thresholds": [],
        "prune_thresholds": [],
    }
    channel_banks = [m.channel_gates for m in net.modules() if isinstance(m, SuperNet)]
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter.numel() == 0:
                continue
            if isinstance(module, GateBank):
                key = "prune_thresholds" if any(module is bank for bank in channel_banks) else "bit_thresholds"
            elif isinstance(module, QuantizedLayer) and name.endswith("_clip"):
                key = "clips"
            elif isinstance(module, nn.Conv2d | nn.Linear) and name == "weight":
                key = "decay"
            else:
                key = "no_decay"
            groups[key].append(parameter)
    return groups


def after_step(net: nn.Module) -> None:
    """Call after every optimizer.step(): clamps, and in a super-network the statistics and the gates.

    The network may be wrapped (DDP, torch.compile). In a super-network every rank must call it: it does one small
    all-reduce where torch.distributed is initialised.
    """
    supernets = [m for m in net.modules() if isinstance(m, SuperNet)]
    for supernet in supernets:
        supernet.after_step()
    if not supernets:
        clamp_clips(net)


def margins(net: SuperNet) -> dict[str, dict[str, list[float]]]:
    """Statistic minus threshold of every gate, by layer and kind.

    Kinds are "weight" and "activation" (bit steps, rising) and "channel" (groups of the layer's outputs). Above 0 a
    gate is open, below it is closed, but for the hysteresis and for groups that max_prune_share holds open; an open bit
    step above a closed one counts for nothing. Layers without gates are left out.
    """
    net = supernet_of(net, "margins")
    result: dict[str, dict[str, list[float]]] = {}
    for side in ("weight", "activation"):
        bank: GateBank = getattr(net, f"{side}_gates")
        for name, row in zip(net.searched, bank.margin().tolist(), strict=True):
            if row:
                result.setdefault(name, {})[side] = row
    channels = net.channel_gates.margin().tolist()
    # without pruning there are groups, and no slices
    for group, (begin, end) in zip(net.graph.groups, net.group_slices, strict=False):
        result.setdefault(group.root, {})["channel"] = channels[begin:end]
    return result


def telemetry(net: SuperNet) -> dict[str, float]:
    """Where the gates are: share of open gates per bit step, bits, pruned share, flips, distance of the thresholds.

    gates/margin_* is the smallest |statistic - threshold| of a kind; gates/flips counts since the search began.
    """
    net = supernet_of(net, "telemetry")
    result: dict[str, float] = {}
    flips = 0
    for side in ("weight", "activation", "channel"):
        bank: GateBank = getattr(net, f"{side}_gates")
        if bank.thresholds.numel() == 0:
            continue
        flips += int(bank.flips)
        result[f"gates/margin_{side}"] = float(bank.margin().abs().min())
        result[f"gates/threshold_{side}"] = float(bank.thresholds.detach().mean())
        if side == "channel":
            result["gates/open_channel"] = float(bank.decided().mean())
            continue
        bits: tuple[int, ...] = getattr(net.space, f"{side}_bits")
        reached = bank.decided().cumprod(dim=1).mean(dim=0)
        for b, share in zip(bits[1:], reached.tolist(), strict=True):
            result[f"gates/open_{side}_{b}"] = share
        result[f"gates/mean_{side}_bits"] = float(effective_bits(bank.decided(), bits).mean())
    result["gates/flips"] = float(flips)
    return result
