"""MLflow stores to test against: sqlite files, a server of our own, PostgreSQL; and what they hold."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.config import TrialSpec, load_recipe
from harness.run_dir import RunDir, write_json
from harness.tracking.copying import Place
from harness.tracking.store import Store

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


def append_epoch(run: RunDir, epoch: int) -> None:
    """One epoch as a trial writes it: its metrics, then a checkpoint that covers them."""
    base = {"time": 1.7e9 + epoch, "stage": "search", "epoch": epoch, "step": 10 * epoch}
    with run.metrics_path.open("a") as file:
        metrics = {"search/loss": 1.0 / epoch, "search/top1": 50.0 + epoch}
        file.write(json.dumps({"seq": 2 * epoch - 1, **base, "kind": "metrics", "metrics": metrics}) + "\n")
        covering = {"seq": 2 * epoch, **base, "kind": "checkpoint", "metrics": {}, "covers": 2 * epoch - 1}
        file.write(json.dumps(covering) + "\n")


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


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
