"""What submitit runs on every node of a job: the entry of one life of one task.

Rank 0 leads (`slurm.leader`): it starts the Ray head and, once all nodes have joined, the command. The other ranks
follow (`slurm.follower`): they start a Ray node and leave when rank 0 has written how the command ended.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.settings import EXIT_USER_ERROR, LEAVE_SIGNALS
from slurm import records
from slurm.follower import Follower
from slurm.leader import Leader
from slurm.life import Life

# submitit's local executor starts a task again that leaves with this status.
LOCAL_REQUEUE_STATUS = 144


class Launch:
    """The picklable call that submitit makes on each node; all it carries is where the records are."""

    def __init__(self, folder: str, index: int) -> None:
        self.folder, self.index = folder, index

    def __call__(self) -> int:
        """Run one life; returns 0 or leaves the process with the status that SLURM is to see."""
        status = run_life(records.load_submission(Path(self.folder)), self.index)
        if status:
            sys.exit(status)
        return 0

    def checkpoint(self) -> Any:
        """For a signal that comes before `__call__` has begun: the same call goes back into the queue."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def run_life(submission: records.Submission, index: int) -> int:
    """One life of one task on this node; returns the status of this process."""
    life = Life(submission, index)
    ended = records.finished(life.task_folder)
    if ended is not None:
        life.say(f"this task is finished ({ended.reason}, status {ended.exit_status}): nothing to do")
        return _process_status(life, ended.exit_status, requeue=False)
    for number in LEAVE_SIGNALS:
        signal.signal(number, life.on_signal)
    signal.signal(signal.SIGCONT, signal.SIG_IGN)
    if life.place.rank:
        Follower(life).run()
        return 0
    leader = Leader(life)
    try:
        verdict = leader.run()
    except UserError as error:
        life.say(f"error: {error}")
        leader.dismiss(EXIT_USER_ERROR, str(error))
        records.record_finish(life.task_folder, EXIT_USER_ERROR, str(error), len(life.earlier) + 1)
        return _process_status(life, EXIT_USER_ERROR, requeue=False)
    return _process_status(life, verdict.exit_status, requeue=verdict.action == "requeue")


def _process_status(life: Life, exit_status: int, *, requeue: bool) -> int:
    """The job's status is rank 0's. Without SLURM the record alone tells it: submitit gives one status a meaning."""
    if life.place.rank:
        return 0
    if life.place.under_slurm:
        return exit_status
    return LOCAL_REQUEUE_STATUS if requeue else os.EX_OK if exit_status == 0 else 1
