"""The functions of `sbs.weights` for CUDA: all layers of a network in one launch, and one more where there are sums.

Where weights and masks lie is told by a table on the device, made when an address, a shape or a stride has changed: the
host sees that without asking the device. Each returns None for what only the batched calls compute: other types than
float32, weights in no order that is known here.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbs import triton_group_code as code
from sbs.constants import constant
from sbs.triton_code import FUSED
from sbs.triton_kernels import launch, on
from sbs.weights import Masks

_BLOCK = 1024
_WARPS = 4
# of the partial sums that one layer's tiles leave
_SUMS_BLOCK = 256
_LONG = 2**31
# of the rows and of the columns
_MASKS = 2
# between the codes of two layers: 64 bytes or more
_ALIGNED = 32


class Table(NamedTuple):
    """Where weights and masks lie. offsets: of each layer's codes in a buffer of `length` elements."""

    data: Tensor
    layers: int
    tiles: int
    masked: bool
    offsets: tuple[int, ...]
    length: int

    def sizes(self) -> dict[str, object]:
        """The kernels' constants."""
        return {"LAYERS": 1 << (self.layers - 1).bit_length(), "BLOCK": _BLOCK, "num_warps": _WARPS}


def table(weights: Sequence[Tensor], masks: Sequence[Masks] = (), *, by_channel: bool = False) -> Table | None:
    """For float32 tensors (O, I, ...), contiguous or channels_last, with masks over (O, I).

    by_channel: whether an output channel is a tile.
    """
    columns, offsets, tiles, length = [], [], 0, 0
    for w, own in zip(weights, masks or [()] * len(weights), strict=True):
        size, order = w.numel(), _order(w)
        if order is None or w.dtype is not torch.float32 or not 0 < size < _LONG or not _fit(own):
            return None
        count = w.shape[0] if by_channel else math.ceil(size / _BLOCK)
        columns.append((w.data_ptr(), size, tiles, count, length, *order, *_places(own)))
        offsets.append(length)
        tiles += count
        length += math.ceil(size / _ALIGNED) * _ALIGNED
    fields = tuple(value for row in zip(*columns, strict=True) for value in row)
    data = constant(fields, torch.int64, weights[0].device)
    return None if data is None else Table(data, len(columns), tiles, any(masks), tuple(offsets), length)


def _order(w: Tensor) -> tuple[int, int, int] | None:
    """Elements of an output channel, those of an input channel that lie together, input channels."""
    outer, channels = w.numel() // max(1, w.shape[0]), w.shape[1]
    if w.is_contiguous():
        return outer, outer // max(1, channels), channels
    if w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last):
        return outer, 1, channels
    return None


def _fit(masks: Masks) -> bool:
    return len(masks) <= _MASKS and all(m.dtype is torch.float32 and m.shape[2:].numel() == 1 for m in masks)


def _places(masks: Masks) -> Iterator[int]:
    """Addresses and strides of _MASKS masks; zeros in place of those that are not there."""
    for mask in masks:
        yield mask.data_ptr()
        yield from (0 if mask.shape[d] == 1 else mask.stride(d) for d in (0, 1))
    yield from [0] * 3 * (_MASKS - len(masks))


def moments(weights: Sequence[Tensor], masks: Sequence[Masks] = ()) -> tuple[Tensor, Tensor] | None:
    """As `weights.moments`."""
    made = table(weights, masks)
    if made is None:
        return None
    device = made.data.device
    partials = torch.empty(3 * made.tiles, dtype=torch.float64, device=device)
    means, stds = torch.empty(2, made.layers, device=device).unbind(0)
    with on(device):
        _launch(code.moments, made.tiles, made, (partials,), MASKED=made.masked)
        _launch_sums(code.add_moments, made, (partials, means, stds))
    return means, stds


def encode(
    weights: Sequence[Tensor], shifts: Tensor, scales: Tensor, levels: Tensor, dtype: torch.dtype
) -> list[Tensor] | None:
    """As `weights.encode`."""
    made = table(weights) if _are_single(shifts, scales, levels) and dtype is not torch.float64 else None
    if made is None:
        return None
    codes = torch.empty(made.length, dtype=dtype, device=made.data.device)
    vectors = (shifts, scales, levels)
    with on(codes.device):
        _launch(code.encode, made.tiles, made, (*(v.contiguous() for v in vectors), codes), FUSED=FUSED)
    places = zip(weights, made.offsets, strict=True)
    return [codes.as_strided(w.shape, w.stride(), offset) for w, offset in places]


def statistics(
    weights: Sequence[Tensor],
    shifts: Tensor,
    scales: Tensor,
    grid: tuple[int, ...],
    masks: Sequence[Masks] = (),
) -> Tensor | None:
    """As `weights.statistics`."""
    made = table(weights, masks) if _are_single(shifts, scales) and len(grid) > 1 else None
    if made is None:
        return None
    count, device = len(grid) - 1, made.data.device
    steps = tuple(float(n) for n in grid[:-1])
    partials = torch.empty((count + 1) * made.tiles, device=device)
    found = torch.empty(made.layers, count, device=device)
    statics: dict[str, Any] = {"STEPS": steps, "COUNT": count, "MASKED": made.masked, "FUSED": FUSED}
    with on(device):
        _launch(code.residuals, made.tiles, made, (shifts.contiguous(), scales.contiguous(), partials), **statics)
        _launch_sums(code.add_residuals, made, (partials, found), COUNT=count)
    return found


def importance(weights: Sequence[Tensor], members: Tensor, sizes: Tensor, lengths: tuple[int, ...]) -> Tensor | None:
    """As `weights.importance`."""
    made = table(weights, by_channel=True)
    counts = constant(lengths, torch.int64, weights[0].device)
    if made is None or counts is None:
        return None
    device = made.data.device
    magnitudes = torch.zeros(made.tiles + 1, device=device)
    with on(device):
        _launch(code.magnitudes, made.tiles, made, (magnitudes,))
    groups = magnitudes[members].sum(dim=1) / sizes
    # unsafe: not to look at the counts, for which the host would wait
    means = torch.segment_reduce(groups, "mean", lengths=counts, unsafe=True)
    return groups / means.clamp_min(torch.finfo(groups.dtype).tiny).repeat_interleave(counts, output_size=len(groups))


def _are_single(*vectors: Tensor) -> bool:
    return all(v.dtype is torch.float32 for v in vectors)


def _launch(function: Any, programs: int, made: Table, tensors: tuple[Tensor, ...], **statics: Any) -> None:
    constants = made.sizes() | statics
    key = (made.data.device, constants["LAYERS"], *statics.values(), *(t.dtype for t in tensors))
    launch(function, (programs, 1, 1), key, (made.data, *tensors, made.layers), lambda: constants)


def _launch_sums(function: Any, made: Table, tensors: tuple[Tensor, ...], **statics: Any) -> None:
    """One program a layer."""
    constants = {"BLOCK": _SUMS_BLOCK, "num_warps": _WARPS} | statics
    key = (made.data.device, *statics.values())
    launch(function, (made.layers, 1, 1), key, (made.data, *tensors, made.layers, made.tiles), lambda: constants)
