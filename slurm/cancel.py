"""Ends submissions, on SLURM or on this machine."""

import os
import signal
import socket

from harness.errors import UserError
from slurm import queue, records
from slurm.processes import wait_until
from slurm.records import Submission
from slurm.status import controller_runs, look

_LIMIT_S = 90.0


def cancel_submission(submission: Submission) -> str:
    """End all tasks that are not over and wait until they are gone; returns what to tell the user."""
    tasks = look([submission])
    open_tasks = [index for index, task in zip(submission.tasks, tasks, strict=True) if not task.over]
    if not open_tasks:
        return f"{submission.name} is over already: {', '.join(sorted({task.state for task in tasks}))}"
    for index in open_tasks:
        records.request_cancel(submission.task_folder(index))
    if submission.local:
        _end_local(submission)
    else:
        queue.cancel([submission.task_id(index) for index in open_tasks])
    gone = wait_until(lambda: all(task.over for task in look([submission])), _LIMIT_S, every_s=0.5)
    return f"{submission.name}: {'cancelled' if gone else f'asked to end, but still there after {_LIMIT_S:.0f} s'}"


def _end_local(submission: Submission) -> None:
    """Submitit's controller passes SIGTERM on to the launcher, which ends the command and cleans up."""
    if submission.host != socket.gethostname():
        raise UserError(f"{submission.name} runs on {submission.host}: cancel it there")
    if controller_runs(submission):
        os.kill(int(submission.job_id or "0"), signal.SIGTERM)
