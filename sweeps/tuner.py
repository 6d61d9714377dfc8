"""Trials through Ray Tune: a Tune function per trial, which starts a Ray Train worker group of its own.

Tune schedules and retries; it restores nothing. A trial's identity, folder and checkpoints are its own, so running the
same sweep again continues what did not finish (`sweeps.plan` leaves out what did).
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import TrialSpec
from harness.run_dir import RunDir
from sweeps.resources import Demand
from sweeps.space import Space
from sweeps.trial import note_failure

DRIVER_MEMORY_BYTES = 1 << 20
"""What a trial's driver asks for. It must not ask for CPUs, or trials that want them all could never start."""

TrialFunction = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Ending:
    """How one trial ended: finished, stopped, pruned, or failed with a `message`; `wall_s` is its driver's time."""

    spec: TrialSpec
    ended: str
    wall_s: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class TuneSettings:
    """How a wave of trials is run; `stop_file` makes those that have not begun return at once."""

    concurrency: int
    space: Space
    scratch: Path
    stop_file: Path
    trial: TrialFunction


def run_wave(specs: Sequence[TrialSpec], settings: TuneSettings, on_end: Callable[[Ending], None]) -> list[Ending]:
    """Run these trials; each ending is told to `on_end` as it happens and returned in order of the specs."""
    from ray import tune

    by_key = {spec.key: spec for spec in specs}
    endings: dict[str, Ending] = {}

    def note(ending: Ending) -> None:
        endings[ending.spec.key] = ending
        on_end(ending)

    tuner = tune.Tuner(
        tune.with_resources(settings.trial, _resources),
        param_space={
            "spec": tune.grid_search([spec.model_dump(mode="json", by_alias=True) for spec in specs]),
            "stop_file": str(settings.stop_file),
            "reports": False,
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=settings.concurrency, reuse_actors=True),
        run_config=tune.RunConfig(
            name="wave",
            storage_path=str(settings.scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=settings.space.retries),
            callbacks=[_listener(by_key, note)],
            progress_reporter=_silent_reporter(),
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(settings.scratch, ignore_errors=True)
    return [endings.get(spec.key, Ending(spec, "stopped")) for spec in specs]


def _resources(config: dict[str, Any]) -> Any:
    """A worker group brings its own resources; a trial of one worker runs in the Tune trial's process and asks here."""
    from ray import tune

    recipe = TrialSpec.model_validate(config["spec"]).recipe
    demand = Demand.of(recipe)
    own: dict[str, float] = {"CPU": 0, "memory": DRIVER_MEMORY_BYTES}
    if recipe.run.max_workers == 1:
        own |= {"CPU": demand.cpus_per_worker}
        own |= {"GPU": demand.gpus_per_worker} if demand.gpus_per_worker else {}
    return tune.PlacementGroupFactory([own])


def _listener(by_key: dict[str, TrialSpec], note: Callable[[Ending], None]) -> Any:
    """A Tune callback that tells endings as they happen."""
    from ray import tune

    class Listener(tune.Callback):
        def __reduce__(self) -> Any:  # Tune saves its state for a restore that we do not use
            return (tune.Callback, ())

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            del iteration, trials, info
            spec = by_key[trial.config["spec"]["key"]]
            last = trial.last_result or {}
            error = RunDir(spec.run_dir).error() or {}
            # A trial that a scheduler stopped has reported no ending.
            ended = str(last.get("ended", "pruned"))
            message = str(error.get("message", "")) if ended == "failed" else ""
            note(Ending(spec, ended, float(last.get("wall_s", last.get("time_total_s", 0.0))), message))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            del iteration, trials, info
            spec = by_key[trial.config["spec"]["key"]]
            message = _last_line(trial.error_file)
            note_failure(spec, message)
            note(Ending(spec, "failed", float((trial.last_result or {}).get("time_total_s", 0.0)), message))

    return Listener()


def _last_line(error_file: str | None) -> str:
    """The line of a traceback that says what happened."""
    text = Path(error_file).read_text(encoding="utf-8").strip() if error_file and Path(error_file).is_file() else ""
    return text.splitlines()[-1] if text else "the trial's process ended without a word"


def _silent_reporter() -> Any:
    from ray import tune

    class Silent(tune.ProgressReporter):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            del args, kwargs

        def should_report(self, trials: list[Any], done: bool = False) -> bool:
            del trials, done
            return False

        def report(self, trials: list[Any], done: bool, *sys_info: dict[str, Any]) -> None:
            del trials, done, sys_info

    return Silent()
