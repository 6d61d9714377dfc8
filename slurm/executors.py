"""submitit's executors, so far as this project needs them otherwise than they are."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor

from harness.errors import UserError
from slurm.launcher import Launch
from slurm.profile import minutes
from slurm.records import Submission
from slurm.script import parameters


class BatchExecutor(SlurmExecutor):
    """submitit's SLURM executor, which can also show its text on a machine without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        """Always available: submitting without SLURM fails with sbatch's own message."""
        return 2

    def text(self, tasks: int) -> str:
        """The script as it would be handed to sbatch for `tasks` tasks."""
        shown = BatchExecutor(self.folder, self.max_num_timeout)
        shown.parameters.update(self.parameters | ({"map_count": tasks} if tasks > 1 else {}))
        return str(shown._make_submission_file_text(self._submitit_command_str, ""))


def batch_executor(submission: Submission) -> BatchExecutor:
    """The executor for a submission to SLURM."""
    executor = BatchExecutor(submission.log_folder, max_num_timeout=submission.profile.requeue.max)
    executor.update_parameters(**parameters(submission))
    return executor


def submit_batch(submission: Submission) -> str:
    """Hand a submission to SLURM and return the job's id; raises `UserError` with what sbatch says."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    calls = [Launch(str(submission.folder), index) for index in submission.tasks]
    try:
        jobs = batch_executor(submission).submit_array(calls)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused the job: {error}") from None
    return str(jobs[0].job_id).split("_", 1)[0]


def start_local(submission: Submission) -> str:
    """Start a submission on this machine, without SLURM, and return the id of its controller process."""
    executor = LocalExecutor(Path(submission.log_folder))
    settings: dict[str, Any] = {
        "timeout_min": minutes(submission.profile.job.time),
        "signal_delay_s": submission.profile.requeue.warn_s,
        "gpus_per_node": submission.profile.node.gpus,
        "stderr_to_stdout": True,
        "setup": submission.profile.node.setup,
    }
    executor.update_parameters(**settings)
    with _detached(submission.log_folder / "controller.out"):
        return str(executor.submit(Launch(str(submission.folder), 0)).job_id)


@contextlib.contextmanager
def _detached(log: Path) -> Iterator[None]:
    """Processes started meanwhile outlive this terminal and hold none of its pipes; `cancel` ends them in order."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    sys.stdout.flush()
    sys.stderr.flush()
    outputs = [os.dup(1), os.dup(2)]
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        for place, output in enumerate(outputs, 1):
            os.dup2(output, place)
            os.close(output)
        for number, handler in handlers.items():
            signal.signal(number, handler)
