"""What the ranks of a distributed run must have in common, at the cost of one small all-reduce each."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from sbs.gates import GateBank


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _initialised() else 1


def average(tensors: list[Tensor]) -> None:
    """Mean over the ranks, in place."""
    if not tensors or not _initialised():
        return
    total = _summed(tensors)
    for t, part in zip(tensors, total, strict=True):
        t.copy_(part / dist.get_world_size())


def agree(sums: list[Tensor], means: list[Tensor], banks: Iterable[GateBank]) -> None:
    """Over the ranks add up `sums`, average `means`, and give every rank the first one's gates, in place.

    Ranks with equal weights compute equal statistics and thresholds, unless their hardware differs; a last bit that
    differs at a threshold would leave them with different networks.
    """
    own = [t for bank in banks for t in bank.shared() if t.numel()]
    if not own or not _initialised():
        return
    given = own if dist.get_rank() == 0 else [torch.zeros_like(t) for t in own]
    total = _summed([*sums, *means, *given])
    for t, part in zip([*sums, *means, *own], total, strict=True):
        t.copy_(part)
    if means:
        torch._foreach_div_(means, float(world()))


def _summed(tensors: list[Tensor]) -> list[Tensor]:
    flat = torch.cat([t.reshape(-1).double() for t in tensors])
    dist.all_reduce(flat)
    return [part.view(t.shape) for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True)]
