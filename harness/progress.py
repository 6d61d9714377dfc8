"""Progress of several trials, read off their run directories: bars on a terminal, plain lines in a log.

The trials write `progress.json` ({"time", "stage", "epoch", "epochs", "step", "total_steps", "samples_per_s"}) about
once a second, wherever they run; nothing else is asked of them.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from harness.run_dir import RunDir, read_json

HEARTBEAT_S = 30.0
"""A log without news still gets a line this often."""


@dataclass(frozen=True)
class Snapshot:
    """Where one trial stands; `share` of its steps that are done."""

    stage: str
    epoch: int
    epochs: int
    share: float
    samples_per_s: float
    time_s: float
    top1: float | None = None

    @classmethod
    def of(cls, run: RunDir) -> "Snapshot | None":
        """Read a run directory; None while it has not told anything."""
        told = read_json(run.path / "progress.json")
        if told is None:
            return None
        return cls(
            stage=str(told["stage"]),
            epoch=int(told["epoch"]),
            epochs=int(told["epochs"]),
            share=min(told["step"] / max(told["total_steps"], 1), 1.0),
            samples_per_s=float(told["samples_per_s"]),
            time_s=float(told["time"]),
            top1=_latest_top1(run, str(told["stage"])),
        )

    def words(self) -> str:
        """The state in one phrase."""
        accuracy = "" if self.top1 is None else f"  top-1 {self.top1:.2f}%"
        return f"{self.stage} {self.epoch}/{self.epochs}  {self.samples_per_s:,.0f} images/s{accuracy}"


def _latest_top1(run: RunDir, stage: str) -> float | None:
    for entry in reversed(run.metrics()):
        value = entry.get("metrics", {}).get(f"{stage}/top1")
        if value is not None:
            return float(value)
    return None


@dataclass
class _Watched:
    run: RunDir
    label: str
    started: float  # wall clock: progress of an earlier life counts as a start, not as speed
    first_share: float | None = None
    share: float = 0.0
    said: tuple[str, int] | None = None
    said_at: float = 0.0
    bar: TaskID | None = None


class Board:
    """Shows the trials that run; a thread of its own reads and draws. `total` trials are expected in all.

    `lone`: one trial without a sweep around it, of which nothing is said then.
    """

    def __init__(
        self, total: int, done: int = 0, *, lone: bool = False, stream: TextIO | None = None, period_s: float = 1.0
    ) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._total, self._done, self._before = total, done, done
        self._lone, self._period_s = lone, period_s
        self._begin = time.monotonic()
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._each_tick: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._loop, name="progress", daemon=True)
        self._bars: Progress | None = None
        self._sweep_bar: TaskID | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"))
            self._bars = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)

    def __enter__(self) -> "Board":
        if self._bars is not None:
            self._bars.start()
            if not self._lone:
                self._sweep_bar = self._bars.add_task("sweep", total=1.0, words="")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(10.0)
        if self._bars is not None:
            self._bars.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars, or into the log with the time since the start."""
        with self._lock:
            self._print(line)

    def every_tick(self, action: Callable[[], None]) -> None:
        """Call `action` once a period from the board's thread."""
        self._each_tick.append(action)

    def began(self, runs: Iterable[tuple[RunDir, str]]) -> None:
        """Watch these trials, queued or running; a trial shows up once it writes progress."""
        with self._lock:
            for run, label in runs:
                self._watched.setdefault(str(run.path), _Watched(run, label, time.time()))

    def ended(self, run: RunDir, words: str) -> None:
        """A trial is over; `words` say which and how."""
        with self._lock:
            watched = self._watched.pop(str(run.path), None)
            self._done += 1
            if self._bars is not None and watched is not None and watched.bar is not None:
                self._bars.remove_task(watched.bar)
            self._print(f"{self._done}/{self._total} {words}{self._sweep_eta()}")

    def _loop(self) -> None:
        while not self._over.wait(self._period_s):
            for action in self._each_tick:
                action()
            with self._lock:
                for watched in self._watched.values():
                    snapshot = Snapshot.of(watched.run)
                    if snapshot is not None and snapshot.time_s >= watched.started:
                        self._show(watched, snapshot)
                if self._bars is not None and self._sweep_bar is not None:
                    words = f"{self._done}/{self._total} trials{self._sweep_eta()}"
                    self._bars.update(self._sweep_bar, completed=self._share(), words=words)

    def _show(self, watched: _Watched, snapshot: Snapshot) -> None:
        if watched.first_share is None:
            watched.first_share = snapshot.share
            watched.started = snapshot.time_s
        watched.share = snapshot.share
        left = self._trial_eta(watched, snapshot)
        if self._bars is not None:
            if watched.bar is None:
                watched.bar = self._bars.add_task(watched.label, total=1.0, words="")
            self._bars.update(watched.bar, completed=snapshot.share, words=snapshot.words() + left)
            return
        news = (snapshot.stage, snapshot.epoch)
        if news != watched.said or time.monotonic() - watched.said_at > HEARTBEAT_S:
            watched.said, watched.said_at = news, time.monotonic()
            place = "" if self._lone else f"{self._done + 1}/{self._total} "
            self._print(f"{place}{watched.label}: {snapshot.words()}{left}{self._sweep_eta()}")

    def _print(self, line: str) -> None:
        clock = "" if self._bars is not None else f"[{_clock(time.monotonic() - self._begin)}] "
        self._console.print(f"{clock}{line}", markup=False)

    def _share(self) -> float:
        """Share of all trials that is done, unfinished ones in part."""
        return (self._done + sum(watched.share for watched in self._watched.values())) / max(self._total, 1)

    def _trial_eta(self, watched: _Watched, snapshot: Snapshot) -> str:
        gained = snapshot.share - (watched.first_share or 0.0)
        elapsed = snapshot.time_s - watched.started
        if gained <= 0.02 or elapsed <= 0.0:
            return ""
        return f"  {_clock(elapsed / gained * (1.0 - snapshot.share))} left"

    def _sweep_eta(self) -> str:
        if self._lone:
            return ""
        gained = self._share() * self._total - self._before
        left = self._total * (1.0 - self._share())
        if gained < 0.2 or left <= 0.0:
            return ""
        return f"  (sweep: {_clock((time.monotonic() - self._begin) / gained * left)} left)"


def _clock(seconds: float) -> str:
    whole = int(max(seconds, 0.0))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
