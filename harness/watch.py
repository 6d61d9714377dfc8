"""Watching a run from the inside: a watchdog that finds and names a stalled rank, and a profiler of a few steps."""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harness.run_dir import RunDir, read_json, write_json

_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last told: how many beats it made, at which place, for how long it has been there (`age_s`)."""

    rank: int
    pid: int
    host: str
    beats: int
    place: str
    age_s: float
    time: float


class Watchdog:
    """A thread per rank that writes this rank's heartbeat and, when it stops, finds out whose fault that is.

    The loop calls `beat(place)` at every step; a rank without one for `limit_s` tells `on_stall` who is to blame. Ranks
    that wait for a stalled peer inside a collective cannot say so themselves, and would wait for an hour.
    """

    def __init__(
        self, run: RunDir, rank: int, world: int, limit_s: float, on_stall: Callable[[str], None] | None = None
    ) -> None:
        self._folder, self._rank, self._world = run.path / "heartbeats", rank, world
        self._limit_s, self._period_s = limit_s, min(10.0, limit_s / 5)
        self._on_stall = on_stall or self._give_up
        self._run = run
        self._beats, self._place, self._since = 0, "starting", time.monotonic()
        self._over = threading.Event()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tell()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, place: str) -> None:
        """This rank is alive and comes to `place`."""
        self._beats, self._place, self._since = self._beats + 1, place, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._period_s):
            with suppress(OSError):  # a full disk must not end the watch
                self._tell()
            if time.monotonic() - self._since > self._limit_s:
                self._on_stall(verdict(self._others(), time.time(), self._limit_s, 3 * self._period_s))
                return

    def _tell(self) -> None:
        age_s = time.monotonic() - self._since
        own = Heartbeat(self._rank, os.getpid(), platform.node(), self._beats, self._place, age_s, time.time())
        path = self._folder / f"rank-{self._rank}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(own)), encoding="utf-8")
        temporary.replace(path)

    def _others(self) -> list[Heartbeat]:
        found = (read_json(self._folder / f"rank-{rank}.json") for rank in range(self._world))
        return [Heartbeat(**told) for told in found if told is not None]

    def _give_up(self, message: str) -> None:
        """End this process: in a collective it can do nothing else. Its launcher sees to the rest."""
        write_json(self._run.path / "stall.json", {"message": message, "time": time.time()})
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(1)


def verdict(beats: Sequence[Heartbeat], now: float, limit_s: float, silence_s: float) -> str:
    """Who holds up the run: ranks whose process tells nothing any more, else those that are behind the others."""
    silent = [beat for beat in beats if now - beat.time > silence_s]
    foremost = max(beat.beats for beat in beats)
    behind = [beat for beat in beats if beat.beats < foremost]

    def named(beat: Heartbeat) -> str:
        return f"rank {beat.rank} (process {beat.pid} on {beat.host}, last seen {beat.place})"

    if silent:
        blame = f"{', '.join(map(named, silent))} tells nothing any more: stopped, or its machine is gone"
    elif behind:
        blame = f"{', '.join(map(named, behind))} is behind the others, which wait for it"
    else:
        blame = f"all ranks stand at the same place: {beats[0].place}"
    return f"no progress for {limit_s:g} s (run.stall_limit_s); {blame}. Run the same command again to go on."


class StepProfiler:
    """Traces `steps` steps of a stage after a warm-up, into trace-<stage>.json for chrome://tracing or Perfetto."""

    def __init__(self, path: Path, steps: int) -> None:
        self._path, self._left, self._warm_up = path, steps, _WARM_UP_STEPS
        self._profile: Any = None

    def step(self) -> None:
        """Call after every step."""
        if self._left == 0:
            return
        if self._warm_up:
            self._warm_up -= 1
            if self._warm_up == 0:
                self._profile = torch.profiler.profile(record_shapes=True)
                self._profile.start()
            return
        self._left -= 1
        if self._left == 0:
            self.close()

    def close(self) -> None:
        """Write what there is: call when the stage ends, which may be before all steps were made."""
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path))
            self._profile = None
