"""What a benchmark is made of: a row with its limit, and fair ways to take a time or compare two."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal


class NotHereError(Exception):
    """This machine lacks what the benchmark measures (a GPU, a service); the message says what."""


@dataclass(frozen=True)
class Estimate:
    """The median of repeats, and an interval that holds the true median with at least 95% (from 6 repeats on)."""

    value: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Row:
    """One figure: MET is judged on the estimate itself, the interval stands beside it.

    `must` is the limit, None where there is none; `at_least` says that it bounds from below. `wanted` is a goal beyond,
    which never fails a run.
    """

    name: str
    figure: float | Estimate
    must: float | None
    unit: str = ""
    at_least: bool = False
    wanted: float | None = None

    @property
    def value(self) -> float:
        """The number that is held against the limit."""
        return self.figure.value if isinstance(self.figure, Estimate) else self.figure

    @property
    def verdict(self) -> Literal["MET", "MISS", ""]:
        """A figure that is not a number is a miss; one without a limit gets no verdict."""
        if self.must is None:
            return ""
        return "MET" if (self.value >= self.must if self.at_least else self.value <= self.must) else "MISS"


def estimate(samples: Sequence[float]) -> Estimate:
    """Median and its distribution-free interval by order statistics: min to max for 7 repeats (98.4%)."""
    ordered = sorted(samples)
    n = len(ordered)
    outside = 0
    # Leaving out k at either end, the interval misses the median with 2 P(Binomial(n, 1/2) <= k).
    while 2 * sum(math.comb(n, k) for k in range(outside + 2)) / 2**n <= 0.05:
        outside += 1
    return Estimate(median(ordered), ordered[outside], ordered[n - 1 - outside], n)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def repeated(work: Callable[[], object], repeats: int = 7, warmup: int = 1) -> Estimate:
    """Wall seconds of one call, over repeats."""
    for _ in range(warmup):
        work()
    return estimate([seconds(work) for _ in range(repeats)])


def ratio(work: Callable[[], object], baseline: Callable[[], object], repeats: int = 7, warmup: int = 1) -> Estimate:
    """Time of `work` over time of `baseline`, pair by pair, the order within a pair swapped each time.

    Machines speed up and slow down in the course of seconds; neighbours in time share the same weather.
    """
    for _ in range(warmup):
        work()
        baseline()
    ratios = []
    for repeat in range(repeats):
        if repeat % 2:
            below, above = seconds(baseline), seconds(work)
        else:
            above, below = seconds(work), seconds(baseline)
        ratios.append(above / below)
    return estimate(ratios)
