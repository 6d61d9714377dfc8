"""A frontier from one search against one search per point: seconds of training, and the area under each frontier."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.measure import Row

BUDGETS = (0.05, 0.03, 0.015)
SEEDS = (0,)
SPACE = """
name = "{name}"
recipe = "digits_resnet20"
methods = ["sbs"]
seeds = {seeds}
max_concurrent = 1
[set]
"data.dir" = "{data}"
"run.workers" = 1
{drive}
"""
DRIVES = {
    "one search": f'"search.snapshots" = {list(BUDGETS)}',
    "a search each": f'[axes]\n"search.budget" = {list(BUDGETS)}',
}


@dataclass(frozen=True)
class Measured:
    """One sweep: `seconds` of its trials without full precision; `miss` and `over`: farthest below, above a budget."""

    seconds: float
    hypervolume: float
    miss: float
    over: float


def rows() -> Iterator[Row]:
    """One trial at a time, on otherwise idle cores; both sweeps have the same recipe, seeds and budgets."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="b") as name:
        for title, drive in DRIVES.items():
            found[title] = measured = sweep(Path(name), title, drive)
            yield Row(f"3 budgets, {title}: time in trials", measured.seconds, must=None, unit="s")
            yield Row(f"3 budgets, {title}: hypervolume", measured.hypervolume, must=None)
            yield Row(f"3 budgets, {title}: farthest below its budget", 100 * measured.miss, must=3.0, unit="%")
            yield Row(f"3 budgets, {title}: farthest above its budget", 100 * measured.over, must=0.0, unit="%")
    one, each = (found[title] for title in DRIVES)
    yield Row("one search / a search each: time in trials", one.seconds / each.seconds, must=None)
    share = one.hypervolume / each.hypervolume
    yield Row("one search / a search each: hypervolume", share, must=None)


def sweep(folder: Path, title: str, drive: str) -> Measured:
    """Run one of the two for real."""
    from sweeps.frontier import hypervolume
    from sweeps.outcome import from_folders

    name = title.replace(" ", "_")
    space = folder / f"{name}.toml"
    space.write_text(SPACE.format(name=name, seeds=list(SEEDS), data=folder / "data", drive=drive))
    command = [sys.executable, "-m", "sweeps", "run", str(space), "--out", str(folder / "runs")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, shares = 0.0, []
    for path in (folder / "runs" / name / "trials").glob("*-sbs-*"):
        search = json.loads((path / "config.json").read_text())["search"]
        reduction = json.loads((path / "result.json").read_text())["bop_reduction"]
        seconds += json.loads((path / "wall.json").read_text())["wall_s"]
        shares.append(1 / reduction / search["budget"])
    assert len(shares) == len(BUDGETS) * len(SEEDS)
    area = hypervolume(from_folders([folder / "runs" / name]).rows)
    return Measured(seconds, area, max(0.0, 1 - min(shares)), max(0.0, max(shares) - 1))
