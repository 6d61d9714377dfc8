from datetime import UTC, datetime, timedelta

import pytest

from slurm import queue

# as printed by SLURM 22.05
JOB = (
    "JobId=3 JobName=low UserId=ada(1000) GroupId=ada(1000) MCS_label=N/A Priority=4294901757 Nice=0 Account=(null) "
    "QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "RunTime=00:00:21 TimeLimit=00:05:00 TimeMin=N/A StartTime=2026-01-02T03:04:05 EndTime={end} Deadline=N/A "
    "PreemptEligibleTime=2026-01-02T03:04:05 PreemptTime={preempt} SuspendTime=None NodeList=n[1-2] BatchHost=n1"
)


def test_job_line():
    now = datetime(2026, 1, 2, 3, 5, 0).astimezone()
    job = queue.parse_job(JOB.format(end="2026-01-02T03:09:05", preempt="None"), now)
    assert job is not None
    assert (job.state, job.preempted, job.ends_in_s, job.nodes, job.restarts) == ("RUNNING", False, 245.0, "n[1-2]", 2)


def test_job_line_of_a_preempted_job():
    now = datetime(2026, 1, 2, 3, 5, 0, tzinfo=UTC)
    job = queue.parse_job(JOB.format(end="Unknown", preempt="2026-01-02T03:05:00"), now + timedelta())
    assert job is not None
    assert job.preempted
    assert job.ends_in_s is None
    assert queue.parse_job("slurm_load_jobs error: Invalid job id specified", now) is None


def test_squeue_lines():
    found = queue.parse_squeue("12|RUNNING|1-02:03:04|n[1-2]|None\n13_4|PENDING|0:00||Resources\n")
    assert (found["12"].state, found["12"].nodes, found["12"].elapsed_s) == ("RUNNING", "n[1-2]", 93784)
    assert (found["13_4"].state, found["13_4"].reason, found["13_4"].nodes) == ("PENDING", "Resources", "")


def test_sacct_lines():
    lines = [
        "5|FAILED|7:0|12|n1",
        "6|CANCELLED by 1000|0:15|3|None assigned",
        "7_[0-2,5%3]|PENDING|0:0|0|None assigned",
        "8_1|COMPLETED|0:0|61|n2",
    ]
    found = queue.parse_sacct("\n".join(lines))
    assert (found["5"].state, found["5"].exit_status, found["5"].elapsed_s) == ("FAILED", 7, 12)
    assert (found["6"].state, found["6"].exit_status, found["6"].nodes) == ("CANCELLED", 143, "")
    assert {job_id for job_id in found if job_id.startswith("7")} == {"7_0", "7_1", "7_2", "7_5"}
    assert found["8_1"].state == "COMPLETED"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:07", 7), ("1:00:00", 3600), ("2-00:00:01", 172801), ("INVALID", None), ("UNLIMITED", None)],
)
def test_elapsed_time(text: str, expected: int | None):
    assert queue.seconds(text) == expected


def test_sinfo_lines_of_one_partition_are_added_up():
    found = queue.parse_sinfo("main|1-00:00:00|4|64\nmain|1-00:00:00|2|128\nfree|infinite|1|8+\n")
    assert found == [queue.Partition("main", 1440, 6, 128), queue.Partition("free", None, 1, 8)]


def test_round_numbers_are_printed_with_a_letter():
    assert queue.parse_sinfo("big|infinite|2K|1K+\n") == [queue.Partition("big", None, 2048, 1024)]


def test_a_job_can_submit_a_job():
    inside = {
        "SLURM_JOB_ID": "1",
        "SLURM_CONF": "/etc/x",
        "SRUN_DEBUG": "1",
        "SUBMITIT_EXECUTOR": "slurm",
        "HOME": "/h",
    }
    access = {"SLURM_CONF": "/etc/x", "SLURM_CONF_SERVER": "ctl:6817", "SLURM_JWT": "ey"}
    assert queue.login_environ(inside | access) == access | {"HOME": "/h"}
