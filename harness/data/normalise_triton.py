"""The kernel of `normalise` in Triton; the only module of this room that imports it, and only where there is a GPU."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _kernel(levels, table, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = start + lane < count
    level = tl.load(levels + start + lane, mask=inside, other=0).to(tl.int32)
    channel = ((start % 3).to(tl.int32) + lane) % 3
    tl.store(out + start + lane, tl.load(table + channel * 256 + level), mask=inside)


def launch(levels: Tensor, table: Tensor, out: Tensor) -> None:
    """See `normalise`; on the current stream."""
    count = levels.numel()
    _kernel[(triton.cdiv(count, _BLOCK),)](levels, table, out, count, BLOCK=_BLOCK)
