"""What a job costs beside its command: on a real SLURM of two nodes, which here share this machine's processors."""

import shutil
import sys
import time
from collections.abc import Iterator
from datetime import datetime

from tests.benchmarks.measure import NotHereError, Row, estimate, repeated
from tests.slurm.cluster import Cluster, obstacle
from tests.slurm.conftest import PROGRAMS, User

REPEATS = 3
JOB = ["--no-snapshot", "--nodes", "2", "--set", "node.cpus=1", "--set", "node.memory_gb=2", "--time", "10", "--wait"]
# The first life leaves as if it had been asked to, the second says when it began.
TWICE = "date +%s.%N >> began; [ $(wc -l < began) -ge 2 ] || exit 85; date +%s.%N > ended"


def job_time(cluster: Cluster, job_id: str, field: str) -> float:
    """A time of the job as SLURM wrote it down, to the second."""
    return datetime.fromisoformat(cluster.job(job_id)[field]).astimezone().timestamp()


def measure(cluster: Cluster, user: User, number: int) -> tuple[float, float, float]:
    """One job of two lives: seconds to its first line, after its end, lost by the requeue without the queue's wait."""
    began, ended = user.home / "began", user.home / "ended"
    began.unlink(missing_ok=True)
    name = f"job{number}"
    user.slurm("submit", *JOB, "--name", name, "--", "sh", "-c", TWICE)
    job_id = user.status(name)["job_id"]
    first, second = user.lives(name)
    start = job_time(cluster, job_id, "StartTime")  # of the last life
    first_line_s = float(began.read_text().split()[1]) - start
    end_s = job_time(cluster, job_id, "EndTime") - float(ended.read_text())
    lost_s = first["ended_unix_s"] - first["command_ended_unix_s"] + second["command_started_unix_s"] - start
    return first_line_s, end_s, lost_s


def rows() -> Iterator[Row]:
    """Seconds, from SLURM's times and the command's own clock."""
    reason = obstacle()
    if reason is not None:
        raise NotHereError(reason)
    cluster = Cluster()
    try:
        started = time.monotonic()
        cluster.up()
        yield Row("SLURM of two nodes up", time.monotonic() - started, must=20.0, unit="s")
        user = User(cluster, cluster.shared / "home")
        shutil.copytree(PROGRAMS, user.home)
        measured = [measure(cluster, user, number) for number in range(REPEATS)]
        first_line, end, lost = (estimate(column) for column in zip(*measured, strict=True))
        yield Row("job's start to the command's first line, Ray on two nodes", first_line, must=20.0, unit="s")
        yield Row("command's end to the job's", end, must=5.0, unit="s")
        yield Row("lost per requeue, beyond the queue's wait", lost, must=30.0, unit="s")
        status = [sys.executable, "-m", "slurm", "status"]
        look = repeated(lambda: cluster.login(status, cwd=user.home))
        yield Row("`python -m slurm status`", look, must=0.7, unit="s")
    finally:
        cluster.down()
