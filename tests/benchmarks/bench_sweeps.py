"""What a sweep costs beyond its training: many trials through Tune, one trial's fixed cost, a table over many runs."""

import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness.run_dir import RunDir
from harness.tracking.cli import free_port
from harness.tracking.copying import Place, sync_trial
from harness.tracking.mirror import Mirror
from harness.tracking.store import Store
from tests.benchmarks.measure import Estimate, Row, estimate
from tests.integration.mlflow_stores import Server

FINISHED_RUNS = 2000
NOOP_TRIALS = 200
SPACE = """
name = "bench"
recipe = "digits_resnet20"
methods = ["sbs"]
[set]
"data.dir" = "{data}"
"run.workers" = {workers}
"pretrain.epochs" = 0
"pretrain.warmup_epochs" = 0
"search.epochs" = 0
"finetune.epochs" = 0
[axes]
"search.lambda" = {lambdas}
"""


def rows() -> Iterator[Row]:
    """All figures of the sweeps."""
    yield Row(f"pareto from a store of {FINISHED_RUNS:,} runs", pareto_of_many(), must=10.0, unit="s")
    per_trial, growth = noop_trials()
    yield Row("no-op trial through Tune, tracked", per_trial, must=3.0, unit="s")
    yield Row("growth of the driver per trial", growth, must=0.5, unit="MiB")
    yield Row("step time with tracking / without", tracked_steps(), must=1.05, unit="x", wanted=1.01)
    yield Row("fixed cost of a trial of one worker", fixed_cost(workers=1), must=6.0, unit="s")
    yield Row("fixed cost of a trial of two workers", fixed_cost(workers=2), must=12.0, unit="s")


def pareto_of_many() -> float:
    """Seconds of the whole command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill_store(folder, FINISHED_RUNS)
        command = [sys.executable, "-m", "sweeps", "pareto", "--experiment", "many", "--runs", name]
        command += ["--out", f"{name}/out"]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
        found = len(json.loads((folder / "out" / "pareto.json").read_text())["rows"])
        assert found == FINISHED_RUNS, found
        return seconds


def fill_store(folder: Path, count: int) -> None:
    """One run through MLflow, then copies of its rows under other ids: two thousand requests would take minutes."""
    from harness.config import TrialSpec, load_recipe
    from tests.integration.fake_trial import write_trial

    recipe = load_recipe("digits_resnet20", ["search.lambda=0.5"])
    spec = TrialSpec(recipe=recipe, key="0" * 16, label="trial", run_dir=str(folder / "trial"))
    store = Store(f"sqlite:///{folder}/mlflow.db", folder / "mlartifacts")
    sync_trial(store, write_trial(spec, epochs=20), Place("many"))
    with sqlite3.connect(folder / "mlflow.db") as base:
        (original,) = base.execute("SELECT run_uuid FROM runs").fetchone()
        for table in ("runs", "params", "tags", "latest_metrics", "metrics"):
            columns = [column[1] for column in base.execute(f"PRAGMA table_info({table})")]
            values = ", ".join("?" if column == "run_uuid" else column for column in columns)
            copy = f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM {table} WHERE run_uuid = ?"
            base.executemany(copy, [(f"{number:032x}", original) for number in range(1, count)])
        # each its own BOPs and accuracy, or all of them would be on the frontier
        draws = random.Random(0)
        for name, low, high in (("final/gbops", 0.1, 2.0), ("final/top1", 50.0, 99.0)):
            values = [(draws.uniform(low, high), f"{number:032x}", name) for number in range(1, count)]
            base.executemany("UPDATE latest_metrics SET value = ? WHERE run_uuid = ? AND key = ?", values)
        keys = [(f"{number:016x}", f"{number:032x}") for number in range(1, count)]
        base.executemany("UPDATE tags SET value = ? WHERE run_uuid = ? AND key = 'harness.key'", keys)


def noop_trials() -> tuple[float, float]:
    """Seconds per trial that writes a finished run directory, and MiB that the driver grows by per trial."""
    few, many = 20, NOOP_TRIALS
    seconds: dict[int, float] = {}
    memory: dict[int, float] = {}
    for count in (few, many):
        with tempfile.TemporaryDirectory(prefix="b") as name:
            lambdas = [number / 1000 for number in range(count - 1)]
            space = write_space(Path(name), workers=1, lambdas=lambdas)
            command = [sys.executable, "-m", "tests.integration.fake_trial", str(space), f"{name}/runs"]
            begin = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"TMPDIR": name})
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0, process.returncode
            seconds[count], memory[count] = time.perf_counter() - begin, usage.ru_maxrss / 1024
    return (seconds[many] - seconds[few]) / (many - few), (memory[many] - memory[few]) / (many - few)


def fixed_cost(workers: int, trials: int = 4) -> float:
    """Seconds of a trial's driver beyond what the stages took, over real trials that calibrate but train no epoch."""
    with tempfile.TemporaryDirectory(prefix="b") as name:
        space = write_space(Path(name), workers=workers, lambdas=[number / 10 for number in range(trials)])
        command = [sys.executable, "-m", "sweeps", "run", str(space), "--out", f"{name}/runs"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        extra = []
        for path in Path(name).glob("runs/bench/trials/*/result.json"):
            wall = json.loads((path.parent / "wall.json").read_text())["wall_s"]
            extra.append(wall - sum(json.loads(path.read_text())["timings_s"].values()))
        assert len(extra) == trials + 1
        return sum(extra) / len(extra)


def tracked_steps(pairs: int = 9) -> Estimate:
    """Step time of the epochs that are sent to a real MLflow server as they come, over that of their neighbours.

    One process trains, a thread of this one is the mirror of every other epoch, the server is a third process.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder, free_port(), f"sqlite:///{folder}/server.db")
        server.start()
        command = [sys.executable, "-m", "harness", "train", "digits_resnet20", "--run-dir", f"{name}/run"]
        options = [f"data.dir={name}/data", "search.method=full_precision", f"pretrain.epochs={2 * pairs + 2}"]
        # records are sent once a checkpoint covers them; without tracking they are written all the same
        options += ["run.checkpoint_every_steps=5", "run.threads=1"]
        command += [word for option in options for word in ("--set", option)]
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            steps_s = _alternate(RunDir(folder / "run"), Store(server.uri), training)
        finally:
            training.kill()
            training.wait()
            server.stop()
    ratios = []
    for plain in range(2, len(steps_s), 2):  # epochs 0 and 1 warm up
        # against the mean of the epochs before and after: a machine that slows down or speeds up cancels out
        around = [steps_s[number] for number in (plain - 1, plain + 1) if number < len(steps_s)]
        ratios.append(sum(around) / len(around) / steps_s[plain])
    return estimate(ratios)


def _alternate(run: RunDir, store: Store, training: "subprocess.Popen[bytes]") -> list[float]:
    """Mean step time of every epoch; those with odd numbers are mirrored while they run."""
    mirror: Mirror | None = None
    while True:
        steps_s = [r["metrics"]["speed/step_s"] for r in run.metrics() if "speed/step_s" in r.get("metrics", {})]
        odd = len(steps_s) % 2 == 1
        if odd and mirror is None:
            mirror = Mirror(store, Place("bench"), poll_s=0.5)
            mirror.__enter__()
            mirror.watch(run)
        if mirror is not None and (not odd or training.poll() is not None):
            mirror.close(0.0)
            mirror = None
        if training.poll() is not None:
            assert training.returncode == 0, training.returncode
            return steps_s
        time.sleep(0.02)


def write_space(folder: Path, *, workers: int, lambdas: list[float]) -> Path:
    """A space of no-op trials."""
    path = folder / "space.toml"
    path.write_text(SPACE.format(data=folder / "data", workers=workers, lambdas=lambdas))
    return path
