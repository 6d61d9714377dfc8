"""Weights of many layers at once: moments, codes and gate statistics in a handful of calls for the whole network.

Weights are small tensors, and a network has many: per-layer calls would cost more than the arithmetic. Large ones go
through the compiled kernels one by one; the results are the same to the bit.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbs import compiled
from sbs.kernels import Form, GateMode, Operand
from sbs.memory import dense, memory_view, restore

# what a snapshot keeps of each weight, and a few more
_SAMPLES = 64
_MIN_STD = 1e-8
# above this many elements one fused pass beats the batched element-wise ones
_LARGE = 2**16


Masks = tuple[Tensor, ...]
"""Whose product, broadcast to a weight, has ones where an entry counts, zeros where not; () where all do."""


@dataclass(frozen=True)
class WeightCodes:
    """One layer's quantised weight: shift (the mean), scale v_w * std, signed codes 2k - n, unit scale / n.

    All detached. std: the deviation, by which gradients of the scale become those of the clip v_w; None where codes and
    scale came from a file.
    """

    shift: Tensor
    scale: Tensor
    codes: Tensor
    std: Tensor | None = None
    unit: Tensor | None = None


@dataclass(frozen=True)
class Snapshot:
    """What tells whether weights are still those of a moment ago."""

    versions: list[tuple[int, int]]
    samples: Tensor

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> "Snapshot":
        """Of weights as they are now."""
        return cls(_versions(weights), _samples(weights))

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether the same weights have been left alone since."""
        # some values, too: writing through `.data`, as one would all of a weight, raises no version
        return self.versions == _versions(weights) and torch.equal(self.samples, _samples(weights))


@torch.no_grad()
def weight_codes(
    weights: Sequence[Tensor],
    clips: Sequence[Tensor],
    levels: Tensor,
    found: tuple[Tensor, Tensor],
    dtype: torch.dtype | None = None,
) -> list[WeightCodes]:
    """Of many layers at once; levels: (layers,), `found`: what `moments` returned, dtype: see `encode`."""
    means, stds = found
    scales = torch.stack([clip.detach() for clip in clips]) * stds
    codes = encode(weights, means, scales, levels, dtype)
    parts = (means.unbind(0), scales.unbind(0), codes, stds.unbind(0), (scales / levels).unbind(0))
    return [WeightCodes(*each) for each in zip(*parts, strict=True)]


def _versions(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """An in-place update raises the version, a move to another device changes the address."""
    return [(w._version, w.data_ptr()) for w in weights]


def _samples(weights: Sequence[Tensor]) -> Tensor:
    """Values from all over every weight."""
    flat = [memory_view(dense(w.detach()), False) for w in weights]
    return torch.cat([w[:: max(1, len(w) // _SAMPLES)] for w in flat])


def moments(weights: Sequence[Tensor], masks: Sequence[Masks] = ()) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (population) of every tensor, (layers,) each, detached.

    masks: of each weight, see `Masks`; without any all entries count.
    Summed in float64, so that the order in memory, which pruning and memory formats change, does not show in the
    result: the super-network and the compressed network standardise with the same bits.
    """
    found: tuple[Tensor, Tensor] = _moments(weights, masks)
    return found


def encode(
    weights: Sequence[Tensor], shifts: Tensor, scales: Tensor, levels: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Signed codes 2k - n of every weight, in the weights' memory order; shifts, scales, levels: (layers,).

    dtype: of the codes where it costs nothing to have another one than the weights'.
    """
    found: list[Tensor] = _encode(weights, shifts, scales.detach(), levels, dtype or weights[0].dtype)
    return found


def statistics(
    weights: Sequence[Tensor],
    shifts: Tensor,
    scales: Tensor,
    grid: tuple[int, ...],
    masks: Sequence[Masks] = (),
) -> Tensor:
    """mean(r**2) / (s**2 / 12) of what counts of a weight: (layers, K - 1), for every step of `grid` but the last."""
    found: Tensor = _statistics(weights, shifts, scales.detach(), grid, masks)
    return found


def importance(weights: Sequence[Tensor], members: Tensor, sizes: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Mean magnitude of every channel group over that of the groups of its layer, (groups,).

    members: (groups, most channels), places among the channels of all weights, one behind the last where there is none;
    sizes: channels of each group; lengths: groups of each weight.
    """
    found: Tensor = _importance(weights, members, sizes, lengths)
    return found


@compiled.grouped
def _importance(weights: Sequence[Tensor], members: Tensor, sizes: Tensor, lengths: tuple[int, ...]) -> Tensor:
    # over all dimensions at once: to flatten weights in channels_last would copy them
    per_channel = torch.cat([w.detach().abs().mean(dim=tuple(range(1, w.dim()))) for w in weights])
    # a gather and a sum, not index_add_: that one's order, and so its last bit, is left open on a GPU
    groups = torch.cat([per_channel, per_channel.new_zeros(1)])[members].sum(dim=1) / sizes
    parts = groups.split(list(lengths))
    least = torch.finfo(groups.dtype).tiny
    return torch.cat([part / part.mean().clamp_min(least) for part in parts])


@compiled.grouped
def _moments(weights: Sequence[Tensor], masks: Sequence[Masks]) -> tuple[Tensor, Tensor]:
    masks = masks or [()] * len(weights)
    with torch.no_grad():
        found: dict[int, tuple[Tensor, Tensor]] = {}
        # the large ones alone, so that the three passes find them in the cache
        batches = [[i] for i, w in enumerate(weights) if w.numel() >= _LARGE]
        batches.append([i for i, w in enumerate(weights) if w.numel() < _LARGE])
        for batch in filter(None, batches):
            wide = [weights[i].detach().to(torch.float64, copy=True) for i in batch]
            counts = [_count(weights[i], masks[i]) for i in batch]
            _mask(wide, [masks[i] for i in batch])
            centres = torch._foreach_div([w.sum() for w in wide], counts)
            torch._foreach_sub_(wide, centres)
            _mask(wide, [masks[i] for i in batch])
            deviations = torch._foreach_div(torch._foreach_norm(wide), torch._foreach_sqrt(counts))
            found.update(zip(batch, zip(centres, deviations, strict=True), strict=True))
        means, stds = (list(column) for column in zip(*(found[i] for i in range(len(weights))), strict=True))
        torch._foreach_clamp_min_(stds, _MIN_STD)
        types = [w.dtype for w in weights]
        narrow = [[value.to(t) for value, t in zip(values, types, strict=True)] for values in (means, stds)]
        return torch.stack(narrow[0]), torch.stack(narrow[1])


def _count(w: Tensor, masks: Masks) -> Tensor:
    """How many entries of a weight count, 0-dim, float64."""
    if not masks:
        return torch.full((), float(w.numel()), dtype=torch.float64, device=w.device)
    mask = whole_mask(masks)
    return mask.sum(dtype=torch.float64) * (w.numel() // mask.numel())


def whole_mask(masks: Masks) -> Tensor:
    """The one mask that several stand for."""
    return functools.reduce(torch.mul, masks)


def _mask(tensors: Sequence[Tensor], masks: Sequence[Masks]) -> None:
    """Set to zero, in place, what does not count."""
    for tensor, own in zip(tensors, masks, strict=True):
        for mask in own:
            tensor.mul_(mask)


@compiled.grouped
def _encode(weights: Sequence[Tensor], shifts: Tensor, scales: Tensor, levels: Tensor, _: torch.dtype) -> list[Tensor]:
    with torch.no_grad():
        result: list[Tensor | None] = [None] * len(weights)
        small = []
        for i, w in enumerate(weights):
            if w.numel() < _LARGE:
                small.append(i)
                continue
            tensor = dense(w.detach())
            operand = Operand(memory_view(tensor, False), None, shifts[i], scales[i], levels[i])
            form = Form(True, GateMode.NONE, (1,))
            result[i] = restore(compiled.encode(operand, form, tensor.dtype), tensor)
        if small:
            chosen = [levels[i] for i in small]
            z = _normalized([weights[i] for i in small], [shifts[i] for i in small], [scales[i] for i in small])
            torch._foreach_mul_(z, chosen)
            torch._foreach_round_(z)
            torch._foreach_mul_(z, 2)
            torch._foreach_sub_(z, chosen)
            for i, codes in zip(small, z, strict=True):
                result[i] = codes
    return [codes for codes in result if codes is not None]


@compiled.grouped
def _statistics(
    weights: Sequence[Tensor],
    shifts: Tensor,
    scales: Tensor,
    grid: tuple[int, ...],
    masks: Sequence[Masks],
) -> Tensor:
    masks = masks or [()] * len(weights)
    with torch.no_grad():
        alone = [w.numel() >= _LARGE and not m for w, m in zip(weights, masks, strict=True)]
        rows: dict[int, Tensor] = {}
        for i, w in enumerate(weights):
            if alone[i]:
                operand = Operand(memory_view(dense(w.detach()), False), None, shifts[i], scales[i], shifts[i])
                sums: Tensor = compiled.residual_sums(operand, Form(True, GateMode.NONE, grid))
                rows[i] = sums / w.numel()
        rest = [i for i in range(len(weights)) if not alone[i]]
        if rest:
            z = _normalized([weights[i] for i in rest], [shifts[i] for i in rest], [scales[i] for i in rest])
            counts = [_count(weights[i], masks[i]).to(z[0].dtype) for i in rest]
            columns = []
            for n in grid[:-1]:
                scaled = torch._foreach_mul(z, n)
                torch._foreach_sub_(scaled, torch._foreach_round(scaled))
                _mask(scaled, [masks[i] for i in rest])
                norms = torch.stack(list(torch._foreach_norm(scaled)))
                columns.append(12 * norms.square() / torch.stack(counts))
            rows.update(zip(rest, torch.stack(columns, dim=1).unbind(0), strict=True))
        return torch.stack([rows[i] for i in range(len(weights))])


def _normalized(weights: list[Tensor], shifts: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    """z = (clip((w - shift) / scale, -1, 1) + 1) / 2 of every weight, as in kernels.encode."""
    z = list(torch._foreach_sub([w.detach() for w in weights], shifts))
    torch._foreach_div_(z, [s.detach() for s in scales])
    torch._foreach_clamp_min_(z, -1)
    torch._foreach_clamp_max_(z, 1)
    torch._foreach_add_(z, 1)
    torch._foreach_mul_(z, 0.5)
    return z
