"""`submit --wait`: show what happens and leave with the command's status."""

import sys

from slurm.follow import follow
from slurm.records import Submission
from slurm.status import TaskStatus, look

_INTERRUPTED = 130
_FAILED = 1


def wait_for(submission: Submission) -> int:
    """Block until all tasks are over; returns the command's status, the largest one of an array."""
    try:
        for index in submission.tasks:
            follow(submission, index, 0, sys.stdout.buffer, tell)
    except KeyboardInterrupt:
        print(f"\n{submission.name} goes on; python -m slurm logs -f {submission.folder.name}", file=sys.stderr)
        return _INTERRUPTED
    return max(status_of_end(task) for task in look([submission]))


def tell(task: TaskStatus) -> None:
    """One line on a change of state, apart from the job's output."""
    life = f", life {task.lives}" if task.lives > 1 else ""
    reason = f" ({task.reason})" if task.reason else ""
    print(f"[{task.name} {task.job_id}] {task.state}{reason}{life}", file=sys.stderr, flush=True)


def status_of_end(task: TaskStatus) -> int:
    """The command's status; for a job that ended without one (cancelled while waiting, out of memory): not 0."""
    if task.exit_status is not None and (task.exit_status or task.state == "COMPLETED"):
        return task.exit_status
    return _FAILED
