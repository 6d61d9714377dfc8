"""Reads the output of a task, also while it grows, also across its lives."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from harness.errors import UserError
from slurm.files import refresh
from slurm.records import Submission, finished
from slurm.status import TaskStatus, look

_POLL_S = 0.5
_LOOK_EVERY_S = 2.0
# SLURM's own last words may come after the record of the end.
_TAIL_S = 1.0


def status_of(submission: Submission, index: int) -> TaskStatus:
    """The status of one task."""
    return look([submission])[index]


def follow(
    submission: Submission, index: int, rank: int, out: BinaryIO, tell: Callable[[TaskStatus], None] | None = None
) -> TaskStatus:
    """Copy a task's output to `out` until it is over; `tell` gets every change of its state. Returns the last one."""
    path = submission.log_file(index, rank)
    position, told, next_look, over_since = 0, None, 0.0, None
    status = status_of(submission, index)
    while True:
        position = copy_from(path, position, out)
        now = time.monotonic()
        just_ended = not status.over and finished(submission.task_folder(index)) is not None
        if now >= next_look or just_ended:
            next_look = now + _LOOK_EVERY_S
            with contextlib.suppress(UserError):  # SLURM does not answer at the moment: it will
                status = status_of(submission, index)
            if tell is not None and (status.state, max(status.lives, 1)) != told:
                told = (status.state, max(status.lives, 1))
                tell(status)
        if status.over:
            over_since = over_since or now
            if now - over_since >= _TAIL_S:
                return status
        time.sleep(_POLL_S)


def copy_from(path: Path, position: int, out: BinaryIO) -> int:
    """Copy what `path` holds from `position` on; returns the new position. A file that is not there yet is empty."""
    refresh(path.parent)
    try:
        with path.open("rb") as file:
            file.seek(position)
            while chunk := file.read(1 << 16):
                out.write(chunk)
                position += len(chunk)
    except FileNotFoundError:
        return position
    out.flush()
    return position
