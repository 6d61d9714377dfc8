"""The product on a real SLURM: a sweep of two-node trials as a user submits it, and one that is interrupted."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import REPOSITORY, Cluster
from tests.slurm.conftest import User, wait_for, wait_until_clean

PROFILE = """
[job]
nodes = 2
time = "20:00"
[node]
cpus = 1
memory_gb = 3
[requeue]
warn_s = 60
"""
SHORT = ["pretrain.epochs=3", "search.epochs=1", "finetune.epochs=1"]
SETTINGS = [word for setting in SHORT for word in ("--set", setting)]
ONE = """\
name = "one"
recipe = "digits_resnet20"
methods = ["full_precision"]
seeds = [0]
"""


@pytest.fixture(scope="module")
def clone(cluster: Cluster) -> User:
    """A user with a clean clone of the project and a profile of the site."""
    home = cluster.shared / "clone"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(home)], check=True)
    (home / "site.toml").write_text(PROFILE)
    (home / "one.toml").write_text(ONE)
    cluster.wait_idle()
    return User(cluster, home)


@pytest.fixture(scope="module")
def undisturbed(clone: User) -> dict[str, Any]:
    """The full-precision trial of the digits sweep, submitted and waited for by one command."""
    command = ["python", "-m", "sweeps", "run", "sweeps/spaces/digits_resnet20.toml", *SETTINGS]
    done = clone.slurm("submit", "--profile", "site.toml", "--name", "digits", "--wait", "--", *command, timeout=840)
    assert done.returncode == 0, done.stdout[-3000:]
    return result_of(clone.home, "digits_resnet20")


def result_of(home: Path, sweep: str) -> dict[str, Any]:
    """What the full-precision trial of a sweep came to."""
    (path,) = home.glob(f"runs/{sweep}/trials/*full_precision*/result.json")
    return json.loads(path.read_text())


@pytest.mark.timeout(900)
def test_digits_on_two_nodes(cluster: Cluster, clone: User, undisturbed: dict[str, Any]):
    rows = json.loads((clone.home / "runs" / "digits_resnet20" / "pareto.json").read_text())["rows"]
    assert sorted(row["method"] for row in rows) == ["full_precision", "sbs", "sbs", "sbs", "sbs"]
    assert undisturbed["stack"]["world_size"] == 2  # of one CPU each, on nodes that offer one each
    assert (clone.status("digits")["state"], clone.status("digits")["lives"]) == ("COMPLETED", 1)
    wait_until_clean(cluster)


@pytest.mark.timeout(300)
def test_preempted_trial_comes_to_the_same_result(cluster: Cluster, clone: User, undisturbed: dict[str, Any]):
    low = ["--profile", "site.toml", "--partition", "low"]
    clone.submit("one", *low, "--", "python", "-m", "sweeps", "run", "one.toml", *SETTINGS)

    def covered() -> bool:
        return any('"checkpoint"' in path.read_text() for path in clone.home.glob("runs/one/trials/*/metrics.jsonl"))

    wait_for(covered, 120, "checkpoint")
    clone.submit("urgent", "--no-snapshot", "--partition", "high", "--array", "1", "--set", "node.cpus=4", "--", "true")
    assert clone.wait_over("urgent", 120)["state"] == "COMPLETED"
    ended = clone.wait_over("one", 180)
    assert (ended["state"], ended["lives"]) == ("COMPLETED", 2), clone.log("one")
    assert clone.lives("one")[0]["stopped_by"] == "preempted"
    after = result_of(clone.home, "one")
    for figure in ("key", "top1", "top5", "loss", "gbops"):
        assert after[figure] == undisturbed[figure], figure
    wait_until_clean(cluster)
