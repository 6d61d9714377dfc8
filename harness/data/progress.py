"""Progress of writing and checking: bars on a terminal, plain lines with rate and time left in a log."""

import sys
import time
from typing import Any, Self

_LINE_EVERY_S = 10.0


class Reporter:
    """Shows (what, done, total) as it changes; use as a context manager."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
            rate = TextColumn("{task.fields[rate]}")
            self._bars = Progress(*columns, rate, TimeRemainingColumn(), console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Hear how far a part of the work is."""
        now = time.monotonic()
        start, first = self._started.setdefault(what, (now, done))
        rate = (done - first) / max(now - start, 1e-9) if done > first else None  # what was there is no speed
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total, rate="")
            words = "" if rate is None else f"{_short(rate)} {self._unit}/s"
            self._bars.update(self._tasks[what], completed=done, rate=words)
        elif done and (done == total or now - self._last_line >= _LINE_EVERY_S):
            self._last_line = now
            speed = "" if rate is None else f", {_short(rate)}/s"
            left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
            print(f"{what}: {done}/{total} {self._unit}{speed}{left}", file=sys.stderr, flush=True)


def _short(rate: float) -> str:
    """A rate that is not 0 does not read as 0."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
