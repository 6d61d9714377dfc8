"""How a job survives the queue, as pure decisions: why it was stopped, how long it has, what happens next."""

import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from harness.settings import EXIT_PREEMPTED
from slurm.queue import LIVE_STATES, JobView

# Statuses of our own, after sysexits.h: the command's own statuses are never changed into one of these.
EXIT_NOT_STARTED = 70
EXIT_NODE_LOST = 75
# A command that was asked to leave and did so with one of these was ended by the request, not by an error.
_LEFT_AS_ASKED = frozenset({EXIT_PREEMPTED, 128 + signal.SIGTERM, 128 + signal.SIGUSR2, 128 + signal.SIGKILL})
TEARDOWN_S = 12.0
_HURRIED_TEARDOWN_S = 5.0

OnLoss = Literal["requeue", "fail", "ignore"]


class Cause(StrEnum):
    """Why the command was asked to leave."""

    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    ENDED_BY_SLURM = "ended by SLURM"  # cancelled, or another node failed: while it is ending SLURM does not say which
    CANCELLED = "cancelled"
    ASKED = "signalled"
    NODE_LOST = "node lost"

    @property
    def of_the_queue(self) -> bool:
        """Whether the job is to go on later, by itself."""
        return self in {Cause.TIME_LIMIT, Cause.PREEMPTED}


@dataclass(frozen=True)
class Verdict:
    """What the launcher does at the end of a life.

    finish: the status is the job's for good. requeue: ask SLURM to run the job again. leave: SLURM does so unasked.
    """

    action: Literal["finish", "requeue", "leave"]
    exit_status: int
    reason: str


def cause_of(number: int, job: JobView | None, *, cancel_requested: bool, under_slurm: bool) -> Cause:
    """What a signal means: SLURM says the same thing in several ways, and tells its reason only when asked."""
    if cancel_requested or (job is not None and job.state == "CANCELLED"):
        return Cause.CANCELLED
    if job is not None and job.preempted:
        return Cause.PREEMPTED
    if number == signal.SIGUSR2:
        return Cause.TIME_LIMIT
    if job is not None and job.state == "TIMEOUT":
        return Cause.TIME_LIMIT
    if job is not None and job.state != "RUNNING" and job.state in LIVE_STATES:
        return Cause.ENDED_BY_SLURM
    return Cause.ASKED if under_slurm else Cause.CANCELLED


def grace_s(cause: Cause, job: JobView | None, *, warn_s: float, kill_wait_s: float) -> float:
    """How long the command may take to leave, so that the launcher still has time to clean up behind it."""
    hurried = kill_wait_s - _HURRIED_TEARDOWN_S
    if cause is Cause.NODE_LOST or (cause is Cause.ASKED and (job is None or job.state == "RUNNING")):
        return max(warn_s - TEARDOWN_S, hurried, 2.0)
    if cause.of_the_queue and (job is None or job.state == "RUNNING"):
        left = warn_s if job is None or job.ends_in_s is None else job.ends_in_s
        return max(min(left, 10 * warn_s) - TEARDOWN_S, 2.0)
    return max(hurried, 1.0)


def judge(
    exit_status: int, cause: Cause | None, *, requeues_left: int, on_node_loss: OnLoss, still_ours: bool
) -> Verdict:
    """Decide from the command's status and why it was stopped; `still_ours`: SLURM has not taken the job away."""
    if exit_status == 0:
        return Verdict("finish", 0, "the command ended")
    if cause is Cause.CANCELLED:
        return Verdict("finish", exit_status, "cancelled")
    if cause is Cause.ENDED_BY_SLURM:
        return Verdict("leave", exit_status, cause.value)
    if cause is Cause.NODE_LOST and on_node_loss == "fail":
        return Verdict("finish", EXIT_NODE_LOST, "a node was lost")
    wanted = exit_status == EXIT_PREEMPTED or cause is Cause.NODE_LOST
    wanted = wanted or (cause is not None and cause.of_the_queue and exit_status in _LEFT_AS_ASKED)
    if not wanted:
        return Verdict("finish", exit_status, "the command failed")
    why = cause.value if cause is not None else f"the command left with {EXIT_PREEMPTED}"
    if requeues_left <= 0:
        return Verdict("finish", exit_status, f"{why}, and all requeues (requeue.max) are used up")
    return Verdict("requeue" if still_ours else "leave", EXIT_PREEMPTED, why)


def judge_start(lives_before: int, last_life_ended: bool, *, requeues: int, on_node_loss: OnLoss) -> Verdict | None:
    """Whether a new life may begin; None if so, else how the job ends instead."""
    if lives_before and not last_life_ended and on_node_loss == "fail":
        return Verdict("finish", EXIT_NODE_LOST, "a node was lost in the last life")
    if lives_before > requeues:
        return Verdict("finish", EXIT_NODE_LOST, f"SLURM ran the job again more often than requeue.max = {requeues}")
    return None
