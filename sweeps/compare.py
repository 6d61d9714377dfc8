"""Two trials layer by layer: bits, kept channels and BOPs side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from harness.errors import UserError
from harness.run_dir import RunDir
from harness.tracking.record import trial_dirs

SIDES = ("weight_bits", "activation_bits", "kept_out", "bops")


@dataclass(frozen=True)
class Difference:
    """One layer in both trials; None where a trial does not have the layer. `bops` are in 1e6 bit-operations."""

    name: str
    first: Mapping[str, Any] | None
    second: Mapping[str, Any] | None

    @property
    def equal(self) -> bool:
        """Whether bits and kept channels agree."""
        if self.first is None or self.second is None:
            return False
        return all(
            self.first[key] == self.second[key] for key in ("weight_bits", "activation_bits", "kept_in", "kept_out")
        )


def find(name: str, runs: Path) -> RunDir:
    """A finished trial by its directory, or by (the beginning of) its identity or label under the runs folder.

    Raises `UserError` if there is none, or more than one.
    """
    if Path(name).is_dir():
        candidates = trial_dirs(Path(name))
    else:
        candidates = [run for run in trial_dirs(runs) if _is_called(run, name)]
    finished = [run for run in candidates if run.result() is not None]
    if len(finished) == 1:
        return finished[0]
    if not finished:
        raise UserError(f"no finished trial {name!r}: give a trial's directory, its identity or its label under {runs}")
    listed = ", ".join(str(run.path) for run in finished[:6])
    raise UserError(f"{name!r} fits {len(finished)} trials: {listed}. Give a longer identity or a directory.")


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """All layers of both results, in the order of the first; layers that only the second has come last."""
    one = {layer["name"]: layer for layer in first["layers"]}
    two = {layer["name"]: layer for layer in second["layers"]}
    return [Difference(name, one.get(name), two.get(name)) for name in dict.fromkeys([*one, *two])]


def show(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Print the comparison; layers that differ are bold."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer")
    for side in ("A", "B"):
        for header in ("W", "A", "channels", "MBOPs"):
            table.add_column(f"{side}: {header}", justify="right")
    rows = differences(first, second)
    for row in rows:
        cells = [*_cells(row.first), *_cells(row.second)]
        table.add_row(row.name, *cells, style=None if row.equal else "bold")
    console = Console(highlight=False)
    console.width = max(console.width, 110)
    for side, result in (("A", first), ("B", second)):
        console.print(
            f"{side}: {result['label']} ({result['key']}): top-1 {result['top1']:.2f}%, {result['gbops']:.4g} GBOPs "
            f"({result['bop_reduction']:.1f}x, {result['convention']}), {100 * result['pruned_share']:.1f}% pruned"
        )
    console.print(table)
    console.print(f"{sum(not row.equal for row in rows)} of {len(rows)} layers differ")


def _cells(layer: Mapping[str, Any] | None) -> Sequence[str]:
    if layer is None:
        return ("-",) * len(SIDES)
    channels = f"{layer['kept_out']}/{layer['out_channels']}"
    return (f"{layer['weight_bits']:g}", f"{layer['activation_bits']:g}", channels, f"{layer['bops'] / 1e6:.2f}")


def _is_called(run: RunDir, name: str) -> bool:
    result = run.result()
    return result is not None and (str(result["key"]).startswith(name) or result["label"] == name)
