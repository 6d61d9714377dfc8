"""What became of submissions: SLURM's word while a job waits or runs, the task's own record once it has finished."""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from slurm import queue, records
from slurm.keeper import start_time
from slurm.queue import LIVE_STATES, JobView
from slurm.records import Submission

UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class TaskStatus:
    """One task of one submission, ready for a table or for JSON; `lives` counts how often it was started."""

    name: str
    job_id: str
    state: str
    exit_status: int | None
    reason: str
    lives: int
    nodes: str
    elapsed_s: int | None
    submitted_unix_s: float
    folder: str
    log: str

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state not in LIVE_STATES

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def look(submissions: Iterable[Submission]) -> list[TaskStatus]:
    """The status of every task of these submissions, with at most two questions to SLURM."""
    pairs = [(record, index) for record in submissions for index in record.tasks]
    ended = {(record.folder, index): records.finished(record.task_folder(index)) for record, index in pairs}
    open_ids = [r.task_id(i) for r, i in pairs if not r.local and r.job_id and ended[r.folder, i] is None]
    views: dict[str, JobView] = {}
    if open_ids and queue.available():
        views = queue.queued(queue.user_name())
        views |= queue.past([job_id for job_id in open_ids if job_id not in views])
    return [_task_status(record, index, ended[record.folder, index], views) for record, index in pairs]


def _task_status(
    record: Submission, index: int, ended: records.Finished | None, views: Mapping[str, JobView]
) -> TaskStatus:
    job_id = record.task_id(index)
    lives = records.lives(record.task_folder(index))
    view = views.get(job_id)
    if ended is not None:
        view = _finished_view(ended, lives)
    elif record.local:
        view = _local_view(record, index)
    if view is None:
        view = JobView(UNKNOWN, preempted=False, ends_in_s=None, reason="SLURM does not know the job (any more)")
    return TaskStatus(
        name=record.name if record.array is None else f"{record.name}[{index}]",
        job_id=job_id,
        state=view.state,
        exit_status=view.exit_status if view.state not in LIVE_STATES else None,
        reason="" if view.reason == "None" else view.reason,
        lives=len(lives),
        nodes=view.nodes,
        elapsed_s=view.elapsed_s,
        submitted_unix_s=record.submitted_unix_s,
        folder=str(record.folder),
        log=str(record.log_file(index)),
    )


def _finished_view(ended: records.Finished, lives: list[dict[str, object]]) -> JobView:
    state = "COMPLETED" if ended.exit_status == 0 else "CANCELLED" if ended.reason == "cancelled" else "FAILED"
    started = float(str(lives[-1]["started_unix_s"])) if lives else ended.finished_unix_s
    return JobView(
        state,
        preempted=False,
        ends_in_s=None,
        reason=ended.reason,
        nodes=str(lives[-1].get("node", "")) if lives else "",
        elapsed_s=round(ended.finished_unix_s - started),
        exit_status=ended.exit_status,
    )


def _local_view(record: Submission, index: int) -> JobView:
    """A task without SLURM runs as long as its controller does."""
    running = record.job_id is not None and controller_runs(record)
    lives = records.lives(record.task_folder(index))
    elapsed = round(time.time() - float(lives[-1]["started_unix_s"])) if lives and running else None
    reason = "" if running else "its processes ended without a word"
    state = "RUNNING" if running else "FAILED"
    return JobView(state, preempted=False, ends_in_s=None, reason=reason, nodes=record.host, elapsed_s=elapsed)


def controller_runs(record: Submission) -> bool:
    """Whether the process that submitit started for a local submission is still there (and not another by that id)."""
    if record.job_id is None or start_time(int(record.job_id)) == "gone":
        return False
    try:
        command = Path(f"/proc/{record.job_id}/cmdline").read_bytes()
    except OSError:
        return False
    return os.fsencode(record.log_folder) in command
