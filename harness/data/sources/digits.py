"""scikit-learn's 1,797 handwritten digits (8x8, 17 greys) as 32x32 RGB images: 1,438 to train on, 359 to validate."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from harness.data.manifest import Split
from harness.data.randomness import permutation
from harness.data.sources.base import Scan, SplitScan

_SPLIT_SEED = 20
_VAL_SHARE = 0.2


@cache
def _images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return grey, digits.target.astype(np.int64)


@dataclass(frozen=True)
class Digits:
    """The split is stratified and fixed: of each digit, a fifth validates."""

    spec: str = "digits"
    small: bool = True

    def scan(self) -> Scan:
        """See `Source.scan`."""
        _, labels = _images()
        val = np.zeros(len(labels), bool)
        for digit in range(10):
            members = np.flatnonzero(labels == digit)
            val[members[permutation(len(members), _SPLIT_SEED, digit)[: round(len(members) * _VAL_SHARE)]]] = True
        parts: dict[Split, NDArray[np.int64]] = {"train": np.flatnonzero(~val), "val": np.flatnonzero(val)}
        splits = {split: SplitScan(numbers.tolist(), labels[numbers]) for split, numbers in parts.items()}
        return Scan(tuple(str(digit) for digit in range(10)), splits)

    def read(self, ref: int) -> NDArray[np.uint8]:
        """Four times larger, bilinear between pixel centres."""
        at = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
        low = np.minimum(at.astype(int), 6)
        weight = np.zeros((32, 8))
        weight[np.arange(32), low], weight[np.arange(32), low + 1] = 1 - (at - low), at - low
        grey = np.rint(weight @ _images()[0][ref] @ weight.T).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)

    def describe(self, ref: int) -> str:
        """See `Source.describe`."""
        return f"digit number {ref}"
