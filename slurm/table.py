"""The table that `status` prints."""

from collections.abc import Sequence
from pathlib import Path

from slurm.status import TaskStatus

_HEAD = ("NAME", "JOB", "STATE", "EXIT", "LIVES", "ELAPSED", "NODES", "REASON", "LAST LINE")
_TAIL_BYTES = 4096
_LINE_CHARACTERS = 60


def table(tasks: Sequence[TaskStatus]) -> str:
    """Columns wide enough for what stands in them; the last line of each log at the end."""
    rows = [_HEAD, *(_row(task) for task in tasks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _row(task: TaskStatus) -> tuple[str, ...]:
    exit_status = "" if task.exit_status is None else str(task.exit_status)
    elapsed = clock(task.elapsed_s)
    last = last_line(Path(task.log))
    return (task.name, task.job_id, task.state, exit_status, str(task.lives), elapsed, task.nodes, task.reason, last)


def clock(elapsed_s: int | None) -> str:
    """Seconds as `h:mm:ss`; nothing for None."""
    if elapsed_s is None:
        return ""
    return f"{elapsed_s // 3600}:{elapsed_s % 3600 // 60:02d}:{elapsed_s % 60:02d}"


def last_line(path: Path) -> str:
    """The last line of a log, cut to fit, without what a terminal would act upon."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    text = next((line for line in reversed(lines) if line.strip()), "")
    return "".join(sign for sign in text if sign.isprintable())[:_LINE_CHARACTERS]
