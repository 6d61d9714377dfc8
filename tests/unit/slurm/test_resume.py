"""The decisions that keep a job alive, case by case as the user would tell them."""

import signal

import pytest

from slurm.queue import JobView
from slurm.resume import EXIT_NODE_LOST, EXIT_NOT_STARTED, Cause, cause_of, grace_s, judge, judge_start

RUNNING = JobView("RUNNING", preempted=False, ends_in_s=100.0)
PREEMPTED = JobView("RUNNING", preempted=True, ends_in_s=40.0)


@pytest.mark.parametrize(
    ("number", "job", "cancel", "expected"),
    [
        (signal.SIGUSR2, RUNNING, False, Cause.TIME_LIMIT),
        (signal.SIGUSR2, PREEMPTED, False, Cause.PREEMPTED),
        (signal.SIGTERM, PREEMPTED, False, Cause.PREEMPTED),
        (signal.SIGTERM, JobView("CANCELLED", preempted=False, ends_in_s=None), False, Cause.CANCELLED),
        (signal.SIGTERM, JobView("COMPLETING", preempted=False, ends_in_s=None), False, Cause.ENDED_BY_SLURM),
        (signal.SIGTERM, JobView("COMPLETING", preempted=True, ends_in_s=None), False, Cause.PREEMPTED),
        (signal.SIGTERM, JobView("TIMEOUT", preempted=False, ends_in_s=None), False, Cause.TIME_LIMIT),
        (signal.SIGTERM, RUNNING, False, Cause.ASKED),
        (signal.SIGTERM, RUNNING, True, Cause.CANCELLED),
        (signal.SIGUSR2, None, False, Cause.TIME_LIMIT),  # the controller does not answer
        (signal.SIGTERM, None, False, Cause.ASKED),
    ],
)
def test_cause_of_a_signal(number: int, job: JobView | None, cancel: bool, expected: Cause):
    assert cause_of(number, job, cancel_requested=cancel, under_slurm=True) is expected


def test_without_slurm_a_signal_is_a_cancellation_and_usr2_the_time_limit():
    assert cause_of(signal.SIGTERM, None, cancel_requested=False, under_slurm=False) is Cause.CANCELLED
    assert cause_of(signal.SIGUSR2, None, cancel_requested=False, under_slurm=False) is Cause.TIME_LIMIT


def test_grace_leaves_time_to_clean_up():
    assert grace_s(Cause.TIME_LIMIT, RUNNING, warn_s=120, kill_wait_s=30) == 88  # 100 s are left
    assert grace_s(Cause.PREEMPTED, PREEMPTED, warn_s=120, kill_wait_s=30) == 28  # the partition grants 40 s
    assert grace_s(Cause.TIME_LIMIT, None, warn_s=120, kill_wait_s=30) == 108
    gone = JobView("CANCELLED", preempted=False, ends_in_s=None)
    assert grace_s(Cause.CANCELLED, gone, warn_s=120, kill_wait_s=30) == 25  # SIGKILL follows 30 s after SIGTERM
    assert grace_s(Cause.CANCELLED, gone, warn_s=120, kill_wait_s=1) == 1
    assert grace_s(Cause.NODE_LOST, RUNNING, warn_s=120, kill_wait_s=30) == 108


@pytest.mark.parametrize(
    ("status", "cause", "left", "policy", "ours", "action", "final"),
    [
        # nothing happened but the command's own end
        (0, None, 5, "requeue", True, "finish", 0),
        (7, None, 5, "requeue", True, "finish", 7),
        (85, None, 5, "requeue", True, "requeue", 85),
        (85, None, 0, "requeue", True, "finish", 85),
        # the queue wants the nodes back
        (0, Cause.TIME_LIMIT, 5, "requeue", True, "finish", 0),
        (85, Cause.TIME_LIMIT, 5, "requeue", True, "requeue", 85),
        (143, Cause.TIME_LIMIT, 5, "requeue", True, "requeue", 85),  # a plain command that died of SIGTERM
        (137, Cause.PREEMPTED, 5, "requeue", True, "requeue", 85),  # ... or had to be killed
        (143, Cause.PREEMPTED, 0, "requeue", True, "finish", 143),
        (1, Cause.TIME_LIMIT, 5, "requeue", True, "finish", 1),  # it failed while it was leaving
        (143, Cause.PREEMPTED, 5, "requeue", False, "leave", 85),  # SLURM has put it back already
        # a person ended it
        (85, Cause.CANCELLED, 5, "requeue", True, "finish", 85),
        (143, Cause.ASKED, 5, "requeue", True, "finish", 143),
        (85, Cause.ASKED, 5, "requeue", True, "requeue", 85),
        # a node was lost
        (143, Cause.NODE_LOST, 5, "requeue", True, "requeue", 85),
        (1, Cause.NODE_LOST, 5, "requeue", True, "requeue", 85),  # Ray's error, not the command's
        (1, Cause.NODE_LOST, 0, "requeue", True, "finish", 1),
        (1, Cause.NODE_LOST, 5, "fail", True, "finish", EXIT_NODE_LOST),
        # SLURM ended it and knows whether there is another life
        (0, Cause.ENDED_BY_SLURM, 5, "requeue", False, "finish", 0),
        (139, Cause.ENDED_BY_SLURM, 5, "requeue", False, "leave", 139),
        (85, Cause.ENDED_BY_SLURM, 0, "fail", False, "leave", 85),
        (0, Cause.NODE_LOST, 5, "fail", True, "finish", 0),  # it had ended all the same
        (EXIT_NOT_STARTED, None, 5, "requeue", True, "finish", EXIT_NOT_STARTED),
    ],
)
def test_verdict(*, status: int, cause: Cause | None, left: int, policy: str, ours: bool, action: str, final: int):
    verdict = judge(status, cause, requeues_left=left, on_node_loss=policy, still_ours=ours)
    assert (verdict.action, verdict.exit_status) == (action, final)
    assert verdict.reason


def test_a_new_life_may_be_refused():
    assert judge_start(0, True, requeues=0, on_node_loss="fail") is None
    assert judge_start(3, True, requeues=3, on_node_loss="fail") is None
    assert judge_start(1, False, requeues=3, on_node_loss="requeue") is None
    lost = judge_start(1, False, requeues=3, on_node_loss="fail")
    assert lost is not None
    assert lost.exit_status == EXIT_NODE_LOST
    worn_out = judge_start(4, True, requeues=3, on_node_loss="requeue")
    assert worn_out is not None
    assert "requeue.max = 3" in worn_out.reason
