"""What a loader delivers, apart from how: order, augmentations, sizes, normalisation. Shared by both backends."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from harness.data.augment import Augment, Plan, eval_plan, train_plan
from harness.data.beton import DamagedFileError, Index
from harness.data.manifest import remedy
from harness.data.memory import Memory
from harness.data.order import Order, eval_order, quasi_random_order, train_batches, train_order

# Samples of a window of the quasi-random order, in pages: what one rank holds in memory.
WINDOW_PAGES = 32


@dataclass(frozen=True)
class Pipeline:
    """One rank's view of one split.

    `batch_size` is per rank; `table` maps channel and byte to what the host delivers; `sizes` holds (first epoch, side
    in pixels) of a progressive resizing, in order.
    """

    index: Index
    train: bool
    batch_size: int
    seed: int
    rank: int
    world: int
    image_size: int
    augment: Augment
    crop_share: float
    order_kind: Order
    memory: Memory
    table: NDArray[np.uint8] | NDArray[np.float32] | NDArray[np.int16]
    fill: NDArray[np.uint8]
    threads: int
    sizes: tuple[tuple[int, int], ...] = ()
    stall_limit_s: float = 600.0

    def __len__(self) -> int:
        if self.train:
            return train_batches(len(self.index), self.batch_size, self.world)
        mine = len(eval_order(len(self.index), rank=self.rank, world=self.world))
        return (mine + self.batch_size - 1) // self.batch_size

    def order(self, epoch: int) -> NDArray[np.int64]:
        """This rank's samples of an epoch, batch after batch."""
        count = len(self.index)
        if not self.train:
            return eval_order(count, rank=self.rank, world=self.world)
        place = {"seed": self.seed, "epoch": epoch, "rank": self.rank, "world": self.world}
        if self.order_kind == "random":
            return train_order(count, self.batch_size, **place)
        pages = self.index.offsets // self.index.page_bytes
        window = max(WINDOW_PAGES * count // len(np.unique(pages)), self.batch_size)
        return quasi_random_order(pages, self.batch_size, window=window, **place)

    def size(self, epoch: int) -> int:
        """Side of the images in an epoch, in pixels."""
        return next((size for start, size in reversed(self.sizes) if epoch >= start), self.image_size)

    def plan(self, samples: NDArray[np.int64], epoch: int, size: int) -> Plan:
        """What happens to each of these samples in this epoch, at an output of size x size."""
        heights, widths = self.index.heights[samples], self.index.widths[samples]
        if not self.train:
            return eval_plan(heights, widths, self.crop_share)
        return train_plan(self.augment, size, heights, widths, samples, seed=self.seed, epoch=epoch)


class Backend(Protocol):
    """Carries out a `Pipeline`."""

    name: str

    def batches(
        self, epoch: int, order: NDArray[np.int64], size: int
    ) -> Iterator[tuple[NDArray[np.uint8] | NDArray[np.float32] | NDArray[np.int16], NDArray[np.int64]]]:
        """Yield (images (n, size, size, 3) of the table's type, labels (n,)), valid until the next is asked for."""

    def close(self) -> None:
        """End threads and processes."""


def undecodable(path: Path, sample: int) -> DamagedFileError:
    """The error for an image inside a file that does not decode."""
    return DamagedFileError(
        f"{path}: the image of sample {sample} does not decode (damaged JPEG). "
        f"See `python -m harness data check {path.parent} --deep`{remedy(path.parent)}"
    )
