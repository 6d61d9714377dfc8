"""Tensors as their memory lies: what the kernels read, and back."""

import math

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """`x` itself if it is contiguous or channels_last, else a contiguous copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def like(x: Tensor, other: Tensor) -> Tensor:
    """`x` in the memory order of the dense tensor `other`."""
    return x.contiguous() if other.is_contiguous() else x.contiguous(memory_format=torch.channels_last)


def memory_view(x: Tensor, channels: bool) -> Tensor:
    """A dense tensor's memory in order: flat, or (outer, channels, inner) where channel gates need it.

    Not a view but an alias of the same storage: the compiler would otherwise make a graph for every shape of the base.
    """
    shape: tuple[int, ...] = (x.numel(),)
    if channels and x.is_contiguous():
        shape = (x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    elif channels:
        shape = (x.numel() // x.shape[1], x.shape[1], 1)
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, stride)


def restore(flat: Tensor, other: Tensor) -> Tensor:
    """The inverse of memory_view: a result of the kernels in the shape and memory order of `other`."""
    if other.is_contiguous():
        return flat.view(other.shape)
    n, c, h, w = other.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def spread(values: Tensor, limit: int) -> Tensor:
    """At most `limit` of a flat tensor's values, from all over it.

    A regular stride would meet the same image columns again and again where sizes share a factor with it.
    """
    if values.numel() <= limit:
        return values
    index = torch.arange(limit, device=values.device) * 2_654_435_761 % values.numel()
    return values[index]
