"""What became of submissions: SLURM's word while a job waits or runs, the task's own record once it has finished."""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from slurm import queue, records
from slurm.keeper import start_time
from slurm.queue import LIVE_STATES, JobView
from slurm.records import Submission

UNKNOWN = "UNKNOWN"
# A task that finished may stay in the queue until its nodes are clean, or be started in vain once more.
_MAY_BE_QUEUED_S = 600.0


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
    views = _ask([(record.task_id(index), ended[record.folder, index]) for record, index in pairs if not record.local])
    return [_task_status(record, index, ended[record.folder, index], views) for record, index in pairs]


def _ask(tasks: Iterable[tuple[str, records.Finished | None]]) -> dict[str, JobView]:
    """What SLURM says of tasks that have not finished, or have only just and may still be in the queue."""
    recent = time.time() - _MAY_BE_QUEUED_S
    asked = {job_id: end for job_id, end in tasks if end is None or end.finished_unix_s > recent}
    if not asked or not queue.available():
        return {}
    known = {job_id: view for job_id, view in queue.queued(queue.user_name()).items() if job_id in asked}
    return known | queue.past([job_id for job_id, end in asked.items() if end is None and job_id not in known])


def _task_status(
    record: Submission, index: int, ended: records.Finished | None, views: Mapping[str, JobView]
) -> TaskStatus:
    job_id = record.task_id(index)
    lives = records.lives(record.task_folder(index))
    view = views.get(job_id)
    if ended is not None:
        leaving = view is not None or (record.local and controller_runs(record))
        view = _finished_view(ended, lives)
        view = replace(view, state="COMPLETING") if leaving else view
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
