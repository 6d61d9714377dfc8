"""Which samples a rank sees, in which order: functions of (seed, epoch, rank, world), so that any step can be resumed.

Training: every rank gets equally many batches; the samples left over are others in each epoch. Validation: the ranks'
shards together are every sample once, in file order, without padding; ranks may differ by one sample.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.data.randomness import keys, permutation

Order = Literal["random", "quasi_random"]
_PAGES, _WINDOW = 1, 2  # tell the uses of one seed apart


def train_batches(count: int, batch_size: int, world: int) -> int:
    """Training batches of each rank in an epoch; `batch_size` is per rank."""
    return count // (batch_size * world)


def train_order(count: int, batch_size: int, *, seed: int, epoch: int, rank: int, world: int) -> NDArray[np.int64]:
    """The samples of one rank, batch after batch. Global batches depend on batch_size * world alone."""
    batches = train_batches(count, batch_size, world)
    everyone = permutation(count, seed, epoch)[: batches * batch_size * world]
    return everyone[rank::world]


def quasi_random_order(
    pages: NDArray[np.int64], batch_size: int, *, seed: int, epoch: int, rank: int, world: int, window: int
) -> NDArray[np.int64]:
    """Like `train_order`, but one rank needs few pages at a time: for files that do not fit into memory.

    `pages` holds the page number of every sample. Pages are shuffled and dealt to the ranks as equal runs of samples;
    samples are shuffled within windows of `window` samples.
    """
    count = len(pages)
    per_rank = train_batches(count, batch_size, world) * batch_size
    page_key = keys(seed, epoch, _PAGES, pages)
    by_page = np.lexsort((np.arange(count), page_key))
    mine = by_page[rank * per_rank : (rank + 1) * per_rank]
    return mine[np.lexsort((keys(seed, epoch, _WINDOW, mine), np.arange(len(mine)) // window))]


def eval_order(count: int, *, rank: int, world: int) -> NDArray[np.int64]:
    """The validation samples of one rank: an equal run of the file, to within one sample."""
    return np.arange(rank * count // world, (rank + 1) * count // world)
