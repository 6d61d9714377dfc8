"""Convolutions of codes in 8-bit integers on CPUs that have instructions for it (VNNI): a third of the time.

The input's codes k are bytes as they are. The weight's codes 2k - n fit a signed byte up to 7 bits; those of 8 bits are
odd, 2m + 1, so that a sum over them is twice the sum over m, and the sum of the input's codes, the same for all
outputs. Sums are exact, so that results equal those of floating point to the bit while these are: below 2**24.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_BYTE_LEVELS = 255
_SIGNED_BYTE_LEVELS = 127
# int32, which the sums are kept in
_SUM_LIMIT = 2**31
# pixels from which on the weight's preparation, which is the same for all of them, pays
_PIXELS = 512
_ops: Any = torch.ops.onednn


class Geometry(NamedTuple):
    """A 2-d convolution but for its sizes; each a list of two, as torch has them."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


_POINT = Geometry([1, 1], [0, 0], [1, 1], 1)


def applies(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether `convolve` may take codes of the input (N, C, H, W) and the weight (O, C, h, w) in its place."""
    return (
        type(x) is Tensor  # a subclass (FakeTensor, say) may have no memory to read
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() >= _PIXELS * x.shape[1]
        and geometry.groups == 1  # depth-wise ones are bound by memory, and gain nothing
        and w.shape[1:].numel() * _BYTE_LEVELS**2 < _SUM_LIMIT
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
        and available()
    )


@functools.cache
def available() -> bool:
    """Whether this CPU has the instructions, and torch adds up the largest products exactly with them."""
    if not torch.cpu.get_capabilities().get("avx512_vnni") or not torch.backends.mkldnn.is_available():
        return False
    shape = (1, 16, 3, 3)
    try:
        x = torch.full(shape, _BYTE_LEVELS, dtype=torch.uint8, device="cpu").to(memory_format=torch.channels_last)
        return all(
            # without the instructions, or with ONEDNN_MAX_CPU_ISA set below them, pairs of products saturate at 2**15
            convolve(x, torch.full(shape, code, device="cpu"), n, _POINT).item() == 144 * 255 * code
            for code, n in ((127, 127), (-127, 127), (255, 255), (-255, 255))
        )
    except (AttributeError, RuntimeError):  # operators that this build of torch lacks, or that take other arguments
        return False


def convolve(x: Tensor, w: Tensor, levels: int, geometry: Geometry) -> Tensor:
    """The convolution of codes, float32 (N, O, H', W') in channels_last.

    x: codes k, uint8, channels_last. w: codes 2k - levels of any type; levels: at most 255.
    """
    if levels <= _SIGNED_BYTE_LEVELS:
        return _convolve(x, w.to(torch.int8), geometry)
    halves = w.to(torch.int16).bitwise_right_shift_(1).to(torch.int8)  # m of 2m + 1
    return _convolve(x, halves, geometry, factor=2.0).add_(_window_sums(x, w, geometry))


def _window_sums(x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    """The sum of codes under the weight's window, (N, 1, H', W'): over channels first, which leaves little."""
    sums = _convolve(x, w.new_ones((1, w.shape[1], 1, 1), dtype=torch.int8), _POINT)
    down, across = geometry.padding
    sums = functional.pad(sums.contiguous(), (across, across, down, down))
    for axis, size, step, apart in zip((2, 3), w.shape[2:], geometry.stride, geometry.dilation, strict=True):
        terms = sums.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart].unbind(-1)
        sums = functools.reduce(torch.add, terms)  # three times as fast as .sum(-1) over so few
    return sums


def _convolve(x: Tensor, w: Tensor, geometry: Geometry, factor: float = 1.0) -> Tensor:
    """factor * convolution of uint8 and int8, channels_last."""
    factors = w.new_full((len(w),), factor, dtype=torch.float32)
    packed = _ops.qconv_prepack(w, factors, 1.0, 0, *geometry, list(x.shape))
    none = w.new_zeros(len(w), dtype=torch.int64)
    y: Tensor = _ops.qconv2d_pointwise(
        *(x, 1.0, 0, packed, factors, none, None, *geometry, 1.0, 0, torch.float32, "none", [], "")
    )
    return y
