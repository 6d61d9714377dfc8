"""Questions to SLURM and requests of it, through its own commands; the parsing is pure."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from harness.errors import UserError

_LIMIT_S = 30.0
DEFAULT_KILL_WAIT_S = 30.0
_ACCESS = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"})
_RANGE = re.compile(r"^(?P<job>\d+)_\[(?P<items>[\d,\-]+)(?:%\d+)?\]$")
# States in which a job is still to run, or runs.
LIVE_STATES = frozenset(
    {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING"}
    | {"SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESV_DEL_HOLD"}
)


@dataclass(frozen=True)
class JobView:
    """A job as SLURM sees it at this moment; `ends_in_s` until its time limit, or until preemption's grace is over."""

    state: str
    preempted: bool
    ends_in_s: float | None
    reason: str = ""
    nodes: str = ""
    elapsed_s: int | None = None
    exit_status: int | None = None
    restarts: int = 0


def available() -> bool:
    """Whether SLURM's commands are on the PATH."""
    return shutil.which("srun") is not None and shutil.which("sbatch") is not None


def call(command: Sequence[str], *, limit_s: float = _LIMIT_S) -> str:
    """Run one of SLURM's commands and return what it printed; raises `UserError` with what it complained about."""
    try:
        done = subprocess.run(
            list(command), text=True, capture_output=True, timeout=limit_s, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on the PATH: this machine is no login node of a SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {limit_s:.0f} s: SLURM is busy or away") from None
    if done.returncode:
        raise UserError(f"{command[0]} refused: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def login_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a surrounding job left in it, so that a job can submit a job.

    What says where the cluster is, and who asks, stays.
    """
    foreign = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
    return {k: v for k, v in environ.items() if k in _ACCESS or not k.startswith(foreign)}


def view(job_id: str) -> JobView | None:
    """The job's state as the controller knows it; None if it cannot be asked."""
    try:
        return parse_job(call(["scontrol", "show", "job", "-o", job_id], limit_s=10.0), datetime.now().astimezone())
    except UserError:
        return None


def parse_job(text: str, now: datetime) -> JobView | None:
    """Read one line of `scontrol show job -o`."""
    fields = dict(part.split("=", 1) for part in text.split() if "=" in part)
    if "JobState" not in fields:
        return None
    ends = fields.get("EndTime", "Unknown")
    ends_in_s = None
    if ends not in {"Unknown", "None", "N/A"}:
        ends_in_s = (datetime.fromisoformat(ends).astimezone(now.tzinfo) - now).total_seconds()
    return JobView(
        state=fields["JobState"],
        preempted=fields.get("PreemptTime", "None") not in {"None", "N/A", "Unknown"},
        ends_in_s=ends_in_s,
        reason=fields.get("Reason", ""),
        nodes=fields.get("NodeList", ""),
        restarts=int(fields.get("Restarts", "0")),
    )


def kill_wait_s() -> float:
    """Seconds between SLURM's SIGTERM and SIGKILL at this site."""
    try:
        found = re.search(r"^KillWait\s*=\s*(\d+)", call(["scontrol", "show", "config"], limit_s=10.0), re.MULTILINE)
    except UserError:
        found = None
    return float(found[1]) if found else DEFAULT_KILL_WAIT_S


def requeue(job_id: str) -> None:
    """Put the running job back into the queue, under the same id."""
    call(["scontrol", "requeue", job_id])


def cancel(job_ids: Iterable[str]) -> None:
    """End jobs, or take them from the queue."""
    call(["scancel", *job_ids])


def queued(user: str) -> dict[str, JobView]:
    """The user's jobs that wait or run, by job id (`12`, or `12_3` in an array)."""
    return parse_squeue(call(["squeue", "-h", "-r", "-u", user, "-o", "%i|%T|%M|%N|%r"]))


def parse_squeue(text: str) -> dict[str, JobView]:
    """Read `squeue -h -r -o '%i|%T|%M|%N|%r'`."""
    found = {}
    for line in text.splitlines():
        job_id, state, elapsed, nodes, reason = (part.strip() for part in line.split("|", 4))
        found[job_id] = JobView(
            state, preempted=False, ends_in_s=None, reason=reason, nodes=nodes, elapsed_s=seconds(elapsed)
        )
    return found


def past(job_ids: Sequence[str]) -> dict[str, JobView]:
    """Jobs that are over, from the accounting; nothing where a site keeps none."""
    if not job_ids:
        return {}
    fields = "JobID,State,ExitCode,ElapsedRaw,NodeList"
    try:
        return parse_sacct(call(["sacct", "-n", "-P", "-X", "-j", ",".join(sorted(set(job_ids))), "-o", fields]))
    except UserError:
        return {}


def parse_sacct(text: str) -> dict[str, JobView]:
    """Read `sacct -n -P -X -o JobID,State,ExitCode,ElapsedRaw,NodeList`; ranges of an array are taken apart."""
    found = {}
    for line in text.splitlines():
        job_id, state, code, elapsed, nodes = line.split("|")[:5]
        status, number = (int(part) for part in (code or "0:0").split(":"))
        job = JobView(
            state.split()[0],  # "CANCELLED by 1000"
            preempted=False,
            ends_in_s=None,
            nodes="" if nodes == "None assigned" else nodes,
            elapsed_s=int(elapsed or 0),
            exit_status=128 + number if number else status,
        )
        for single in expand(job_id):
            found[single] = job
    return found


def expand(job_id: str) -> list[str]:
    """`12_[0-2,5%3]` as `12_0`, `12_1`, `12_2`, `12_5`; any other id as itself."""
    match = _RANGE.match(job_id)
    if match is None:
        return [job_id]
    singles = []
    for item in match["items"].split(","):
        first, _, last = item.partition("-")
        singles += [f"{match['job']}_{index}" for index in range(int(first), int(last or first) + 1)]
    return singles


def seconds(text: str) -> int | None:
    """SLURM's elapsed time (`1-02:03:04`, `03:04`) in seconds; None for `INVALID` and the like."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or (days and not days.isdigit()):
        return None
    total = 0
    for part in parts:
        total = 60 * total + int(part)
    return total + 86400 * int(days or 0)


@dataclass(frozen=True)
class Partition:
    """A partition's limits: minutes (None: no limit), nodes, CPUs of its largest node."""

    name: str
    limit_minutes: int | None
    nodes: int
    cpus: int


def partitions() -> list[Partition]:
    """The partitions of the cluster, those that a site does not show unasked included."""
    return parse_sinfo(call(["sinfo", "-h", "-a", "-o", "%R|%l|%D|%c"]))


def parse_sinfo(text: str) -> list[Partition]:
    """Read `sinfo -h -o '%R|%l|%D|%c'`: one line per kind of node, counts of one partition added up."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, limit, nodes, cpus = line.split("|")
        limit_s = seconds(limit)
        known = found.get(name, Partition(name, None if limit_s is None else limit_s // 60, 0, 0))
        largest = max(known.cpus, count(cpus.rstrip("+")))
        found[name] = Partition(name, known.limit_minutes, known.nodes + count(nodes), largest)
    return list(found.values())


def count(text: str) -> int:
    """A number as SLURM prints it: 1024 is `1K`."""
    return int(text[:-1]) << 10 if text.endswith("K") else int(text)


def user_name() -> str:
    """The name SLURM knows this user by."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
