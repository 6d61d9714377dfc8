"""Finished trials as rows, the Pareto set over them, hypervolume, and the spread over seeds. Pure functions."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HYPERVOLUME_DEPTH = 10.0
"""The hypervolume's reference lies this many points of top-1 below full precision."""


DIGITS = {
    "top1": 4, "top5": 4, "gbops": 6, "bop_reduction": 4, "mean_weight_bits": 4, "mean_activation_bits": 4,
    "pruned_share": 6,
}  # fmt: skip
"""Decimals that a row keeps; rounding comes first, so that the frontier follows from the figures as printed."""


@dataclass(frozen=True)
class Row:
    """One finished trial: `top1`, `top5` in percent, `gbops` in 1e9 bit-operations, `pruned_share` of channels, 0 to 1.

    `trial` is the trial's identity (the MLflow tag `harness.key`), `point` the same without the seed; `data` names the
    data set: rows of different data sets are never compared. `target`: the budget that a search without lambda had, or
    the policy that was given.
    """

    experiment: str
    model: str
    data: str
    seed: int
    trial: str
    point: str
    method: str
    lambda_: float | None
    top1: float
    top5: float
    gbops: float
    bop_reduction: float
    mean_weight_bits: float
    mean_activation_bits: float
    pruned_share: float
    params: int
    convention: str
    target: str = ""

    @classmethod
    def of(cls, experiment: str, result: Mapping[str, Any]) -> "Row":
        """A row from a summary as `harness.tracking` reads it, from a store or from a run directory."""
        pressure = result["lambda"]
        return cls(
            experiment=experiment,
            model=str(result["model"]),
            data=str(result["data"]),
            seed=int(result["seed"]),
            trial=str(result["key"]),
            point=str(result["point"]),
            method=str(result["method"]),
            lambda_=None if pressure is None else float(pressure),
            top1=_rounded(result, "top1"),
            top5=_rounded(result, "top5"),
            gbops=_rounded(result, "gbops"),
            bop_reduction=_rounded(result, "bop_reduction"),
            mean_weight_bits=_rounded(result, "mean_weight_bits"),
            mean_activation_bits=_rounded(result, "mean_activation_bits"),
            pruned_share=_rounded(result, "pruned_share"),
            params=int(result["params"]),
            convention=str(result["convention"]),
            target=str(result.get("target", "")),
        )

    @property
    def drive(self) -> str:
        """As tables show it: the lambda or the budget of a search, or the policy that was given; else empty."""
        return self.target if self.lambda_ is None else f"{self.lambda_:g}"

    @property
    def family(self) -> tuple[str, str]:
        """Rows of one family (model, data set) compete with each other."""
        return (self.model, self.data)


@dataclass(frozen=True)
class Frontier:
    """All rows, sorted by model, gbops, trial; `best` holds the (experiment, trial) pairs that nothing dominates."""

    experiments: tuple[str, ...]
    rows: tuple[Row, ...]
    best: frozenset[tuple[str, str]]

    def is_best(self, row: Row) -> bool:
        """Whether no other row of the same model and data has at least its top-1 at no more BOPs."""
        return (row.experiment, row.trial) in self.best

    def families(self) -> list[tuple[str, str]]:
        """The (model, data) pairs in order."""
        return sorted({row.family for row in self.rows})

    def of_family(self, family: tuple[str, str]) -> list[Row]:
        """The rows of one (model, data) pair, in order."""
        return [row for row in self.rows if row.family == family]


@dataclass(frozen=True)
class SeedGroup:
    """The same configuration over several seeds; standard deviations are those of a sample (n - 1), 0 for one seed."""

    experiment: str
    model: str
    method: str
    lambda_: float | None
    drive: str
    seeds: int
    top1_mean: float
    top1_std: float
    gbops_mean: float
    gbops_std: float
    bop_reduction_mean: float


def build(experiments: Sequence[str], rows: Iterable[Row]) -> Frontier:
    """Sort the rows and mark the Pareto set: no row of the family is as good in both and better in one.

    A trial counts once, however often it is given (an experiment named twice, a folder and its copy).
    """
    once = {(row.experiment, row.trial): row for row in rows}
    ordered = sorted(once.values(), key=lambda row: (row.model, row.gbops, row.trial, row.experiment))
    best: set[tuple[str, str]] = set()
    for family in {row.family for row in ordered}:
        best |= {(row.experiment, row.trial) for row in pareto([row for row in ordered if row.family == family])}
    return Frontier(tuple(dict.fromkeys(experiments)), tuple(ordered), frozenset(best))


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other row dominates (more top-1 is better, fewer gbops are better); exact ties all stay."""
    chosen: list[Row] = []
    ceiling = -math.inf  # best top-1 among rows with strictly fewer BOPs
    by_cost = sorted(rows, key=lambda row: row.gbops)
    start = 0
    while start < len(by_cost):
        stop = start
        while stop < len(by_cost) and by_cost[stop].gbops == by_cost[start].gbops:
            stop += 1
        group = by_cost[start:stop]
        top = max(row.top1 for row in group)
        if top > ceiling:
            chosen += [row for row in group if row.top1 == top]
            ceiling = top
        start = stop
    return chosen


def reference(rows: Sequence[Row]) -> tuple[float, float]:
    """The hypervolume's reference point (BOP reduction, top-1): 1x, and full precision's mean top-1 less 10 points."""
    full = [row.top1 for row in rows if row.method == "full_precision"]
    return (1.0, statistics.fmean(full) - HYPERVOLUME_DEPTH if full else 0.0)


def hypervolume(rows: Sequence[Row]) -> float:
    """Area that the rows dominate, in doublings of the BOP reduction times points of top-1, beyond `reference`."""
    _, floor = reference(rows)
    area = 0.0
    height = 0.0
    # From the greatest reduction to the least: each row adds the strip in which it is the best so far.
    for row in sorted(rows, key=lambda row: (-row.bop_reduction, -row.top1)):
        gain = max(row.top1 - floor, 0.0) - height
        if gain > 0.0:
            area += gain * max(math.log2(row.bop_reduction), 0.0)
            height += gain
    return area


def over_seeds(rows: Sequence[Row]) -> list[SeedGroup]:
    """Mean and spread of the rows that differ in the seed alone, sorted by experiment, model and BOPs."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.experiment, row.point), []).append(row)
    found = [_seed_group(group) for group in groups.values()]
    return sorted(found, key=lambda g: (g.experiment, g.model, g.gbops_mean, g.method, g.lambda_ or 0.0))


def _rounded(result: Mapping[str, Any], name: str) -> float:
    return round(float(result[name]), DIGITS[name])


def _seed_group(rows: Sequence[Row]) -> SeedGroup:
    def mean_std(values: list[float]) -> tuple[float, float]:
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    top1, gbops = mean_std([row.top1 for row in rows]), mean_std([row.gbops for row in rows])
    reduction = statistics.fmean(row.bop_reduction for row in rows)
    first = rows[0]
    return SeedGroup(
        first.experiment, first.model, first.method, first.lambda_, first.drive, len(rows), *top1, *gbops, reduction
    )  # fmt: skip
