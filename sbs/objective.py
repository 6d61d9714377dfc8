"""The search objective's second term, log BOPs of the gates, and what an optimiser needs to know of a network.

L = CE(y, f(x)) + lambda * log(BOPs(gates)) (SBS, section 3.4; natural logarithm, convention mac_product).
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from sbs import decide
from sbs.bops import bops_under
from sbs.errors import SbsError
from sbs.gates import PACE, effective_bits, movable
from sbs.layers import QuantizedLayer, clamp_clips
from sbs.siblings import gather
from sbs.supernet import SuperNet, supernet_of

Gradient = Literal["joint", "weights", "activations"]
DEFAULT_STEPS = 1000
"""Steps of a search that nobody has told how many it has."""
GRADIENTS = ("joint", "weights", "activations")


def bop_penalty(net: SuperNet, gradient: Gradient = "joint") -> Tensor:
    """log(BOPs) of the super-network's gates, a scalar to add to the loss with a factor lambda.

    What comes back to it in the backward pass is lambda, which `after_step` weighs against what the loss says of every
    gate. gradient: which bit gates feel it, "weights", "activations" or both; the paper's code alternates between the
    two from step to step. Channel gates always feel it.
    """
    net = supernet_of(net, "bop_penalty")
    if gradient not in GRADIENTS:
        raise SbsError(f"gradient={gradient!r} is unknown; use one of {', '.join(GRADIENTS)}")
    with torch.no_grad():
        value = bops_under(net, [bank.decided() for bank in net.banks()]).log()
    if torch.is_grad_enabled():
        value.requires_grad_().register_hook(partial(_press, net, GRADIENTS.index(gradient)))
    return value.to(net.channel_gates.open.dtype)


def _press(net: SuperNet, gradient: int, pressure: Tensor) -> None:
    net.press(pressure.detach(), gradient)


def param_groups(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters of any network by what an optimiser should do with them.

    "decay": convolution and linear weights; "no_decay": biases and norms; "clips". Every key is present, with [] where
    the network has none. Thresholds are moved by `after_step`.
    """
    groups: dict[str, list[nn.Parameter]] = {
        "decay": [],
        "no_decay": [],
        "clips": [],
    }
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter.numel() == 0:
                continue
            if isinstance(module, QuantizedLayer) and name.endswith("_clip"):
                key = "clips"
            elif isinstance(module, nn.Conv2d | nn.Linear) and name == "weight":
                key = "decay"
            else:
                key = "no_decay"
            groups[key].append(parameter)
    return groups


def after_step(net: nn.Module, steps: int = DEFAULT_STEPS, *, loss_scale: float = 1.0) -> None:
    """Call after every optimizer.step(): clamps, and in a super-network the statistics and the gates.

    steps: how many the whole search has; gates move at a pace that brings them to rest in that time. loss_scale: what
    the loss was multiplied by before the backward pass, where a GradScaler did so.

    The network may be wrapped (DDP, torch.compile). In a super-network every rank must call it: it does one small
    all-reduce where torch.distributed is initialised.
    """
    supernets = [m for m in net.modules() if isinstance(m, SuperNet)]
    for supernet in supernets:
        decide.step(supernet, steps, loss_scale)
    if not supernets:
        clamp_clips(net)
        gather(net)


def margins(net: SuperNet) -> dict[str, dict[str, list[float]]]:
    """Statistic minus threshold of every gate, by layer and kind.

    Kinds are "weight" and "activation" (bit steps, rising) and "channel" (groups of the layer's outputs). Above 0 a
    gate is open, below it is closed, but for its band, for groups that max_prune_share holds open, and for gates that
    landed on a budget; an open bit step above a closed one counts for nothing. Layers without gates are left out.
    """
    net = supernet_of(net, "margins")
    return _by_layer(net, [bank.margin() for bank in net.banks()])


def flips(net: SuperNet) -> dict[str, dict[str, list[float]]]:
    """How often every gate has flipped since the search began, by layer and kind as in `margins`."""
    net = supernet_of(net, "flips")
    return _by_layer(net, [bank.flips for bank in net.banks()])


def _by_layer(net: SuperNet, figures: list[Tensor]) -> dict[str, dict[str, list[float]]]:
    *bits, channels = [figure.tolist() for figure in figures]
    result: dict[str, dict[str, list[float]]] = {}
    for side, rows in zip(("weight", "activation"), bits, strict=True):
        for name, row in zip(net.searched, rows, strict=True):
            if row:
                result.setdefault(name, {})[side] = row
    # without pruning there are groups, and no slices
    for group, (begin, end) in zip(net.graph.groups, net.group_slices, strict=False):
        result.setdefault(group.root, {})["channel"] = channels[begin:end]
    return result


def telemetry(net: SuperNet) -> dict[str, float]:
    """Where the gates are: share of open gates per bit step, bits, pruned share, flips, distance of the thresholds.

    gates/margin_* is the smallest |statistic - threshold| of a kind; gates/flips counts since the search began;
    gates/undecided is the share of the gates that may flip and stand within their band.
    """
    net = supernet_of(net, "telemetry")
    result: dict[str, float] = {}
    for side, bank in zip(("weight", "activation", "channel"), net.banks(), strict=True):
        if bank.thresholds.numel() == 0:
            continue
        result[f"gates/margin_{side}"] = float(bank.margin().abs().min())
        result[f"gates/threshold_{side}"] = float(bank.thresholds.double().mean())
        if side == "channel":
            result["gates/open_channel"] = float(bank.decided().mean())
            continue
        bits: tuple[int, ...] = getattr(net.space, f"{side}_bits")
        reached = bank.decided().cumprod(dim=1).mean(dim=0)
        for b, share in zip(bits[1:], reached.tolist(), strict=True):
            result[f"gates/open_{side}_{b}"] = share
        result[f"gates/mean_{side}_bits"] = float(effective_bits(bank.decided(), bits).mean())
    flipped = torch.cat([bank.flips.flatten() for bank in net.banks()])
    free = torch.cat([movable(bank.decided()).flatten() for bank in net.banks()])
    undecided = torch.cat([(bank.margin().abs() < bank.band(PACE)).flatten() for bank in net.banks()])
    result["gates/flips"] = float(flipped.sum())
    result["gates/flips_per_gate"] = float(flipped.sum() / max(1, len(flipped)))
    result["gates/most_flips"] = float(flipped.max()) if len(flipped) else 0.0
    result["gates/undecided"] = float((undecided & free).sum() / free.sum().clamp_min(1))
    return result
