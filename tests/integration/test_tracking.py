"""The mirror against real MLflow stores: sqlite, a server process that goes away and comes back, one on PostgreSQL."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.config import TrialSpec, load_recipe
from harness.run_dir import RunDir, write_json
from harness.tracking.copying import Place, sync_sweep, sync_trial
from harness.tracking.mirror import Mirror
from harness.tracking.store import Store, StoreError
from tests.integration import tiny
from tests.integration.fake_trial import expected, write_trial

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]
PLACE = Place("exp", "exp")


def spec(tmp_path: Path, number: int = 0) -> TrialSpec:
    recipe = load_recipe("digits_resnet20", [f"search.lambda=0.{number + 1}"])
    path = tmp_path / "runs" / "exp" / "trials" / f"trial{number}"
    made = TrialSpec(recipe=recipe, key=f"{number:016x}", label=f"trial{number}", run_dir=str(path))
    run = RunDir(path).create()
    write_json(run.path / "trial.json", {"key": made.key, "label": made.label, "experiment": "exp", "sweep": "exp"})
    return made


def describe_sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "exp"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pareto.md").write_text("# table\n")
    told = {"experiment": "exp", "sweep": "exp", "status": "FINISHED", "start_ms": 1000, "end_ms": 2000}
    told |= {"params": {"a": "1"}, "metrics": {"h": 2.5}, "artifacts": ["pareto.md"]}
    write_json(folder / "tracking.json", told)
    return folder


def contents(store: Store) -> dict[str, dict]:
    """Everything a store holds of the experiment, by run name, without the ids and times that MLflow makes up."""
    client = store.client
    experiment = client.get_experiment_by_name("exp")
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        history = {
            key: sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
        }
        tags = {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.") or k == "mlflow.runName"}
        files = sorted(entry.path for entry in client.list_artifacts(run.info.run_id))
        assert run.info.run_name not in found, "a run is there twice"
        found[run.info.run_name] = {
            "params": run.data.params, "tags": tags, "history": history, "files": files, "status": run.info.status,
            "start": run.info.start_time, "end": run.info.end_time,
        }  # fmt: skip
    return found


@functools.cache
def empty_database() -> bytes:
    """An sqlite store as MLflow makes it, which takes it seconds each time."""
    with tempfile.TemporaryDirectory() as name:
        assert Store(f"sqlite:///{name}/mlflow.db").experiments() == ["Default"]
        return (Path(name) / "mlflow.db").read_bytes()


def sqlite_store(folder: Path) -> Store:
    if not folder.exists():
        folder.mkdir()
        (folder / "mlflow.db").write_bytes(empty_database())
    return Store(f"sqlite:///{folder}/mlflow.db", folder / "mlartifacts")


@dataclass
class Server:
    """A real MLflow server process on the loopback interface."""

    folder: Path
    port: int
    backend: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += [
            "--workers",
            "1",
            "--backend-store-uri",
            self.backend,
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.2)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait(30)


@pytest.fixture
def server(tmp_path: Path, free_port: int) -> Iterator[Server]:
    made = Server(tmp_path, free_port, f"sqlite:///{tmp_path}/server.db")
    made.start()
    yield made
    made.stop()


def append_epoch(run: RunDir, epoch: int) -> None:
    """One epoch as a trial writes it: its metrics, then a checkpoint that covers them."""
    base = {"time": 1.7e9 + epoch, "stage": "search", "epoch": epoch, "step": 10 * epoch}
    with run.metrics_path.open("a") as file:
        metrics = {"search/loss": 1.0 / epoch, "search/top1": 50.0 + epoch}
        file.write(json.dumps({"seq": 2 * epoch - 1, **base, "kind": "metrics", "metrics": metrics}) + "\n")
        covering = {"seq": 2 * epoch, **base, "kind": "checkpoint", "metrics": {}, "covers": 2 * epoch - 1}
        file.write(json.dumps(covering) + "\n")


def wait_until(condition: object, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def test_a_lost_store_is_rebuilt_and_twice_gives_the_same(tmp_path: Path):
    folder = describe_sweep(tmp_path)
    for number in range(3):
        run = write_trial(spec(tmp_path, number))
        (run.path / "changes-0123abcd.diff").write_text("-a\n+b\n")
    first = sqlite_store(tmp_path / "first")
    with Mirror(first, PLACE, folder, poll_s=0.1) as mirror:
        for run in sorted((folder / "trials").iterdir()):
            mirror.ended(RunDir(run), "FINISHED")
        assert mirror.close() is None
    original = contents(first)
    assert set(original) == {"exp", "trial0", "trial1", "trial2"}
    assert original["trial1"]["status"] == "FINISHED"
    assert original["trial1"]["end"] == 1700000003000
    assert {"policy.json", "layers.png", "search.png", "search.csv", "changes-0123abcd.diff"} <= set(
        original["trial1"]["files"]
    )
    shutil.rmtree(tmp_path / "first")
    rebuilt = sqlite_store(tmp_path / "second")
    assert sync_sweep(rebuilt, folder) == 3
    assert contents(rebuilt) == original
    assert sync_sweep(rebuilt, folder) == 3
    assert contents(rebuilt) == original
    found = sorted(rebuilt.summaries("exp") or [], key=lambda row: row["key"])
    assert found == [summary_of(folder / "trials" / f"trial{number}") for number in range(3)]


def summary_of(path: Path) -> dict:
    from harness.tracking import record

    found = record.summary(RunDir(path))
    assert found is not None
    return found


def test_only_settled_records_are_sent_and_a_resume_supersedes_nothing(tmp_path: Path):
    made = spec(tmp_path)
    run = RunDir(made.run_dir)
    write_json(run.config_path, made.recipe.to_dict())
    append_epoch(run, 1)
    with run.metrics_path.open("a") as file:  # beyond the checkpoint: a resume will write this epoch again
        lost = {"seq": 3, "time": 1.7e9 + 5, "kind": "metrics", "stage": "search", "epoch": 2, "step": 20}
        file.write(json.dumps(lost | {"metrics": {"search/loss": 99.0}}) + "\n")
    store = sqlite_store(tmp_path / "store")
    with Mirror(store, Place("exp"), poll_s=0.05) as mirror:
        mirror.watch(run)
        wait_until((run.path / "mlflow.json").exists)
        assert contents(store)["trial0"]["status"] == "RUNNING"
        text = run.metrics_path.read_text().splitlines(keepends=True)
        run.metrics_path.write_text("".join(text[:2]))
        append_epoch(run, 2)
        append_epoch(run, 3)
        write_json(run.result_path, expected(made))
        mirror.ended(run, "FINISHED")
        assert mirror.close() is None
    history = contents(store)["trial0"]["history"]
    assert [(step, value) for step, _, value in history["search/loss"]] == [(10, 1.0), (20, 0.5), (30, 1 / 3)]
    assert [step for step, *_ in history["final/top1"]] == [30]


@pytest.mark.parametrize(("files", "status"), [("result", "FINISHED"), ("error", "FAILED"), ("", "KILLED")])
def test_status_for_every_way_to_end(tmp_path: Path, files: str, status: str):
    made = spec(tmp_path)
    run = write_trial(made, finish=files == "result")
    if files == "error":
        write_json(run.error_path, {"message": "the loss is nan", "stage": "search"})
    store = sqlite_store(tmp_path / "store")
    sync_trial(store, run)
    found = contents(store)["trial0"]
    assert found["status"] == status
    assert found["tags"].get("harness.error") == ("the loss is nan" if files == "error" else None)


def test_a_lone_trial_leaves_no_parent_running(tmp_path: Path):
    """With its sweep's folder around it the parent is that sweep; taken elsewhere, it ends like the trial."""
    folder = describe_sweep(tmp_path)
    run = write_trial(spec(tmp_path))
    at_home = sqlite_store(tmp_path / "home")
    assert sync_sweep(at_home, run.path) == 1
    parent = contents(at_home)["exp"]
    assert (parent["status"], parent["start"], parent["end"]) == ("FINISHED", 1000, 2000)
    assert parent["history"]["h"] == [(0, 2000, 2.5)]
    shutil.copytree(run.path, tmp_path / "taken" / "away" / "trial0")
    elsewhere = sqlite_store(tmp_path / "elsewhere")
    assert sync_sweep(elsewhere, tmp_path / "taken" / "away" / "trial0") == 1
    found = contents(elsewhere)
    assert [found[name]["status"] for name in ("exp", "trial0")] == ["FINISHED", "FINISHED"]
    assert found["exp"]["end"] == found["trial0"]["end"]
    told = json.loads((folder / "tracking.json").read_text())
    write_json(folder / "tracking.json", told | {"status": "RUNNING", "end_ms": None})
    assert sync_sweep(at_home, folder) == 1
    parent = contents(at_home)["exp"]
    assert (parent["status"], parent["end"]) == ("KILLED", 1700000003000), "its driver is gone"


def test_what_somebody_works_on_is_running(tmp_path: Path):
    folder = describe_sweep(tmp_path)
    told = json.loads((folder / "tracking.json").read_text())
    write_json(folder / "tracking.json", told | {"status": "RUNNING", "end_ms": None})
    run = write_trial(spec(tmp_path), finish=False)
    store = sqlite_store(tmp_path / "store")
    with run.lock(), RunDir(folder).lock():  # a sweep's folder is locked alike
        sync_sweep(store, folder)
        assert {found["status"] for found in contents(store).values()} == {"RUNNING"}
    sync_sweep(store, folder)
    assert {found["status"] for found in contents(store).values()} == {"KILLED"}


def test_a_run_that_goes_on_after_a_kill_is_the_same_run(tmp_path: Path):
    made = spec(tmp_path)
    run = write_trial(made, epochs=2, finish=False)
    store = sqlite_store(tmp_path / "store")
    sync_trial(store, run)
    with Mirror(store, PLACE, poll_s=0.05) as mirror:
        mirror.watch(run)
        wait_until(lambda: contents(store)["trial0"]["status"] == "RUNNING")
        append_epoch(run, 3)
        write_json(run.result_path, expected(made))
        mirror.ended(run, "FINISHED")
        assert mirror.close() is None
    found = contents(store)["trial0"]
    assert found["status"] == "FINISHED"
    assert len(found["history"]["search/loss"]) == 3


def test_outages_hangs_and_restarts_lose_and_double_nothing(tmp_path: Path, server: Server):
    """The server hangs, is killed and comes back while 16 trials write; in the end every value is there once."""
    trials, epochs = 16, 12
    runs = []
    for number in range(trials):
        made = spec(tmp_path, number)
        run = RunDir(made.run_dir)
        write_json(run.config_path, made.recipe.to_dict())
        runs.append((made, run))
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "2"
    try:
        store = Store(server.uri, timeout_s=2.0)
        with Mirror(store, PLACE, poll_s=0.05) as mirror:
            slowest = 0.0
            for epoch in range(1, epochs + 1):
                for _, run in runs:
                    begin = time.monotonic()
                    mirror.watch(run)
                    append_epoch(run, epoch)
                    slowest = max(slowest, time.monotonic() - begin)
                if epoch == 3:
                    server.signal(signal.SIGSTOP)  # accepts, and never answers
                    wait_until(lambda: mirror.trouble is not None)
                if epoch == 6:
                    server.signal(signal.SIGCONT)
                    wait_until(lambda: mirror.trouble is None)
                if epoch == 8:
                    server.stop()
                    wait_until(lambda: mirror.trouble is not None)
            for made, run in runs:
                write_json(run.result_path, expected(made))
                mirror.ended(run, "FINISHED")
            server.start()
            assert mirror.close(120.0) is None
    finally:
        del os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    assert slowest < 5.0, "writing waited for the server"
    found = contents(Store(server.uri))
    assert len([name for name in found if name.startswith("trial")]) == trials
    for number in range(trials):
        history = found[f"trial{number}"]["history"]
        assert [value for _, _, value in history["search/loss"]] == [1.0 / epoch for epoch in range(1, epochs + 1)]
        assert len(history["final/top1"]) == 1
        assert found[f"trial{number}"]["status"] == "FINISHED"


@pytest.mark.ffcv
def test_a_training_that_outlives_its_server_loses_nothing(tmp_path: Path, server: Server):
    """The server dies while a trial trains and stays away until it has ended, longer than any request is tried."""
    epochs = 40
    recipe = tiny.recipe_file(tiny.write_data(tmp_path / "tiny"))
    path = tmp_path / "runs" / "exp" / "trials" / "trial0"
    options = ["search.method=full_precision", f"pretrain.epochs={epochs}", "run.threads=1"]
    command = [sys.executable, "-m", "harness", "train", str(recipe), "--run-dir", str(path)]
    command += [word for option in options for word in ("--set", option)]
    run = RunDir(path).create()
    write_json(path / "trial.json", {"key": "0", "label": "trial0", "experiment": "exp", "sweep": "exp"})
    with Mirror(Store(server.uri, timeout_s=2.0), PLACE, poll_s=0.05) as mirror:
        mirror.watch(run)
        with (tmp_path / "log").open("wb") as log:
            training = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
        try:
            wait_until(lambda: training.poll() is not None or len(run.metrics()) > 1)
            assert training.poll() is None, (tmp_path / "log").read_text()
            server.stop()
            assert training.wait(120) == 0, (tmp_path / "log").read_text()
        finally:
            training.kill()
            training.wait()
        mirror.ended(run, "FINISHED")
        # a request has at most two tries: by now all that were under way have been given up, several times over
        wait_until(lambda: mirror.failures >= 5, limit_s=120.0)
        server.start()
        assert mirror.close(120.0) is None
    (found,) = [each for name, each in contents(Store(server.uri)).items() if name == "trial0"]
    assert found["status"] == "FINISHED"
    sent = {(key, step, value) for key, points in found["history"].items() for step, _, value in points}
    records = [record for record in run.metrics() if record["kind"] == "metrics"]
    written = {(key, record["step"], float(value)) for record in records for key, value in record["metrics"].items()}
    assert len([record for record in records if record["stage"] == "pretrain"]) == epochs
    assert written <= sent
    assert sum(len(found["history"][key]) for key in records[0]["metrics"]) == epochs * len(records[0]["metrics"])


def test_a_server_that_stays_away_costs_the_patience_and_is_named(tmp_path: Path, free_port: int):
    write_trial(spec(tmp_path))
    store = Store(f"http://127.0.0.1:{free_port}", timeout_s=2.0)
    with Mirror(store, PLACE, poll_s=0.05) as mirror:
        mirror.ended(RunDir(spec(tmp_path).run_dir), "FINISHED")
        left = mirror.close(2.0)
    assert left is not None
    assert left.trials == 1
    assert str(free_port) in left.reason
    with pytest.raises(StoreError):
        sync_trial(store, RunDir(spec(tmp_path).run_dir))


@contextmanager
def postgres(folder: Path, port: int) -> Iterator[str]:
    """A PostgreSQL of our own, in the test's folder, on the loopback interface; as an ordinary user if we are root."""
    (binary,) = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
    data = folder / "pg"
    data.mkdir(parents=True)
    user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(data, "nobody", "nogroup")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/", **user}
    subprocess.run([binary / "initdb", "-D", data, "-U", "harness", "--auth=trust", "-E", "UTF8"], check=True, **quiet)
    options = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(data)]
    server = subprocess.Popen([binary / "postgres", "-D", data, *options], **quiet)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run([binary / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)], check=False).returncode:
            assert server.poll() is None, "PostgreSQL ended"
            assert time.monotonic() < deadline, "PostgreSQL did not start"
            time.sleep(0.2)
        yield f"postgresql+psycopg2://harness@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


@pytest.mark.postgres
def test_a_server_on_postgresql_takes_16_writers(tmp_path: Path, free_port: int):
    folder = Path("/tmp") / f"pg{os.getpid()}"
    folder.mkdir(mode=0o755)
    try:
        with postgres(folder, free_port) as backend:
            server = Server(tmp_path, unused_port(), backend)
            server.start()
            try:
                specs = [spec(tmp_path, number) for number in range(16)]
                for made in specs:
                    write_trial(made)
                errors: list[BaseException] = []

                def write(made: TrialSpec) -> None:
                    try:
                        sync_trial(Store(server.uri, timeout_s=60.0), RunDir(made.run_dir))
                    except StoreError as error:
                        errors.append(error)

                # The experiment and the parent first: two writers that find neither would make both.
                sync_sweep(Store(server.uri, timeout_s=60.0), describe_sweep(tmp_path).parent / "exp")
                threads = [threading.Thread(target=write, args=(made,)) for made in specs]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(120)
                assert [str(error) for error in errors] == []
                found = contents(Store(server.uri))
                assert len(found) == 17
                assert all(len(found[f"trial{n}"]["history"]["search/loss"]) == 3 for n in range(16))
                assert len(Store(server.uri).summaries("exp") or []) == 16
            finally:
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
