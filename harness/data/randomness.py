"""Random numbers as a pure function of counters: the same on every machine, thread count, numpy version and backend."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014); uint64 in, uint64 out, elementwise."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def keys(*counters: ArrayLike) -> NDArray[np.uint64]:
    """One 64-bit key for each element of the broadcast counters (integers, e.g. seed, epoch, sample)."""
    with np.errstate(over="ignore"):
        key = np.zeros((), np.uint64)
        for counter in counters:
            key = _mix(key * _MIX_2 + np.asarray(counter).astype(np.uint64) + _GOLDEN)
    return np.asarray(key)


def uniforms(key: NDArray[np.uint64], draws: int) -> NDArray[np.float64]:
    """`draws` numbers in [0, 1) for every key: shape (*key.shape, draws)."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(key[..., None] + steps) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def permutation(count: int, *counters: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1 that depends on the counters alone."""
    return np.argsort(keys(*counters, np.arange(count)), kind="stable")
