"""One sweep from its space to its table: plan, preflight, run what is missing, mirror, report."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness import data, ray_cluster
from harness.config import Recipe, TrialSpec
from harness.progress import Board
from harness.ray_cluster import Node
from harness.run_dir import RunDir, write_json
from harness.settings import EXIT_PREEMPTED
from harness.tracking.mirror import Mirror, Place
from harness.tracking.store import Status, Store, default_uri
from sweeps import folder, outcome
from sweeps.plan import Plan, Planner, finished, unfinished
from sweeps.resources import Demand, concurrency
from sweeps.space import Space
from sweeps.stopping import GraceOver, StopRequest
from sweeps.trial import run_trial
from sweeps.tuner import Ending, TrialFunction, TuneSettings, run_wave

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


@dataclass(frozen=True)
class Sweep:
    """A planned sweep: where it lives, what it tries, what this machine offers (None: a cluster will tell)."""

    space: Space
    base: Recipe
    path: Path
    plan: Plan
    nodes: tuple[Node, ...] | None

    def at_once(self, nodes: Sequence[Node]) -> int:
        """How many trials run at once. Raises `UserError` with the arithmetic if one never can."""
        demands = {Demand.of(spec.recipe) for spec in self.plan.trials} or {Demand.of(self.base)}
        return min(concurrency(demand, nodes, self.space.name, self.space.max_concurrent) for demand in demands)


def prepare(space: Space, base: Recipe, runs_dir: Path) -> Sweep:
    """Plan a sweep and refuse what cannot work, before anything heavy starts. Raises `UserError`."""
    nodes = (
        None
        if ray_cluster.uses_existing_cluster()
        else tuple(ray_cluster.local_nodes(gpus=base.run.gpus_per_worker > 0))
    )
    if nodes is not None:  # before any data is written; the points may ask for more and are looked at again below
        concurrency(Demand.of(base), nodes, space.name)
    path = (runs_dir / space.name).resolve()
    sweep = Sweep(space, base, path, Planner(space, base, path, dataset(base)).plan(), nodes)
    if nodes is not None:
        sweep.at_once(nodes)
    return sweep


def dataset(base: Recipe) -> str:
    """The data's checksum. A source that needs no place (`digits`) is written on first use; others must be there."""
    if ":" in base.data.source:
        return data.data_checksum(base.data.dir)
    return data.ensure(base.data.source, base.data.dir)


def store_of(runs_dir: Path) -> Store:
    """The tracking store that a runs folder reports to."""
    return Store(default_uri(runs_dir), runs_dir / "mlartifacts")


def run(
    space: Space, base: Recipe, runs_dir: Path, say: Callable[[str], None], *, trial: TrialFunction = run_trial
) -> int:
    """Run what is missing of a sweep and report all of it; exit status 0, 1 with failed trials, 85 if asked to leave.

    `trial` is what runs in Tune's processes. Raises `UserError`.
    """
    clock, start_ms = Clock(), round(time.time() * 1000)
    with folder.held(runs_dir / space.name):
        with clock.measuring("data and plan"):
            sweep = prepare(space, base, runs_dir)
            folder.claim(sweep.path, space, base, dataset(base), sweep.plan.trials)
        trials, missing = sweep.plan.trials, unfinished(sweep.plan.trials)
        say(f"sweep {space.name}: {len(trials)} trials, {len(trials) - len(missing)} done, {len(missing)} to run")
        parent = outcome.Parent(sweep.path, space, base, start_ms)
        if missing:
            parent.write("RUNNING", None, None)
        stop = StopRequest(sweep.path, trials)
        with Mirror(store_of(runs_dir), Place(space.name, space.name), sweep.path) as mirror:
            for spec in finished(trials):  # what an earlier driver finished but did not get to send
                mirror.ended(RunDir(spec.run_dir), "FINISHED")
            endings = _Wave(sweep, mirror, stop, clock).run(missing, trial) if missing else []
            with clock.measuring("tables"):
                frontier = outcome.from_folders([sweep.path])
                artifacts = outcome.write(frontier, sweep.path)
                outcome.draw_layers(trials)
            if missing or not parent.exists():
                parent.write("FINISHED" if stop.signal is None else "KILLED", frontier, artifacts)
            with clock.measuring("MLflow after the last trial"):
                leftover = mirror.close()
    outcome.show_table(frontier)
    outcome.show_summary(outcome.Summary(sweep.path, trials, store_of(runs_dir), endings, clock.seconds, leftover))
    if stop.signal is not None:
        return 130 if stop.signal == signal.SIGINT else EXIT_PREEMPTED
    return 1 if any(ending.ended == "failed" for ending in endings) else 0


@dataclass
class _Wave:
    """The part of a sweep that needs Ray."""

    sweep: Sweep
    mirror: Mirror
    stop: StopRequest
    clock: Clock
    endings: list[Ending] = field(default_factory=list)

    def run(self, missing: Sequence[TrialSpec], trial: TrialFunction) -> list[Ending]:
        """Full precision first, then what starts from its weights; every ending so far, also when asked to leave."""
        total = len(self.sweep.plan.trials)
        with Board(total, total - len(missing)) as board, self.stop.listening():
            board.every_tick(self.stop.repeat)
            self.board = board
            try:
                with ExitStack() as stack:
                    with self.clock.measuring("Ray start"):
                        nodes = stack.enter_context(ray_cluster.joined(self.sweep.nodes))
                        self.stop.listen()
                    settings = TuneSettings(
                        self.sweep.at_once(nodes),
                        self.sweep.space,
                        self.sweep.path / ".tune",
                        self.stop.path,
                        trial,
                    )
                    for wave in (self.sweep.plan.first, self.sweep.plan.rest):
                        self._wave(unfinished(wave), settings)
            except GraceOver:
                board.say("not every trial wrote a checkpoint in time; it goes on from its last one")
            if self.stop.signal is not None:
                board.say("left as asked; run the same command again to go on")
        return self.endings

    def _wave(self, specs: Sequence[TrialSpec], settings: TuneSettings) -> None:
        ready = [spec for spec in specs if spec.init is None or Path(spec.init).is_file()]
        if self.stop.signal is not None:
            return
        for spec in specs:
            if spec not in ready:
                self._on_end(Ending(spec, "failed", 0.0, "its full-precision network did not finish"))
        for spec in ready:
            run, place = RunDir(spec.run_dir).create(), {"experiment": self.sweep.space.name}
            write_json(
                run.path / "trial.json", {"key": spec.key, "label": spec.label, **place, "sweep": place["experiment"]}
            )
            self.mirror.watch(run)
        self.board.began((RunDir(spec.run_dir), spec.label) for spec in specs)
        if ready:
            with self.clock.measuring("trials"):
                run_wave(ready, settings, self._on_end)

    def _on_end(self, ending: Ending) -> None:
        run = RunDir(ending.spec.run_dir)
        self.endings.append(ending)
        self.mirror.ended(run, STATUS[ending.ended])
        self.board.ended(run, outcome.words(ending))
