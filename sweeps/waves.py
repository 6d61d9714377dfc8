"""The part of a sweep that needs Ray: full precision first, what starts from its weights, then snapshots."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness import ray_cluster
from harness.config import TrialSpec
from harness.plan import chosen_budget
from harness.progress import Board
from harness.run_dir import RunDir, write_json
from harness.tracking.mirror import Mirror
from harness.tracking.store import Status
from sweeps import outcome
from sweeps.plan import finished, unfinished
from sweeps.stopping import GraceOver, StopRequest
from sweeps.tuner import Ending, TrialFunction, TuneSettings, run_search, run_wave

if TYPE_CHECKING:
    from sweeps.driver import Sweep

STATUS: dict[str, Status] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "pruned": "KILLED"}


@dataclass
class Clock:
    """Seconds that the driver spent in its own phases."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measuring(self, phase: str) -> Iterator[None]:
        """Add the time inside to `phase`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begin


class Waves:
    """Runs what is missing, shows it on a board, and tells the mirror."""

    def __init__(self, sweep: "Sweep", mirror: Mirror, stop: StopRequest, clock: Clock) -> None:
        self.endings: list[Ending] = []
        self._sweep, self._mirror, self._stop, self._clock = sweep, mirror, stop, clock
        self._board = Board(sweep.total, sweep.total - sweep.missing)

    def run(self, trial: TrialFunction) -> list[Ending]:
        """Every ending so far, also when asked to leave."""
        sweep = self._sweep
        with self._board as board, self._stop.listening():
            board.every_tick(self._stop.repeat)
            try:
                with ExitStack() as stack:
                    with self._clock.measuring("Ray start"):
                        nodes = stack.enter_context(ray_cluster.joined(sweep.nodes))
                        self._stop.listen()
                    settings = TuneSettings(
                        concurrency=sweep.at_once(nodes),
                        space=sweep.space,
                        scratch=sweep.path / ".tune",
                        stop_file=self._stop.path,
                        trial=trial,
                        on_begin=self._on_begin,
                        on_end=self._on_end,
                    )
                    for text in sweep.idle(nodes):
                        board.say(text)
                    with self._clock.measuring("trials"):
                        self._both(settings)
            except GraceOver:
                board.say("not every trial wrote a checkpoint in time; it goes on from its last one")
            if self._stop.signal is not None:
                board.say("left as asked; run the same command again to go on")
        return self.endings

    def _both(self, settings: TuneSettings) -> None:
        plan, space = self._sweep.plan, self._sweep.space
        if first := unfinished(plan.first, space):
            run_wave(first, settings, prune=False)
        if self._stop.signal is not None:
            return
        if space.search.algorithm == "optuna":
            self._search(settings)
            return
        for wave in (plan.rest, plan.last):
            specs = self._startable(unfinished(wave, space))
            if specs and self._stop.signal is None:
                run_wave(specs, settings, prune=True)

    def _search(self, settings: TuneSettings) -> None:
        """The points that an earlier driver left unfinished, then new ones, up to the number of samples."""
        planner, plan = self._sweep.planner, self._sweep.plan
        samples = (planner.space.search.samples or 0) - len(finished(plan.rest))
        if samples <= 0 or not finished(plan.first):
            return
        begun = {spec.key for spec in unfinished(plan.rest, planner.space)}
        points = [point for point in planner.known_points() if planner.at(point).key in begun]
        run_search(planner, samples, points[:samples], settings)

    def _startable(self, specs: Sequence[TrialSpec]) -> list[TrialSpec]:
        ready = []
        for spec in specs:
            if (missing := self._missing(spec)) is None:
                ready.append(spec)
            else:
                self._on_end(Ending(spec, "failed", 0.0, missing))
        return ready

    def _missing(self, spec: TrialSpec) -> str | None:
        """What a trial starts from and does not find, in words."""
        if spec.init is not None and not Path(spec.init).is_file():
            return "its full-precision network did not finish"
        if chosen_budget(spec.recipe.search) is not None:
            search = self._sweep.plan.search_of(spec)
            if search is not None and not _has_searched(RunDir(search.run_dir)):
                return f"the search that it is a snapshot of did not finish: {search.label}"
        return None

    def _on_begin(self, spec: TrialSpec) -> None:
        run, name = RunDir(spec.run_dir).create(), self._sweep.space.name
        named = {"key": spec.key, "label": spec.label, "experiment": name, "sweep": name}
        write_json(run.path / "trial.json", named | {"data_checksum": self._sweep.planner.checksum})
        self._stop.watch(run)
        self._mirror.watch(run)
        self._board.began([(run, spec.label)])

    def _on_end(self, ending: Ending) -> None:
        run = RunDir(ending.spec.run_dir)
        self.endings.append(ending)
        if ending.ended == "finished":
            write_json(run.path / "wall.json", {"wall_s": ending.wall_s})
        self._mirror.ended(run, STATUS[ending.ended])
        self._board.ended(run, f"{ending.spec.label}: {outcome.words(ending)}")


def _has_searched(run: RunDir) -> bool:
    return run.result_path.is_file() or (run.stages / "search.pt").is_file()
