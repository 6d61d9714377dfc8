"""From a command line to a job: plan (pure but for looking), check, record, copy, submit."""

import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from slurm import checks, queue, snapshot
from slurm.profile import Profile
from slurm.records import Submission


@dataclass(frozen=True)
class Request:
    """What the user asked for on the command line."""

    command: tuple[str, ...]
    profile: Profile
    name: str | None = None
    array: str | None = None
    local: bool = False


def plan(request: Request, workdir: Path, *, now: float) -> Submission:
    """Decide name, folders and kind; nothing is written. Raises `UserError`."""
    name = request.name or default_name(request.command)
    checks.check_name(name)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    runs = (workdir / Path(request.profile.storage.runs).expanduser()).absolute()
    folder = _unused(runs / f"{name}-{stamp}")
    checks.check_folder(folder)
    array, parallel = parse_array(request.array)
    profile = request.profile
    if request.local:  # this machine is the one node
        profile = profile.model_copy(update={"job": profile.job.model_copy(update={"nodes": 1})})
    if array is not None and profile.job.nodes > 1:
        raise UserError(f"--array runs commands without Ray, each on one node; job.nodes = {profile.job.nodes}")
    if request.local and array not in {None, 1}:
        raise UserError("--local runs one task: --array 1 at most (a command without Ray)")
    return Submission(
        name=name,
        folder=folder,
        command=request.command,
        profile=profile,
        origin=workdir,
        workdir=folder / snapshot.CODE_FOLDER if profile.storage.snapshot else workdir,
        array=array,
        parallel=parallel,
        local=request.local,
        submitted_unix_s=now,
        user=queue.user_name(),
        host=socket.gethostname(),
    )


def default_name(command: Sequence[str]) -> str:
    """A name from what is run: the module, or the program, without its path and suffix."""
    words = [word for word in command if not word.startswith("-")]
    if not words:
        return "job"
    word = words[1] if len(words) > 1 and Path(words[0]).name.startswith("python") else words[0]
    cleaned = "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in Path(word).stem).strip("-._")
    return cleaned[:40] or "job"


def parse_array(text: str | None) -> tuple[int | None, int | None]:
    """`8` or `8%2`: how many tasks, and how many of them at a time."""
    if text is None:
        return None, None
    count, percent, parallel = text.partition("%")
    if not count.isdigit() or int(count) < 1 or (percent and (not parallel.isdigit() or int(parallel) < 1)):
        raise UserError(f"--array {text!r}: write the number of tasks, e.g. 8, or 8%2 for two at a time")
    return int(count), int(parallel) if percent else None


def check(submission: Submission) -> None:
    """Everything that can be known now to fail later. Raises `UserError`."""
    checks.check_shadows(submission.origin)
    checks.check_command(submission.command, submission.origin, submission.profile, os.environ)
    if submission.local:
        return
    if not queue.available():
        raise UserError("no SLURM here (sbatch and srun are not on the PATH): use a login node, --local, or --dry-run")
    checks.check_queue(submission.profile, queue.partitions())


def submit(submission: Submission) -> Submission:
    """Record, copy, and hand over; returns the record with the job's id."""
    from slurm.executors import start_local, submit_batch

    try:
        submission.save()
        snapshot.record(submission.folder, submission.origin, os.environ)
        if submission.workdir != submission.origin:
            snapshot.copy_code(submission.origin, submission.folder)
        submission.log_folder.mkdir(exist_ok=True)
    except BaseException:  # too much code, a full disk, Ctrl-C: nothing was submitted, and nothing is recorded
        shutil.rmtree(submission.folder, ignore_errors=True)
        raise
    kept = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(queue.login_environ(kept))
        job_id = start_local(submission) if submission.local else submit_batch(submission)
    except UserError:
        shutil.rmtree(submission.folder)  # what was refused leaves no record
        raise
    finally:
        os.environ.clear()
        os.environ.update(kept)
    through = submission.model_copy(update={"job_id": job_id})
    through.save()
    return through


def _unused(folder: Path) -> Path:
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate
