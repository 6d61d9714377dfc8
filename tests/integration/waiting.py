"""Waiting for conditions, always with a limit; looking at and ending processes of one's own (Linux)."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def wait_for(condition: Callable[[], object], limit_s: float, what: str) -> None:
    """Return once `condition()` holds; AssertionError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s in vain: {what}"
        time.sleep(0.05)


def command_line(pid: int) -> str:
    """The words of a process' command line, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Children, grandchildren and so on of a process."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def kill(*pids: int) -> None:
    """SIGKILL to processes that may already be gone."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@contextmanager
def running(command: list[str], log: Path, environment: Mapping[str, str] = {}) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes to a file; it and its descendants are gone afterwards."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        yield process
    finally:
        kill(*descendants(process.pid), process.pid)
        process.wait(30)
