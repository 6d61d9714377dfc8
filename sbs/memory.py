"""Tensors as their memory lies: what the kernels read, and back."""

import math

import torch
from torch import Tensor

# rows that one sum per channel goes over, at least: fewer would leave many sums to add up
_ROWS = 256


def dense(x: Tensor) -> Tensor:
    """`x` itself if it is contiguous or channels_last, else a contiguous copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def like(x: Tensor, other: Tensor) -> Tensor:
    """`x` in the memory order of the dense tensor `other`."""
    return x.contiguous() if other.is_contiguous() else x.contiguous(memory_format=torch.channels_last)


def memory_view(x: Tensor, channels: bool, *, sums: bool = False) -> Tensor:
    """A dense tensor's memory: flat, or (outer, channels, inner) where channel gates need it.

    In order, but for channels_last tensors that are summed per channel: there inner holds many rows (pixels).
    Not a view but an alias of the same storage: the compiler would otherwise make a graph for every shape of the base.
    """
    shape: tuple[int, ...] = (x.numel(),)
    stride: tuple[int, ...] = (1,)
    if channels and x.is_contiguous():
        shape = (x.shape[0], x.shape[1], math.prod(x.shape[2:]))
        stride = (shape[1] * shape[2], shape[2], 1)
    elif channels:
        inner = _rows_per_sum(x) if sums else 1
        shape = (x.numel() // (x.shape[1] * inner), x.shape[1], inner)
        stride = (x.shape[1] * inner, 1, x.shape[1])
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, stride)


def _rows_per_sum(x: Tensor) -> int:
    """Rows (pixels) of a channels_last tensor that a CPU's loop adds up before it goes on to other rows."""
    if x.device.type != "cpu":
        return 1  # kernels elsewhere cut tiles of their own
    outer, rows = x.shape[0], x.numel() // x.shape[1]
    while outer > 2 and outer % 2 == 0 and rows // outer < _ROWS:
        outer //= 2
    return rows // outer


def restore(flat: Tensor, other: Tensor) -> Tensor:
    """The inverse of memory_view: a result of the kernels in the shape and memory order of `other`."""
    if other.is_contiguous():
        return flat.view(other.shape)
    n, c, h, w = other.shape
    rows = flat.transpose(1, 2) if flat.dim() == 3 else flat
    return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)


def spread(values: Tensor, limit: int) -> Tensor:
    """At most `limit` of a flat tensor's values, from all over it.

    A regular stride would meet the same image columns again and again where sizes share a factor with it.
    """
    if values.numel() <= limit:
        return values
    index = torch.arange(limit, device=values.device) * 2_654_435_761 % values.numel()
    return values[index]
