"""The mirror against MLflow servers: one that hangs, dies and comes back, one that stays away, one on PostgreSQL."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.config import TrialSpec, load_recipe
from harness.run_dir import RunDir, write_json
from harness.tracking.copying import sync_sweep, sync_trial
from harness.tracking.mirror import Mirror
from harness.tracking.store import Store, StoreError
from harness.train_cli import make_spec
from tests.integration import tiny
from tests.integration.fake_trial import expected, write_trial
from tests.integration.mlflow_stores import (
    PLACE,
    Server,
    append_epoch,
    contents,
    describe_sweep,
    postgres,
    spec,
    unused_port,
)
from tests.integration.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


@pytest.fixture
def server(tmp_path: Path, free_port: int) -> Iterator[Server]:
    made = Server(tmp_path, free_port, f"sqlite:///{tmp_path}/server.db")
    made.start()
    yield made
    made.stop()


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
                    wait_for(lambda: mirror.trouble is not None, 60, "trouble")
                if epoch == 6:
                    server.signal(signal.SIGCONT)
                    wait_for(lambda: mirror.trouble is None, 60, "no trouble")
                if epoch == 8:
                    server.stop()
                    wait_for(lambda: mirror.trouble is not None, 60, "trouble")
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
    key = make_spec(load_recipe(str(recipe), [*options, "run.workers=1"]), path).key
    write_json(path / "trial.json", {"key": key, "label": "trial0", "experiment": "exp", "sweep": "exp"})
    with Mirror(Store(server.uri, timeout_s=2.0), PLACE, poll_s=0.05) as mirror:
        mirror.watch(run)
        with (tmp_path / "log").open("wb") as log:
            training = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
        try:
            wait_for(lambda: training.poll() is not None or len(run.metrics()) > 1, 60, "the first metrics")
            assert training.poll() is None, (tmp_path / "log").read_text()
            server.stop()
            assert training.wait(120) == 0, (tmp_path / "log").read_text()
        finally:
            training.kill()
            training.wait()
        mirror.ended(run, "FINISHED")
        # a request has at most two tries: by now all that were under way have been given up, several times over
        wait_for(lambda: mirror.failures >= 5, 120, "five failures")
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
