from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.profile import load_profile
from slurm.records import Submission
from slurm.submit import Request, plan

Planner = Callable[..., Submission]


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    """Plans `sleep 60` in the test's folder; keywords go to the request, `job_id` and `now` to the record."""

    def make(
        *overrides: str,
        command: tuple[str, ...] = ("sleep", "60"),
        now: float = 1e9,
        job_id: str | None = None,
        **rest: object,
    ) -> Submission:
        profile = load_profile(None, ["storage.snapshot=false", *overrides])
        made = plan(Request(command, profile, **rest), tmp_path, now=now)
        return made.model_copy(update={"job_id": job_id})

    return make
