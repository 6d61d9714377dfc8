"""Parts under a time plan: each a process group with a limit, one after the other, within a budget for all."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scripts.gpu import figures
from tests.benchmarks.measure import Row

Status = Literal["met", "missed", "failed", "timeout", "skipped", "no time"]
SKIP_STATUS = 77
"""A part that ends with it lacks what it is about; its last line says what."""
LEAST_S = 15.0
"""Nothing is begun with less time than this, or than its own limit if that is shorter."""
GRACE_S = 3.0


@dataclass(frozen=True)
class Part:
    """One part: `python -m MODULE OPTION...`; `needed_s`: time below which it is not begun."""

    name: str
    limit_s: float
    command: tuple[str, ...]
    needed_s: float = LEAST_S


@dataclass(frozen=True)
class Outcome:
    """How a part ended; `reason` in one line where it did not end well; `rows` also of a part that was cut short."""

    part: str
    status: Status
    seconds: float = 0.0
    limit_s: float = 0.0
    reason: str = ""
    rows: tuple[Row, ...] = ()
    output: str = field(default="", repr=False)


def run_parts(
    parts: Sequence[Part], folder: Path, budget_s: float, env: Mapping[str, str], began: float | None = None
) -> Iterator[Outcome]:
    """Run the parts in order; files of theirs go to `folder`. `began`: when the budget began, by `time.monotonic`."""
    began = time.monotonic() if began is None else began
    for part in parts:
        left_s = budget_s - (time.monotonic() - began)
        if left_s < min(part.needed_s, part.limit_s):
            yield Outcome(part.name, "no time", reason=f"{max(left_s, 0):.0f} s were left of {budget_s:.0f}")
        else:
            yield run_part(part, folder, min(part.limit_s, left_s), env)


def run_part(part: Part, folder: Path, limit_s: float, env: Mapping[str, str]) -> Outcome:
    """Run one part in a process group of its own, and leave nothing of it behind."""
    log, made = folder / f"{part.name}.log", folder / f"{part.name}.jsonl"
    began = time.monotonic()
    command = [sys.executable, "-m", *part.command, "--figures", str(made)]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            status: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    seconds, output = time.monotonic() - began, log.read_text(errors="replace")
    rows = figures.read(made)
    return Outcome(part.name, _status(status, rows), seconds, limit_s, _reason(status, limit_s, output), rows, output)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the whole group: first politely, then at once."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _status(status: int | None, rows: Sequence[Row]) -> Status:
    if status is None:
        return "timeout"
    if status == SKIP_STATUS:
        return "skipped"
    if status:
        return "failed"
    return "missed" if any(row.verdict == "MISS" for row in rows) else "met"


def _reason(status: int | None, limit_s: float, output: str) -> str:
    if status == 0:
        return ""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else ""
    if status is None:
        return f"ended after its {limit_s:.0f} s; it last said: {last}"
    return last if status == SKIP_STATUS else f"status {status}: {last}"


def all_met(outcomes: Sequence[Outcome], report: Callable[[str], None] = lambda _: None) -> bool:
    """Whether every part met its limits; what was skipped for want of something does not count."""
    bad = [outcome for outcome in outcomes if outcome.status not in ("met", "skipped")]
    for outcome in bad:
        report(f"{outcome.part}: {outcome.status} {outcome.reason}".rstrip())
    return not bad
