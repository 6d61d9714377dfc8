"""What the launchers of one life of a task have in common: their place, their records, the signals they got."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from slurm import queue, records
from slurm.files import make_private_dir
from slurm.node import Place
from slurm.processes import Scratch
from slurm.ray_cluster import RayNode
from slurm.rendezvous import Rendezvous
from slurm.resume import Cause, cause_of


class Life:
    """One life of one task, as one launcher sees it."""

    def __init__(self, submission: records.Submission, index: int) -> None:
        self.submission, self.index = submission, index
        self.profile = submission.profile
        self.task_folder = make_private_dir(submission.task_folder(index))
        self.earlier = records.lives(self.task_folder)
        self.place = Place.from_environ(os.environ, lives_before=len(self.earlier))
        self.earlier = [life for life in self.earlier if life["life"] != self.place.life]
        self.rendezvous = Rendezvous(self.task_folder / f"life-{self.place.life}", self.place.rank, self.place.world)
        self.signalled: int | None = None
        self.signalled_at = 0.0
        self.story: dict[str, Any] = {"life": self.place.life, "started_unix_s": time.time()}

    def on_signal(self, number: int, _frame: object) -> None:
        """Remember the first request to leave; whoever waits looks at it."""
        if self.signalled is None:
            self.signalled, self.signalled_at = number, time.monotonic()

    def job(self) -> queue.JobView | None:
        """The job as SLURM sees it now; None without SLURM."""
        return queue.view(self.place.job_id) if self.place.under_slurm else None

    def cause(self, job: queue.JobView | None) -> Cause:
        """Why this life was signalled."""
        assert self.signalled is not None
        cancelled = records.cancel_requested(self.task_folder)
        return cause_of(self.signalled, job, cancel_requested=cancelled, under_slurm=self.place.under_slurm)

    def ray_node(self, scratch: Scratch) -> RayNode | None:
        """Ray on this node, unless the submission needs none."""
        if self.submission.array is not None:
            return None
        environ, workdir = self.environ(scratch), self.submission.workdir
        return RayNode(self.profile, self.place, scratch, self.rendezvous, environ, workdir, self.interrupted)

    def environ(self, scratch: Scratch) -> dict[str, str]:
        """What the command finds in its environment, Ray's part left out; `python` is the profile's, or this one."""
        python, path = self.profile.node.python or sys.executable, os.environ.get("PATH", os.defpath)
        if os.sep in python:  # a plain name is looked up: the working directory must not come before the system
            path = os.pathsep.join([str(Path(python).parent), path])
        return os.environ | scratch.environ() | {"PATH": path}

    def interrupted(self) -> bool:
        """Whether somebody wants this launcher to leave."""
        return self.signalled is not None

    def keeps_logs(self, exit_status: int) -> bool:
        """Whether Ray's own logs are worth their space after such an end."""
        choice = self.profile.ray.keep_logs
        return choice == "always" or (choice == "on_failure" and exit_status != 0)

    def note(self, **facts: Any) -> None:
        """Add to the record of this life."""
        self.story |= facts
        self.rendezvous.put("life", self.story)

    def say(self, text: str) -> None:
        """One line for the job's log."""
        print(f"[slurm {time.strftime('%H:%M:%S')} rank {self.place.rank}] {text}", flush=True)
