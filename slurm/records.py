"""What is known of a submission, as files in its own folder: what was asked, how often it ran, how it ended."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import UserError, nearest
from slurm.files import make_private_dir, read_json, write_json, write_text
from slurm.profile import Profile

SUBMISSION_FILE = "submission.json"
FINISHED_FILE = "finished.json"
# Plain text for the batch script, which has no JSON reader: the status that the whole job is to have.
EXIT_FILE = "exit_status"
CANCEL_FILE = "cancelled.json"


class Submission(BaseModel):
    """One submission: what runs where. `array` is the number of tasks of a job array, None for a job with Ray."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str
    folder: Path
    command: tuple[str, ...]
    profile: Profile
    origin: Path
    workdir: Path
    array: int | None = None
    parallel: int | None = None
    local: bool = False
    submitted_unix_s: float
    user: str
    host: str
    job_id: str | None = None

    @property
    def log_folder(self) -> Path:
        """Where submitit keeps its files and SLURM writes the output."""
        return self.folder / "log"

    @property
    def tasks(self) -> range:
        """Indices of the commands of this submission: one for a Ray job, one per element of an array."""
        return range(self.array or 1)

    def task_folder(self, index: int) -> Path:
        """The folder with the state of one task."""
        return self.folder / f"task-{index}"

    def task_id(self, index: int) -> str:
        """The job id of one task as SLURM writes it; '?' before the submission is through."""
        if self.job_id is None:
            return "?"
        return f"{self.job_id}_{index}" if (self.array or 1) > 1 else self.job_id

    def log_file(self, index: int, rank: int = 0) -> Path:
        """The output of one task on one of its nodes."""
        return self.log_folder / f"{self.task_id(index)}_{rank}_log.out"

    def save(self) -> None:
        """Write the record into its folder."""
        write_json(make_private_dir(self.folder) / SUBMISSION_FILE, self.model_dump(mode="json"))


class Finished(BaseModel):
    """How a task ended for good; as long as this record stands, running the task again does nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exit_status: int
    reason: str
    lives: int
    finished_unix_s: float


def load_submission(folder: Path) -> Submission:
    """Read the record in `folder`; raises `UserError` if there is none that can be read."""
    tree = read_json(folder / SUBMISSION_FILE)
    if tree is None:
        raise UserError(f"{folder} holds no record of a submission ({SUBMISSION_FILE})")
    try:
        return Submission.model_validate(tree)
    except ValidationError as error:
        raise UserError(
            f"{folder / SUBMISSION_FILE} was written by another version of this program: {error.errors()[0]['msg']}"
        ) from None


def submissions(runs: Path) -> Iterator[Submission]:
    """All submissions under `runs`, oldest first."""
    found = [load_submission(path.parent) for path in runs.glob(f"*/{SUBMISSION_FILE}")]
    yield from sorted(found, key=lambda record: record.submitted_unix_s)


def find(runs: Path, name_or_id: str) -> Submission:
    """The latest submission called so, or the one with that job id; raises `UserError` with the nearest name."""
    known = list(submissions(runs))
    job_id = name_or_id.split("_", 1)[0]
    for record in reversed(known):
        if name_or_id in (record.name, record.folder.name) or job_id == record.job_id:
            return record
    if not known:
        raise UserError(f"no submission is recorded under {runs}; `--runs` names another folder")
    raise UserError(
        f"no submission under {runs} is called {name_or_id!r}: {nearest(name_or_id, sorted({r.name for r in known}))}"
    )


def finished(task_folder: Path) -> Finished | None:
    """How the task ended, None as long as it has not."""
    tree = read_json(task_folder / FINISHED_FILE)
    return None if tree is None else Finished.model_validate(tree)


def record_finish(task_folder: Path, exit_status: int, reason: str, lives: int) -> Finished:
    """Write down for good how the task ended; the first record wins."""
    known = finished(task_folder)
    if known is not None:
        return known
    write_text(task_folder / EXIT_FILE, f"{exit_status}\n")
    record = Finished(exit_status=exit_status, reason=reason, lives=lives, finished_unix_s=time.time())
    write_json(task_folder / FINISHED_FILE, record.model_dump(mode="json"))
    return record


def request_cancel(task_folder: Path) -> None:
    """Note that a person wants the task to end: it is then not put back into the queue."""
    write_json(make_private_dir(task_folder) / CANCEL_FILE, {"unix_s": time.time()})


def cancel_requested(task_folder: Path) -> bool:
    """Whether `request_cancel` was called."""
    return read_json(task_folder / CANCEL_FILE) is not None


def lives(task_folder: Path) -> list[dict[str, Any]]:
    """The records of the task's lives so far, oldest first."""
    found = (read_json(path) for path in task_folder.glob("life-*/life.json"))
    return sorted((life for life in found if life is not None), key=lambda life: float(life["started_unix_s"]))
