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
SHORT = ["pretrain.epochs=4", "search.epochs=2", "finetune.epochs=1"]
FULL = ["python", "-m", "sweeps", "run", "digits_resnet20", *(word for setting in SHORT for word in ("--set", setting))]
ONE = """\
name = "one"
recipe = "digits_resnet20"
methods = ["full_precision"]
seeds = [0]
"""


@pytest.fixture
def clone(cluster: Cluster) -> User:
    """A user with a clean clone of the project and a profile of the site."""
    home = cluster.shared / "clone"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(home)], check=True)
    (home / "site.toml").write_text(PROFILE)
    (home / "one.toml").write_text(ONE)
    return User(cluster, home)


def result_of(home: Path, sweep: str) -> dict[str, Any]:
    """What the full-precision trial of a sweep came to."""
    (path,) = home.glob(f"runs/{sweep}/trials/*full_precision*/result.json")
    return json.loads(path.read_text())


@pytest.mark.timeout(600)
def test_digits_on_two_nodes_and_the_same_result_after_preemption(cluster: Cluster, clone: User):
    done = clone.slurm("submit", "--profile", "site.toml", "--name", "digits", "--wait", "--", *FULL, timeout=420)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = json.loads((clone.home / "runs" / "digits_resnet20" / "pareto.json").read_text())["rows"]
    assert sorted(row["method"] for row in rows) == ["full_precision", "sbs", "sbs", "sbs", "sbs"]
    undisturbed = result_of(clone.home, "digits_resnet20")
    assert undisturbed["stack"]["world_size"] == 2  # of one CPU each, on nodes that offer one each
    wait_until_clean(cluster)

    one = ["one.toml" if word == "digits_resnet20" else word for word in FULL]
    clone.submit("one", "--profile", "site.toml", "--partition", "low", "--set", "node.cpus=1", "--", *one)
    logs = clone.home.glob
    wait_for(
        lambda: any("checkpoint" in p.read_text() for p in logs("runs/one/trials/*/metrics.jsonl")), 120, "checkpoint"
    )
    clone.submit("urgent", "--no-snapshot", "--partition", "high", "--array", "1", "--set", "node.cpus=4", "--", "true")
    assert clone.wait_over("urgent", 120)["state"] == "COMPLETED"
    ended = clone.wait_over("one", 180)
    assert (ended["state"], ended["lives"]) == ("COMPLETED", 2), clone.log("one")
    assert clone.lives("one")[0]["stopped_by"] == "preempted"
    after = result_of(clone.home, "one")
    for figure in ("key", "top1", "top5", "loss", "gbops"):
        assert after[figure] == undisturbed[figure], figure
