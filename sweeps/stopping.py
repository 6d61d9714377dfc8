"""Leaving in order: on SIGTERM, SIGUSR2 or Ctrl-C the trials checkpoint, then the driver leaves.

Trials run in other processes, perhaps on other machines, so the request travels as files in their folders.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from harness.run_dir import RunDir
from harness.settings import LEAVE_SIGNALS
from harness.tracking.record import trial_dirs

GRACE_S = 60
"""How long trials may take to write their checkpoints before the driver leaves without waiting."""
_NUMBERS = (*LEAVE_SIGNALS, signal.SIGINT)


class GraceOver(BaseException):
    """Raised in the driver when trials did not leave in time, or when the person asked twice."""


class StopRequest:
    """Remembers the signal that asked to leave, and passes the request on to every unfinished trial."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stop"
        self.signal: int | None = None
        self._runs: list[RunDir] = []
        self.path.unlink(missing_ok=True)  # an earlier driver's
        for run in trial_dirs(folder):
            run.clear_stop()

    def watch(self, run: RunDir) -> None:
        """A trial has begun: it will hear of a request."""
        self._runs.append(run)

    def repeat(self) -> None:
        """Tell the trials (again: one that was starting may have missed it). Does nothing unless asked to leave."""
        if self.signal is None:
            return
        self.path.touch()
        for run in [*self._runs]:
            if not run.result_path.exists():
                run.request_stop()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while inside; `GraceOver` comes `GRACE_S` after the first, or with a second Ctrl-C."""
        before = {number: signal.getsignal(number) for number in (*_NUMBERS, signal.SIGALRM)}
        self.listen()
        try:
            yield
        finally:
            signal.alarm(0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals; again after Ray has started, which takes SIGTERM for itself."""
        for number in _NUMBERS:
            signal.signal(number, self._asked)
        signal.signal(signal.SIGALRM, self._over)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None and number == signal.SIGINT:
            raise GraceOver
        if self.signal is None:
            self.signal = number
            signal.alarm(GRACE_S)
            self.repeat()

    def _over(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        raise GraceOver
