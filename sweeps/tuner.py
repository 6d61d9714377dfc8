"""Trials through Ray Tune: a Tune function per trial, which starts a Ray Train worker group of its own.

Tune schedules, retries and (with Optuna) suggests; it restores nothing. A trial's identity, folder and checkpoints are
its own, so running the same sweep again continues what did not finish (`sweeps.plan` leaves out what did).
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import Recipe, TrialSpec
from harness.run_dir import RunDir, write_json
from sweeps.plan import PRUNED, Planner
from sweeps.resources import Demand
from sweeps.space import Distribution, Point, Space
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
    """How trials are run and who is told; `stop_file` makes those that have not begun return at once."""

    concurrency: int
    space: Space
    scratch: Path
    stop_file: Path
    trial: TrialFunction
    on_begin: Callable[[TrialSpec], None]
    on_end: Callable[[Ending], None]


def run_wave(specs: Sequence[TrialSpec], settings: TuneSettings, *, prune: bool) -> None:
    """Run these trials; with `prune` under the space's scheduler, else to the end."""
    from ray import tune

    by_key = {spec.key: spec for spec in specs}
    scheduler = _scheduler(settings.space, [spec.recipe for spec in specs]) if prune else None
    space = {
        "spec": tune.grid_search([_plain(spec) for spec in specs]),
        "stop_file": str(settings.stop_file),
        "reports": scheduler is not None,
    }

    def resources(config: dict[str, Any]) -> Any:
        return _resources(by_key[config["spec"]["key"]].recipe)

    config = tune.TuneConfig(max_concurrent_trials=settings.concurrency, reuse_actors=True, scheduler=scheduler)
    trainable = tune.with_resources(settings.trial, resources)
    _fit(trainable, space, config, settings, lambda config: by_key[config["spec"]["key"]])


def run_search(planner: Planner, samples: int, points: Sequence[Point], settings: TuneSettings) -> None:
    """Let Optuna find `samples` points, top-1 up, BOPs down; `points` that an earlier driver began come first.

    What was suggested and what came out stands in the sweep's folder (optuna.log), so a later driver learns from all.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(planner.folder / "optuna.log")))
    before = len(optuna.create_study(storage=storage, study_name="s", directions=["maximize", "minimize"],
                                     load_if_exists=True).trials)  # fmt: skip
    search = OptunaSearch(
        metric=["top1", "gbops"],
        mode=["max", "min"],
        seed=planner.space.search.seed + before,  # a later driver must not draw the same points again
        storage=storage,
        study_name="s",
        points_to_evaluate=[{f"point/{key}": value for key, value in point.items()} for point in points] or None,
    )

    trial = settings.trial  # what travels to the trials must not drag the driver along

    def spec_of(config: dict[str, Any]) -> TrialSpec:
        return planner.at(config["point"])

    def one(config: dict[str, Any]) -> dict[str, Any]:
        spec = spec_of(config)
        ending = trial({"spec": _plain(spec), "stop_file": config["stop_file"], "reports": False})
        result = RunDir(spec.run_dir).result()
        return ending if result is None else ending | {"top1": result["top1"], "gbops": result["gbops"]}

    space = {
        "point": {key: _domain(axis) for key, axis in planner.space.axes.items()},
        "stop_file": str(settings.stop_file),
    }
    limit = tune.search.ConcurrencyLimiter(search, max_concurrent=settings.concurrency)
    config = tune.TuneConfig(num_samples=samples, search_alg=limit, reuse_actors=True)
    _fit(tune.with_resources(one, _resources(planner.base)), space, config, settings, spec_of)


def _fit(
    trainable: Any, space: dict[str, Any], config: Any, settings: TuneSettings, spec_of: Callable[..., Any]
) -> None:
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # endings are told in our own words
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=config,
        run_config=tune.RunConfig(
            name="wave",
            storage_path=str(settings.scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=settings.space.retries),
            callbacks=[_listener(spec_of, settings)],
            progress_reporter=_silent_reporter(),
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(settings.scratch, ignore_errors=True)


def _plain(spec: TrialSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", by_alias=True)


def _resources(recipe: Recipe) -> Any:
    """A worker group brings its own resources; a trial of one worker runs in the Tune trial's process and asks here."""
    from ray import tune

    demand = Demand.of(recipe)
    own: dict[str, float] = {"CPU": 0, "memory": DRIVER_MEMORY_BYTES}
    if recipe.run.max_workers == 1:
        own |= {"CPU": demand.cpus_per_worker}
        own |= {"GPU": demand.gpus_per_worker} if demand.gpus_per_worker else {}
    return tune.PlacementGroupFactory([own])


def _scheduler(space: Space, recipes: Sequence[Recipe]) -> Any:
    """ASHA on the number of epochs over all stages: Tune's own counter starts again when a trial resumes."""
    if space.scheduler.name == "fifo":
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="epochs_done",
        metric="top1",
        mode="max",
        grace_period=space.scheduler.grace_epochs,
        reduction_factor=space.scheduler.reduction,
        max_t=max(recipe.search.epochs + recipe.finetune.epochs for recipe in recipes) + 1,
    )


def _domain(axis: tuple[Any, ...] | Distribution) -> Any:
    """An axis in Tune's words."""
    from ray import tune

    if isinstance(axis, tuple):
        return tune.choice(list(axis))
    if axis.choice is not None:
        return tune.choice(list(axis.choice))
    return tune.uniform(*axis.uniform) if axis.uniform is not None else tune.loguniform(*(axis.log_uniform or ()))


def _listener(spec_of: Callable[[dict[str, Any]], TrialSpec], settings: TuneSettings) -> Any:
    """A Tune callback that tells beginnings and endings as they happen."""
    from ray import tune

    class Listener(tune.Callback):
        def __reduce__(self) -> Any:  # Tune saves its state for a restore that we do not use
            return (tune.Callback, ())

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            del iteration, trials, info
            settings.on_begin(spec_of(trial.config))

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            del iteration, trials, info
            settings.on_end(_ending(spec_of(trial.config), trial.last_result or {}))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            del iteration, trials, info
            spec = spec_of(trial.config)
            message = _last_line(trial.error_file)
            note_failure(spec, message)
            settings.on_end(Ending(spec, "failed", float((trial.last_result or {}).get("time_total_s", 0.0)), message))

    return Listener()


def _ending(spec: TrialSpec, last: dict[str, Any]) -> Ending:
    """What Tune's last result of a trial says; one that the scheduler stopped did not get to report an ending."""
    ended = last.get("ended")
    if ended is None:
        write_json(
            RunDir(spec.run_dir).path / PRUNED, {"epochs_done": last.get("epochs_done"), "top1": last.get("top1")}
        )
        return Ending(spec, "pruned", float(last.get("time_total_s", 0.0)), f"after epoch {last.get('epochs_done')}")
    error = RunDir(spec.run_dir).error() or {}
    return Ending(spec, ended, float(last["wall_s"]), str(error.get("message", "")) if ended == "failed" else "")


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
