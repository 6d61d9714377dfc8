"""One real SLURM for all tests here; its login node is where they run `python -m slurm`."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, obstacle

PROGRAMS = Path(__file__).parent / "programs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = obstacle()
    if reason is not None:
        pytest.skip(f"no SLURM cluster on this machine: {reason}")
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))  # not without `down`
    cluster = Cluster()
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        signal.signal(signal.SIGTERM, before)


class User:
    """A user with a project folder on the cluster's shared storage."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.cluster, self.home = cluster, home

    def slurm(self, *arguments: str, check: bool = True, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run `python -m slurm` on the login node."""
        command = [sys.executable, "-m", "slurm", *arguments]
        return self.cluster.login(command, cwd=self.home, check=check, timeout=timeout)

    def submit(self, name: str, *arguments: str) -> str:
        """Submit and return the job's id."""
        said = self.slurm("submit", "--name", name, *arguments).stdout
        return said.split("as job ")[1].split(";")[0]

    def status(self, which: str) -> dict[str, Any]:
        """The one entry of `status --json`."""
        (task,) = json.loads(self.slurm("status", "--json", which).stdout)
        return task

    def log(self, which: str, rank: int = 0) -> str:
        return self.slurm("logs", "--rank", str(rank), which).stdout

    def log_so_far(self, which: str) -> str:
        return self.slurm("logs", which, check=False).stdout

    def lives(self, which: str) -> list[dict[str, Any]]:
        """What the launchers wrote about each life, oldest first."""
        folder = Path(self.status(which)["folder"])
        found = [json.loads(path.read_text()) for path in folder.glob("task-0/life-*/life.json")]
        return sorted(found, key=lambda life: life["started_unix_s"])

    def accounting(self, job_id: str) -> list[list[str]]:
        """SLURM's own words on every life of a job: state and exit code."""
        fields = ["-n", "-P", "-X", "-D", "-j", job_id, "-o", "State,ExitCode"]
        return [line.split("|") for line in self.cluster.login(["sacct", *fields]).stdout.splitlines()]

    def processes(self, node: str) -> list[str]:
        """The command lines of this user's job on a node."""
        listed = self.cluster.on(node, ["ps", "-ww", "-eo", "args"]).stdout.splitlines()
        return [line for line in listed if str(self.home) in line]

    def wait_over(self, which: str, limit_s: float = 120) -> dict[str, Any]:
        wait_for(lambda: self.status(which)["state"] not in LIVE, limit_s, f"the end of {which}", every_s=0.5)
        return self.status(which)


LIVE = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "UNKNOWN"}


def wait_for(condition: Callable[[], bool], limit_s: float, what: str, every_s: float = 0.2) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"no {what} within {limit_s:.0f} s"
        time.sleep(every_s)


@pytest.fixture
def user(cluster: Cluster, request: pytest.FixtureRequest) -> User:
    home = cluster.shared / request.node.name.replace("[", "-").replace("]", "")
    shutil.copytree(PROGRAMS, home)
    cluster.wait_idle()
    return User(cluster, home)


def wait_until_clean(cluster: Cluster, limit_s: float = 20) -> None:
    """The nodes hold nothing of any job; SLURM's own step daemons may take a moment to go."""
    end = time.monotonic() + limit_s
    while left := leftovers(cluster):
        assert time.monotonic() < end, "\n".join(f"left on {node}:\n{what}" for node, what in left.items())
        time.sleep(0.2)


def _is_shared(path: Path, cluster: Cluster) -> bool:
    """Whether a path on a node is, holds, or lies in what all nodes share: the cluster's base, and this checkout."""
    shared = (cluster.base, Path(__file__).resolve().parents[2])
    return any(path.is_relative_to(folder) or folder.is_relative_to(path) for folder in shared)


def leftovers(cluster: Cluster, own: Sequence[str] = ("slurmd -D", "ps -eo", "bash -c")) -> dict[str, str]:
    """What lies or runs on the nodes that is not the nodes' own, by node; nothing if all is clean."""
    found = {}
    for node in cluster.names:
        files = cluster.on(node, ["find", "/tmp", "/dev/shm", "-mindepth", "1"]).stdout
        running = cluster.on(node, ["ps", "-eo", "args"]).stdout.splitlines()[1:]
        foreign = [line for line in running if not any(word in line for word in own)]
        shown = "\n".join([*foreign, *(line for line in files.splitlines() if not _is_shared(Path(line), cluster))])
        if shown:
            found[node] = shown
    return found
