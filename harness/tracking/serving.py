"""A server as a child that never outlives the command that started it, whatever way that is asked to end."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

# Ctrl-C, Ctrl-\, `kill`, and a terminal or an ssh session that is closed.
END_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
LEFTOVER_WAIT_S = 10.0
_LOOK_EVERY_S = 0.1


def serve(command: Sequence[str], *, grace_s: float = LEFTOVER_WAIT_S) -> int | None:
    """Run a server until it ends (its status), or until this process is asked to end (None), then end the server.

    Its own children end with it: SIGTERM to all of them, and SIGKILL to those that are left after `grace_s`.
    """
    with _asked_to_end() as asked:  # before there is a child, so that no signal finds one without anybody to end it
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            while not asked and server.poll() is None:
                time.sleep(_LOOK_EVERY_S)
            return None if asked else server.returncode
        finally:
            _end_group(server, grace_s)


@contextmanager
def _asked_to_end() -> Iterator[list[int]]:
    """The signals that asked for the end, as they come; those that whoever started us has off (nohup) stay off."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's signature
        asked.append(number)

    wanted = [number for number in END_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(server: subprocess.Popen[bytes], grace_s: float) -> None:
    """End a session's leader and all that it started; the number of its group is its own."""
    for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, LEFTOVER_WAIT_S)):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        deadline = time.monotonic() + limit_s
        while _alive(server) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)


def _alive(server: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the group still runs.

    What is over but for its entry does not count: in a container nobody may ever take note of its end.
    """
    server.poll()
    return any(state != "Z" for state, group in _states() if group == server.pid)


def _states() -> Iterator[tuple[str, int]]:
    """State and process group of every process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            state, _parent, group = path.read_text().rpartition(")")[2].split()[:3]
            yield state, int(group)
