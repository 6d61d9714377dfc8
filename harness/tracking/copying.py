"""What goes from a run directory into a tracking store, and how far it has come; `sync_...` do it once.

The run directory is the truth; how far the copy has come stands in its `mlflow.json`, and a store that is lost or lags
is filled again from there.

Who starts a trial writes `trial.json` ({"key", "label", "experiment", "sweep"}) into its directory, and a sweep writes
`tracking.json` (the same place, plus params, tags, metrics, artifacts, status of the parent run) into its own.
"""

import fcntl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.run_dir import RunDir, parse_records, read_json, write_json
from harness.settings import LONE_EXPERIMENT
from harness.tracking import model, picture, record
from harness.tracking.store import Status, Store

ARTIFACTS = ("config.json", "provenance.json", "policy.json", "result.json", "error.json", "layers.png", "search.png")


@dataclass(frozen=True)
class Place:
    """Where runs belong: an experiment, and the sweep (parent run) within it if there is one."""

    experiment: str
    sweep: str | None = None


@dataclass
class TrialCopy:
    """How far one run directory has been copied, and what its driver says about its end."""

    run: RunDir
    status: Status | None = None  # None while it runs
    run_id: str | None = None
    sent: int = 0
    size: int = -1  # of metrics.jsonl at the last complete pass
    ended: Status | None = None
    settled_model: bool = False  # sent, or never to come

    @property
    def up_to_date(self) -> bool:
        """Whether the store knows all that the trial will ever say."""
        return self.ended is not None and self.ended == self.status and self.settled_model


@dataclass
class Ids:
    """Ids in the store, looked up once: of the experiment and of the parent run."""

    experiment: str | None = None
    parent: str | None = None


def sync_trial(store: Store, run: RunDir, place: Place | None = None, status: Status | None = None) -> None:
    """Bring the store up to date with one run directory.

    `place` None is read off trial.json; `status` None off the files: result -> FINISHED, error -> FAILED, still at work
    -> RUNNING, else KILLED. A parent run that is not there is made, and ends like the trial. Raises `StoreError`.
    """
    model.Maker().finish([run])
    place, ids = place or place_of(run.path), Ids()
    trial = TrialCopy(run, status or _status_of(run))
    ids.experiment = store.experiment(place.experiment)
    orphan = place.sweep is not None and store.find_run(str(ids.experiment), _parent_identity(place)) is None
    copy_trial(store, place, trial, ids)
    if orphan and ids.parent is not None and trial.status is not None:
        span = record.span_ms(run.metrics())
        store.set_status(ids.parent, trial.status, span[1] if span else None)


def sync_sweep(store: Store, folder: Path) -> int:
    """Bring the store up to date with a sweep's folder, or a trial's; the parent run included; the number of trials."""
    runs = record.trial_dirs(folder)
    lone = [run.path for run in runs] == [folder]
    copy_parent(store, folder.parent.parent if lone else folder, Ids())  # first: it knows when the sweep began
    model.Maker().finish(runs)
    for run in runs:
        sync_trial(store, run)
    return len(runs)


def place_of(folder: Path) -> Place:
    """Where a trial's or a sweep's folder belongs, as its own file says; without one, that of lone runs."""
    told = read_json(folder / "trial.json") or read_json(folder / "tracking.json") or {"experiment": LONE_EXPERIMENT}
    return Place(told["experiment"], told.get("sweep"))


def is_sent(store: Store, run: RunDir) -> bool:
    """Whether this store has been told the end of a finished trial; False for an sqlite store that is gone."""
    told = read_json(run.path / "mlflow.json") or {}
    there = (told.get("store"), told.get("ended"), told.get("model")) == (store.uri, "FINISHED", True)
    return there and not store.is_absent()


def _status_of(run: RunDir) -> Status | None:
    """How a trial ended, as its files say; None for one that somebody works on."""
    if run.result() is not None:
        return "FINISHED"
    if run.error() is not None:
        return "FAILED"
    return None if _at_work(run.path) else "KILLED"


def _at_work(folder: Path) -> bool:
    """Whether a process holds the lock of a trial's or a sweep's folder."""
    try:
        with (folder / "lock").open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never locked, or on a file system that knows no locks
        return False
    return False


def copy_trial(store: Store, place: Place, trial: TrialCopy, ids: Ids) -> None:
    """One pass over one run directory: what is new and settled, and its end once the driver told it."""
    run, status = trial.run, trial.status
    config = read_json(run.config_path)
    content = run.metrics_path.read_text(encoding="utf-8") if run.metrics_path.exists() else ""
    if config is None:  # it never began to write
        trial.ended, trial.settled_model = status, True
        return
    if status is not None and trial.ended == status:
        _copy_model(store, trial)
        return
    if status is None and len(content) == trial.size:
        return
    records = parse_records(content)
    if trial.run_id is None:
        _open(store, place, trial, record.span_ms(records), ids)
        store.log(str(trial.run_id), params=record.params(config), tags=record.tags(run, config))
    run_id = str(trial.run_id)
    fresh = [r for r in record.settled(records, finished=status == "FINISHED") if r["seq"] > trial.sent]
    if fresh:
        store.log(run_id, record.samples(fresh))
        trial.sent = fresh[-1]["seq"]
    if status is not None:
        _finish(store, trial, config, records)
    elif trial.ended is None and trial.size == -1:
        store.set_status(run_id, "RUNNING")
    trial.size, trial.ended, trial.settled_model = len(content), status, False
    _copy_model(store, trial)
    _note(store, trial)


def _copy_model(store: Store, trial: TrialCopy) -> None:
    """The MLflow model of a finished trial, once it is made: that takes a while, and nothing else waits for it."""
    if trial.ended is None or trial.settled_model:
        return
    state = model.state(trial.run) if trial.ended == "FINISHED" else "none"
    if state == "due":
        return
    if state == "ready":
        store.log_folder(str(trial.run_id), trial.run.path / model.FOLDER, model.FOLDER)
    elif state == "failed":
        store.log(str(trial.run_id), tags={"harness.no_model": model.failure(trial.run)})
    trial.settled_model = True
    _note(store, trial)


def _note(store: Store, trial: TrialCopy) -> None:
    told = {"store": store.uri, "run_id": trial.run_id, "sent": trial.sent, "ended": trial.ended}
    write_json(trial.run.path / "mlflow.json", told | {"model": trial.settled_model})


def _open(store: Store, place: Place, trial: TrialCopy, span: tuple[int, int] | None, ids: Ids) -> None:
    """Find or make the run, and go on from where an earlier copy into the same run stopped."""
    ids.experiment = ids.experiment or store.experiment(place.experiment)
    if place.sweep is not None and ids.parent is None:
        ids.parent = _parent_id(store, place, str(ids.experiment), span[0] if span else None)
    key, label = trial_name(trial.run)
    identity = {record.KEY_TAG: key, record.ROLE_TAG: "trial"}
    if place.sweep is not None:
        identity[record.SWEEP_TAG] = place.sweep
    trial.run_id = store.run(str(ids.experiment), identity, label, span[0] if span else None, ids.parent)
    before = read_json(trial.run.path / "mlflow.json") or {}
    if (before.get("run_id"), before.get("store")) == (trial.run_id, store.uri):
        trial.sent = before["sent"]


def _finish(store: Store, trial: TrialCopy, config: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Final values, artifacts, status: all of it idempotent, since a failure half-way repeats it."""
    run, run_id, status = trial.run, str(trial.run_id), trial.status
    result = run.result()
    if status == "FINISHED" and result is not None:
        layers = result.get("layers", [])
        store.log(run_id, record.final_samples(result, records))
        store.log_new_params(run_id, record.result_params(result))
        store.log_texts(run_id, {"layers.csv": record.layer_csv(layers)})
        store.log_table(run_id, "layers.json", record.layer_table(layers))
        picture.ensure(run)
    points = record.layer_history(records)
    if points:
        store.log_texts(run_id, {"search.csv": record.history_csv(points)})
        picture.draw_search(points, run.path / "search.png")
    files = [run.path / name for name in ARTIFACTS]
    store.log_files(run_id, [path for path in files if path.is_file()] + sorted(run.path.glob("changes-*.diff")))
    store.log(run_id, tags=record.tags(run, config))
    span = record.span_ms(records)
    assert status is not None
    store.set_status(run_id, status, span[1] if span else None)


def trial_name(run: RunDir) -> tuple[str, str]:
    """Identity and label of a run directory: as its sweep says, or its result, or whoever began it; else its name."""
    told = read_json(run.path / "trial.json") or {}
    named = told if "sweep" in told else run.result() or told
    return str(named.get("key", run.path.name)), str(named.get("label", run.path.name))


def _parent_id(store: Store, place: Place, experiment: str, start_ms: int | None) -> str:
    return store.run(experiment, _parent_identity(place), str(place.sweep), start_ms, None)


def _parent_identity(place: Place) -> dict[str, str]:
    return {record.SWEEP_TAG: str(place.sweep), record.ROLE_TAG: "sweep"}


def copy_parent(store: Store, folder: Path, ids: Ids) -> None:
    """The parent run, from the sweep folder's tracking.json; one whose driver was killed is KILLED."""
    told = read_json(folder / "tracking.json")
    if told is None:
        return
    place = place_of(folder)
    ids.experiment = ids.experiment or store.experiment(place.experiment)
    ids.parent = _parent_id(store, place, str(ids.experiment), told["start_ms"])
    end_ms = told.get("end_ms")
    values = [record.Sample(key, value, end_ms or 0, 0) for key, value in told.get("metrics", {}).items()]
    store.log(ids.parent, values, told.get("params"), told.get("tags"))
    store.log_files(ids.parent, [folder / name for name in told.get("artifacts", []) if (folder / name).is_file()])
    status = told["status"]
    if status == "RUNNING" and not _at_work(folder):
        spans = [record.span_ms(run.metrics()) for run in record.trial_dirs(folder)]
        status, end_ms = "KILLED", max((span[1] for span in spans if span is not None), default=told["start_ms"])
    store.set_status(ids.parent, status, end_ms)
