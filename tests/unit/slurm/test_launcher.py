"""One node's launcher with a stand-in for SLURM's controller: what it does with signals, and what it asks for."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm import records
from tests.unit.slurm.conftest import Planner

SCONTROL = """#!/bin/sh
case "$1 $2" in
  "show config") echo "KillWait = 6 sec" ;;
  "show job") echo "JobId=5 JobState=$(cat {folder}/state) PreemptTime=$(cat {folder}/preempt) EndTime=Unknown" ;;
  *) echo "$@" >> {folder}/asked ;;
esac
"""
COMMAND = "trap 'exit {status}' TERM; touch up; while :; do sleep 0.05; done"


class Site:
    """A folder with a fake `scontrol`, and jobs run on it."""

    def __init__(self, folder: Path, planner: Planner) -> None:
        self.folder, self.planner = folder, planner
        (folder / "scontrol").write_text(SCONTROL.format(folder=folder))
        (folder / "scontrol").chmod(0o755)
        self.answer("RUNNING")

    def answer(self, state: str, preempt: str = "None") -> None:
        (self.folder / "state").write_text(state)
        (self.folder / "preempt").write_text(preempt)

    @property
    def asked(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def submit(self, status: int, *overrides: str) -> records.Submission:
        settings = ["node.scratch=/tmp", "requeue.warn_s=14", *overrides]
        submission = self.planner(*settings, command=("sh", "-c", COMMAND.format(status=status)), array="1", job_id="5")
        submission.save()
        return submission

    def start(self, submission: records.Submission, restart: int = 0) -> "subprocess.Popen[bytes]":
        code = "import sys; from slurm.launcher import Launch; Launch(sys.argv[1], 0)()"
        place = {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": str(restart), "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [sys.executable, "-c", code, str(submission.folder)], env=os.environ | place | {"PATH": path}
        )

    def live(self, submission: records.Submission, number: signal.Signals, restart: int = 0) -> int:
        """One life that gets a signal once its command is up; the launcher's status."""
        up = submission.workdir / "up"
        up.unlink(missing_ok=True)
        launcher = self.start(submission, restart)
        try:
            end = time.monotonic() + 30
            while not up.exists():
                assert launcher.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            launcher.send_signal(number)
            return launcher.wait(30)
        finally:
            launcher.kill()


@pytest.fixture
def site(tmp_path: Path, planner: Planner) -> Site:
    return Site(tmp_path, planner)


def last_life(submission: records.Submission) -> dict[str, object]:
    return records.lives(submission.task_folder(0))[-1]


@pytest.mark.parametrize(
    ("number", "preempt", "status", "cause"),
    [
        (signal.SIGUSR2, "None", 85, "time limit"),
        (signal.SIGUSR2, "None", 143, "time limit"),
        (signal.SIGUSR2, "2026-01-02T03:04:05", 85, "preempted"),
        (signal.SIGTERM, "2026-01-02T03:04:05", 143, "preempted"),
        (signal.SIGTERM, "None", 85, "signalled"),
    ],
)
def test_the_queue_s_signals_put_the_job_back(
    site: Site, number: signal.Signals, preempt: str, status: int, cause: str
):
    site.answer("RUNNING", preempt)
    submission = site.submit(status)
    assert site.live(submission, number) == 85
    assert site.asked == ["requeue 5"]
    assert last_life(submission)["stopped_by"] == cause
    assert records.finished(submission.task_folder(0)) is None


@pytest.mark.parametrize("status", [85, 139, 143])
def test_what_slurm_ends_is_left_to_slurm(site: Site, status: int):
    site.answer("COMPLETING")  # cancelled, or another node failed: it does not say
    submission = site.submit(status, "requeue.on_node_loss=fail")
    assert site.live(submission, signal.SIGTERM) == status
    assert site.asked == []
    assert records.finished(submission.task_folder(0)) is None

    site.answer("RUNNING")  # a second life means that it was a node
    assert site.start(submission, restart=1).wait(30) == 75
    ended = records.finished(submission.task_folder(0))
    assert ended is not None
    assert "node was lost" in ended.reason
    told = json.loads((submission.task_folder(0) / "life-5.1" / "done.json").read_text())
    assert told["exit_status"] == 75, "the other nodes would wait for a head that never comes"


def test_failure_while_leaving_is_a_failure(site: Site):
    submission = site.submit(3)
    assert site.live(submission, signal.SIGUSR2) == 3
    assert site.asked == []
    assert json.loads((submission.task_folder(0) / "finished.json").read_text())["exit_status"] == 3
    assert site.start(submission, restart=1).wait(30) == 3, "a finished job run again must do nothing"
