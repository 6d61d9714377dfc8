"""Rows for tests: only what a test is about has to be named."""

from typing import Any

from sweeps.frontier import Row


def summary(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "key": "k", "model": "resnet20", "data": "digits", "seed": 0, "point": "p", "method": "sbs", "lambda": 0.1,
        "top1": 90.0, "top5": 99.0, "gbops": 1.0, "bop_reduction": 40.0, "mean_weight_bits": 4.0,
        "mean_activation_bits": 5.0, "pruned_share": 0.25, "params": 1000, "convention": "mac_product",
    }  # fmt: skip
    return values | changes


def row(experiment: str = "e", **changes: Any) -> Row:
    return Row.of(experiment, summary(**changes))
