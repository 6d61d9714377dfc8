"""Copies run directories into a tracking store: once (`sync_trial`) or all the time in a background thread (`Mirror`).

Training never waits for it and never imports mlflow. The run directory is the truth; how far the copy has come stands
in its `mlflow.json`, and a store that is lost or lags is filled again from there.

Who starts a trial writes `trial.json` ({"key", "label", "experiment", "sweep"}) into its directory, and a sweep writes
`tracking.json` (the same place, plus params, tags, metrics, artifacts, status of the parent run) into its own.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.run_dir import RunDir, parse_records, read_json, write_json
from harness.tracking import model, picture, record
from harness.tracking.store import Status, Store, StoreError

ARTIFACTS = ("config.json", "provenance.json", "policy.json", "result.json", "error.json", "layers.png", "search.png")


@dataclass(frozen=True)
class Place:
    """Where runs belong: an experiment, and the sweep (parent run) within it if there is one."""

    experiment: str
    sweep: str | None = None


@dataclass
class _Trial:
    """How far one run directory has been copied."""

    run: RunDir
    status: Status | None = None  # what the driver says about its end; None while it runs
    run_id: str | None = None
    sent: int = 0
    size: int = -1  # of metrics.jsonl at the last complete pass
    ended: Status | None = None
    settled_model: bool = False  # sent, or never to come

    @property
    def up_to_date(self) -> bool:
        return self.ended is not None and self.ended == self.status and self.settled_model


@dataclass
class _Ids:
    """Ids in the store, looked up once: of the experiment and of the parent run."""

    experiment: str | None = None
    parent: str | None = None


@dataclass(frozen=True)
class Leftover:
    """What a closed mirror could not send, and why."""

    trials: int
    reason: str


def sync_trial(store: Store, run: RunDir, place: Place | None = None, status: Status | None = None) -> None:
    """Bring the store up to date with one run directory.

    `place` None is read off trial.json; `status` None off the files: result -> FINISHED, error -> FAILED, else KILLED.
    Raises `StoreError`.
    """
    model.Maker().finish([run])
    _copy(store, place or place_of(run.path), _Trial(run, status or _status_of(run)), _Ids())


def sync_sweep(store: Store, folder: Path) -> int:
    """Bring the store up to date with a sweep's folder, the parent run included; the number of its trials."""
    _copy_parent(store, folder, _Ids())  # first: it knows when the sweep began
    runs = record.trial_dirs(folder)
    model.Maker().finish(runs)
    for run in runs:
        sync_trial(store, run)
    return len(runs)


def place_of(folder: Path) -> Place:
    """Where a trial's or a sweep's folder belongs, as its own file says; without one, the experiment "harness"."""
    told = read_json(folder / "trial.json") or read_json(folder / "tracking.json") or {"experiment": "harness"}
    return Place(told["experiment"], told.get("sweep"))


class Damage(Exception):  # noqa: N818 - a state of files
    """A run directory that cannot be read."""


class Mirror:
    """A thread that keeps a store up to date with the watched run directories until `close`.

    A store that fails is tried again with growing pauses; nothing is lost meanwhile: the directories hold everything.
    """

    def __init__(self, store: Store, place: Place, sweep_dir: Path | None = None, *, poll_s: float = 2.0) -> None:
        self.trouble: str | None = None
        self._store = store
        self._place = place
        self._sweep_dir = sweep_dir
        self._poll_s = poll_s
        self._trials: dict[Path, _Trial] = {}
        self._ids = _Ids()
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
            self._trials.setdefault(run.path, _Trial(run))

    def ended(self, run: RunDir, status: Status) -> None:
        """Say how a trial ended; its final values and status follow in the background."""
        with self._lock:
            self._trials.setdefault(run.path, _Trial(run)).status = status
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
                self.trouble = None
                pause_s = self._poll_s
            except (StoreError, Damage) as error:
                self.trouble = str(error)
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
            _copy_parent(self._store, self._sweep_dir, self._ids)
        with self._lock:
            trials = [trial for trial in self._trials.values() if not trial.up_to_date]
        damage: Damage | None = None
        for trial in trials:
            try:
                _copy(self._store, self._place, trial, self._ids)
            except (OSError, ValueError, KeyError) as error:  # one damaged directory must not keep the others waiting
                damage = Damage(f"{trial.run.path} cannot be read: {error!r}")
        self._maker.work([trial.run for trial in trials if trial.ended == "FINISHED"])
        if final and self._sweep_dir is not None and not self._parent_done:
            _copy_parent(self._store, self._sweep_dir, self._ids)
            self._parent_done = True
        if damage is not None:
            raise damage


def is_sent(store: Store, run: RunDir) -> bool:
    """Whether this store has been told the end of a finished trial; False for an sqlite store that is gone."""
    told = read_json(run.path / "mlflow.json") or {}
    there = (told.get("store"), told.get("ended"), told.get("model")) == (store.uri, "FINISHED", True)
    return there and not store.is_absent()


def _status_of(run: RunDir) -> Status:
    if run.result() is not None:
        return "FINISHED"
    return "FAILED" if run.error() is not None else "KILLED"


def _copy(store: Store, place: Place, trial: _Trial, ids: _Ids) -> None:
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


def _copy_model(store: Store, trial: _Trial) -> None:
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


def _note(store: Store, trial: _Trial) -> None:
    told = {"store": store.uri, "run_id": trial.run_id, "sent": trial.sent, "ended": trial.ended}
    write_json(trial.run.path / "mlflow.json", told | {"model": trial.settled_model})


def _open(store: Store, place: Place, trial: _Trial, span: tuple[int, int] | None, ids: _Ids) -> None:
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


def _finish(store: Store, trial: _Trial, config: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
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
    """Identity and label of a run directory: as trial.json or result.json says, else the folder's name."""
    named = read_json(run.path / "trial.json") or run.result() or {}
    return str(named.get("key", run.path.name)), str(named.get("label", run.path.name))


def _parent_id(store: Store, place: Place, experiment: str, start_ms: int | None) -> str:
    identity = {record.SWEEP_TAG: str(place.sweep), record.ROLE_TAG: "sweep"}
    return store.run(experiment, identity, str(place.sweep), start_ms, None)


def _copy_parent(store: Store, folder: Path, ids: _Ids) -> None:
    """The parent run, from the sweep folder's tracking.json."""
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
    store.set_status(ids.parent, told["status"], end_ms)
