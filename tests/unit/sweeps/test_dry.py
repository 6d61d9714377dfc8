import re
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.dry import epochs, outlook
from sweeps.space import base_recipe, load_space, space_names


def dry_run(tmp_path: Path, space: str, *more: str) -> str:
    command = [sys.executable, "-m", "sweeps", "run", space, "--dry-run", "--out", str(tmp_path / "runs"), *more]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("name", space_names())
def test_every_space_can_be_looked_at_without_its_data_and_machine(tmp_path: Path, name: str):
    output = dry_run(tmp_path, name, "--set", f"data.dir={tmp_path / 'data'}")
    space = load_space(name)
    expected = len(space.seeds)  # of full precision
    points = len(list(space.points())) * max(1, len(space.set.get("search.snapshots", ())))
    for method in space.methods:
        expected += len(space.seeds) * (1 if method.startswith("uniform") else points)
    assert f"{expected} trials, " in output
    assert output.count("to run") == expected
    assert not (tmp_path / "runs").exists()


def test_what_cannot_start_here_is_said_and_no_failure(tmp_path: Path):
    data = f"data.dir={tmp_path / 'data'}"
    output = dry_run(tmp_path, "digits_resnet20", "--set", data, "--set", "run.workers=64")
    assert "64 x (1 CPU)" in output
    assert "cannot start here: sweep 'digits_resnet20' can never start" in output
    output = dry_run(tmp_path, "digits_resnet20", "--set", data, "--set", "model.weights=absent.pt")
    assert "cannot start here: model.weights = absent.pt is not a file" in output
    assert re.search(r"resnet20-sbs-lambda0-seed0 +- ", output), "no identity without the weights"


def test_snapshots_count_their_search_once(tmp_path: Path):
    space = load_space("digits_snapshots")
    seen = outlook(space, base_recipe(space, [f"data.dir={tmp_path / 'data'}"]), tmp_path / "runs")
    assert {spec.label: epochs(spec.recipe) for spec in seen.plan.trials} == {
        "resnet20-full_precision-seed0": 8,
        "resnet20-sbs-snapshot0.015-seed0": 8,
        "resnet20-sbs-snapshot0.05-seed0": 4,
        "resnet20-sbs-snapshot0.03-seed0": 4,
    }
    assert not seen.remarks


def test_a_budget_out_of_reach_is_remarked_upon(tmp_path: Path):
    space = load_space("digits_snapshots")
    changes = [f"data.dir={tmp_path / 'data'}", "search.snapshots=[0.05, 0.001]"]
    (remark,) = outlook(space, base_recipe(space, changes), tmp_path / "runs").remarks
    assert remark.startswith("cannot start: search.budget or search.snapshots: 0.001 of full precision's 41.7927 GBOPs")
