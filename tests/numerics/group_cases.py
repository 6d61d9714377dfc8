"""What kernels over all weights are compared on: under the interpreter (tests/numerics), on a device (tests/gpu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sbs import weights as eager
from sbs.weights import Masks

GRID = (3, 15, 255)
# every kind of layer, one and several tiles, whole vectors and odd ones
SMALL = ((16, 8, 3, 3), (24, 17, 3, 3), (12, 20), (8, 1, 3, 3), (3, 5, 1, 1))
LARGE = (*SMALL, (512, 512, 3, 3), (1000, 1280), (960, 1, 3, 3), (255, 129, 1, 1), (320, 960, 1, 1))


def weights(shapes: tuple[tuple[int, ...], ...], device: str) -> list[Tensor]:
    """Of different spreads, not centred, the last one constant; every second in channels_last."""
    generator = torch.Generator(device).manual_seed(1)
    made = [
        torch.randn(shape, generator=generator, device=device) * 0.1 * (i + 1) + 0.3 for i, shape in enumerate(shapes)
    ]
    made[-1].fill_(2.5)
    orders = (torch.contiguous_format, torch.channels_last)
    return [w.contiguous(memory_format=orders[i % 2]) if w.dim() == 4 else w for i, w in enumerate(made)]


def masks(of: list[Tensor]) -> list[Masks]:
    """Of both, the rows, the columns, nothing, both in one, by turns; slices of one tensor, as networks have them."""
    generator = torch.Generator("cpu").manual_seed(2)
    total = sum(w.shape[0] + w.shape[1] for w in of)
    kept = (torch.rand(total, generator=generator) < 0.7).float().to(of[0].device)
    result: list[Masks] = []
    for i, w in enumerate(of):
        start, dims = i, w.dim()
        rows = kept[start : start + w.shape[0]].view(-1, *[1] * (dims - 1))
        columns = kept[start : start + w.shape[1]].view(1, -1, *[1] * (dims - 2))
        result.append(((rows, columns), (rows,), (columns,), (), (rows * columns,))[i % 5])
    return result


def compare(made: Any, shapes: tuple[tuple[int, ...], ...], device: str) -> None:
    """Moments, codes and statistics of the module `made` and the batched ones: to the bit, the last within rounding."""
    given = weights(shapes, device)
    steps = torch.tensor([float(GRID[i % 3]) for i in range(len(given))], device=device)
    for own in ([()] * len(given), masks(given)):
        want = eager._moments.eager(given, own)
        for got, wanted in zip(made.moments(given, own), want, strict=True):
            assert torch.equal(got, wanted), (got / wanted - 1).abs().max()
        means, stds = want
        scales = 2.3 * stds
        codes = eager._encode.eager(given, means, scales, steps, torch.float32)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for got, wanted in zip(made.encode(given, means, scales, steps, dtype), codes, strict=True):
                assert got.dtype is dtype
                assert got.stride() == wanted.stride()
                assert torch.equal(got.float(), wanted), int((got.float() != wanted).sum())
        want = eager._statistics.eager(given, means, scales, GRID, own)
        torch.testing.assert_close(made.statistics(given, means, scales, GRID, own), want, rtol=2e-5, atol=0)
    members, sizes, lengths = groups(given)
    wanted = eager._importance.eager(given, members, sizes, lengths)
    torch.testing.assert_close(made.importance(given, members, sizes, lengths), wanted, rtol=1e-5, atol=0)


def groups(of: list[Tensor]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Groups of four output channels, the last of each weight what is left: members, sizes, how many."""
    total = sum(len(w) for w in of)
    starts = [sum(len(w) for w in of[:i]) for i in range(len(of))]
    rows = [
        [*range(start + i, start + min(i + 4, len(w)))]
        for start, w in zip(starts, of, strict=True)
        for i in range(0, len(w), 4)
    ]
    members = torch.tensor([row + [total] * (4 - len(row)) for row in rows], device=of[0].device)
    sizes = torch.tensor([len(row) for row in rows], device=of[0].device)
    return members, sizes, tuple(-(-len(w) // 4) for w in of)
