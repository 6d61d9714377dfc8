"""A background thread that keeps a tracking store up to date with run directories.

Training never waits for it and never imports mlflow: it reads what the trials write, wherever they run.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from harness.run_dir import RunDir
from harness.tracking import model
from harness.tracking.copying import Ids, Place, TrialCopy, copy_parent, copy_trial
from harness.tracking.store import Status, Store, StoreError


@dataclass(frozen=True)
class Leftover:
    """What a closed mirror could not send, and why."""

    trials: int
    reason: str


class Damage(Exception):  # noqa: N818 - a state of files
    """A run directory that cannot be read."""


class Mirror:
    """A thread that keeps a store up to date with the watched run directories until `close`.

    A store that fails is tried again with growing pauses; nothing is lost meanwhile: the directories hold everything.
    `trouble` says what failed in the last pass, `failures` how many passes in a row have.
    """

    def __init__(self, store: Store, place: Place, sweep_dir: Path | None = None, *, poll_s: float = 2.0) -> None:
        self.trouble: str | None = None
        self.failures = 0
        self._store = store
        self._place = place
        self._sweep_dir = sweep_dir
        self._poll_s = poll_s
        self._trials: dict[Path, TrialCopy] = {}
        self._ids = Ids()
        self._maker = model.Maker()
        self._parent_done = sweep_dir is None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing: float | None = None
        self._thread = threading.Thread(target=self._loop, name="mlflow-mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close(5.0)

    def watch(self, run: RunDir) -> None:
        """Copy this directory from now on."""
        with self._lock:
            self._trials.setdefault(run.path, TrialCopy(run))

    def ended(self, run: RunDir, status: Status) -> None:
        """Say how a trial ended; its final values and status follow in the background."""
        with self._lock:
            self._trials.setdefault(run.path, TrialCopy(run)).status = status
        self._wake.set()

    def close(self, patience_s: float = 30.0) -> Leftover | None:
        """Send what is left for at most `patience_s`, then stop; what could not be sent, or None."""
        if self._closing is None:
            self._closing = time.monotonic() + patience_s
            self._wake.set()
        # One request may be under way when the patience ends; it has a limit of its own.
        self._thread.join(patience_s + 15.0)
        self._maker.close()
        left = sum(not trial.up_to_date for trial in self._trials.values())
        if not left and self._parent_done:
            return None
        without_model = sum(trial.ended == "FINISHED" and not trial.settled_model for trial in self._trials.values())
        reason = "their models are not made yet" if left == without_model else "there was not enough time"
        return Leftover(left, self.trouble or reason)

    def _loop(self) -> None:
        pause_s = self._poll_s
        while True:
            closing = self._closing
            try:
                self._pass(final=closing is not None)
                self.trouble, self.failures = None, 0
                pause_s = self._poll_s
            except (StoreError, Damage) as error:
                self.trouble, self.failures = str(error), self.failures + 1
                pause_s = min(pause_s * 2, 30.0)
            if closing is not None and (self._all_sent() or time.monotonic() > closing):
                return
            self._wake.wait(min(pause_s, 1.0) if closing is not None else pause_s)
            self._wake.clear()

    def _all_sent(self) -> bool:
        ended = [trial for trial in self._trials.values() if trial.status is not None]
        return self.trouble is None and all(trial.up_to_date for trial in ended)

    def _pass(self, *, final: bool) -> None:
        if self._sweep_dir is not None and self._ids.parent is None:
            copy_parent(self._store, self._sweep_dir, self._ids)
        with self._lock:
            trials = [trial for trial in self._trials.values() if not trial.up_to_date]
        damage: Damage | None = None
        for trial in trials:
            try:
                copy_trial(self._store, self._place, trial, self._ids)
            except (OSError, ValueError, KeyError) as error:  # one damaged directory must not keep the others waiting
                damage = Damage(f"{trial.run.path} cannot be read: {error!r}")
        try:
            self._maker.work([trial.run for trial in trials if trial.ended == "FINISHED"])
        except OSError as error:  # no room, no more processes
            damage = Damage(f"models cannot be made: {error}")
        if final and self._sweep_dir is not None and not self._parent_done:
            copy_parent(self._store, self._sweep_dir, self._ids)
            self._parent_done = True
        if damage is not None:
            raise damage
