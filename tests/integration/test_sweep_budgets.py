"""Budgets in sweeps through the real Ray Tune and MLflow, with trials that do not train."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration import test_sweep
from tests.integration.test_sweep import Bench, read

pytestmark = [pytest.mark.ray, pytest.mark.integration, pytest.mark.timeout(400)]
bench = test_sweep.bench

SPACE = """
name = "tiny"
recipe = "digits_resnet20"
methods = {methods}
retries = 0

[set]
"data.dir" = "{data}"
"run.workers" = 1
"search.snapshots" = [0.05, 0.03, 0.015]
# {lambdas} {more}
"""
FULL = "resnet20-full_precision-seed0"
SEARCH, FIRST, SECOND = (f"resnet20-sbs-snapshot{budget}-seed0" for budget in (0.015, 0.05, 0.03))


@pytest.fixture(autouse=True)
def _space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_sweep, "SPACE", SPACE)


def begun(bench: Bench) -> list[str]:
    """Labels of the trials whose processes have begun, in the order of their beginnings."""
    lives = sorted((bench.sweep / "trials").glob("*/lives"), key=lambda path: path.stat().st_mtime_ns)
    return [path.parent.name.rpartition("-")[0] for path in lives]


def test_snapshots_wait_for_their_search_and_are_told_apart(bench: Bench, tmp_path: Path):
    bench.runs.mkdir()
    switch = bench.runs / f"fail-{SEARCH}"
    switch.touch()
    status, output = bench.run()
    assert status == 1, output
    assert f"failed: {SEARCH}: {SEARCH} was told to fail" in output
    for label in (FIRST, SECOND):
        assert f"failed: {label}: the search that it is a snapshot of did not finish: {SEARCH}" in output
    assert begun(bench) == [FULL, SEARCH], "nobody else began to search"

    switch.unlink()
    status, output = bench.run()
    assert status == 0, output
    assert "4 trials, 1 done, 3 to run" in output
    assert begun(bench)[:2] == [FULL, SEARCH]
    assert set(begun(bench)[2:]) == {FIRST, SECOND}
    rows = json.loads((bench.sweep / "pareto.json").read_text())["rows"]
    assert [(row["method"], row["lambda"]) for row in rows] == [("sbs", None)] * 3 + [("full_precision", None)]
    assert [row["gbops"] for row in rows] == pytest.approx([0.6, 1.2, 2.0, 40.0])
    table = (bench.sweep / "pareto.md").read_text()
    for words in ["lambda or budget", "| snapshot 0.05 ", "| snapshot 0.03 ", "| snapshot 0.015 "]:
        assert words in table

    # The store knows as much as the folders.
    command = [sys.executable, "-m", "sweeps", "pareto", "--experiment", "tiny", "--runs", str(bench.runs)]
    subprocess.run([*command, "--out", str(tmp_path / "out")], check=True, timeout=120)
    assert read(tmp_path / "out") == read(bench.sweep)


def test_a_budget_out_of_reach_stops_a_sweep_before_its_first_trial(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(test_sweep, "SPACE", SPACE.replace("0.015]", "0.001]"))
    status, output = bench.run()
    assert status == 2, output
    assert "error: search.budget or search.snapshots: 0.001 of full precision's 41.7927 GBOPs cannot be met" in output
    assert not (bench.sweep / "trials").exists()
