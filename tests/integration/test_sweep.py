"""Sweeps through the real Ray Tune and MLflow with trials that do not train, and one sweep with nothing replaced."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.waiting import wait_for

SPACE = """
name = "tiny"
recipe = "digits_resnet20"
methods = {methods}
retries = 1

[set]
"data.dir" = "{data}"
"run.workers" = 2

[axes]
"search.lambda" = {lambdas}
{more}
"""
LABELS = {
    "full": "resnet20-full_precision-seed0",
    "zero": "resnet20-sbs-lambda0-seed0",
    "one": "resnet20-sbs-lambda1-seed0",
    "two": "resnet20-sbs-lambda2-seed0",
}
pytestmark = [pytest.mark.ray, pytest.mark.integration, pytest.mark.timeout(400)]


@dataclass
class Bench:
    """A folder with a space and its runs; every process that a sweep leaves behind would be found by its TMPDIR."""

    path: Path
    lambdas: tuple[float, ...] = (0.0, 1.0)
    methods: tuple[str, ...] = ("sbs",)
    more: str = ""
    axis: str | None = None
    patience_s: float = 5.0
    looks: int = 0

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def sweep(self) -> Path:
        return self.runs / "tiny"

    @property
    def scratch(self) -> Path:
        # Ray's sockets need a short path: not under pytest's own long one.
        return Path("/tmp") / f"sw{os.getpid()}"

    def start(self, *, module: tuple[str, ...] = ("tests.integration.fake_trial",)) -> subprocess.Popen[str]:
        self.runs.mkdir(exist_ok=True)
        self.scratch.mkdir(mode=0o700, exist_ok=True)
        space = self.path / "space.toml"
        lambdas = self.axis or list(self.lambdas)
        data = self.path / "data"
        text = SPACE.format(lambdas=lambdas, methods=json.dumps(self.methods), data=data, more=self.more)
        space.write_text(text)
        command = [sys.executable, "-m", *module, str(space), *(["--out"] if len(module) > 1 else []), str(self.runs)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"TMPDIR": str(self.scratch)},
        )

    def run(self) -> tuple[int, str]:
        process = self.start()
        output, _ = process.communicate(timeout=150)
        return process.returncode, output

    def trial(self, name: str) -> Path:
        (found,) = (self.sweep / "trials").glob(f"{LABELS[name]}-*")
        return found

    def lives(self, name: str) -> int:
        return len((self.trial(name) / "lives").read_text().splitlines())

    def store(self) -> dict[str, Any]:
        """Children by label, and the parent, straight from MLflow."""
        from mlflow import MlflowClient

        # A copy under a new name each time: MLflow keeps connections by name, also to a file that was deleted.
        self.looks += 1
        copy = shutil.copy(self.runs / "mlflow.db", self.path / f"look{self.looks}.db")
        client = MlflowClient(f"sqlite:///{copy}")
        experiment = client.get_experiment_by_name("tiny")
        found = list(client.search_runs([experiment.experiment_id]))
        parents = [run for run in found if run.data.tags["harness.role"] == "sweep"]
        children = [run for run in found if run.data.tags["harness.role"] == "trial"]
        assert len(parents) == 1
        assert len({run.data.tags["harness.key"] for run in children}) == len(children), "a trial is there twice"
        for run in children:
            assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        return {"client": client, "parent": parents[0]} | {run.info.run_name: run for run in children}

    def status(self, name: str) -> str:
        return str(self.store()[LABELS[name]].info.status)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    deadline = time.monotonic() + made.patience_s
    while (left := processes_of(made.scratch)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    remains = list(made.scratch.glob("sbs-*"))  # beside it lie caches of torch
    shutil.rmtree(made.scratch, ignore_errors=True)
    assert not left, "a sweep left processes behind"
    assert not remains, "a sweep left its temporary folder behind"


def processes_of(scratch: Path, command: bytes = b"") -> list[int]:
    """Processes whose environment names the scratch folder, and whose command line has `command`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line, text = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if os.fsencode(scratch) in text and command in line and state != "Z":
            found.append(int(entry.name))
    return found


def read(path: Path) -> dict[str, bytes]:
    return {name: (path / f"pareto.{name}").read_bytes() for name in ("json", "csv", "md", "tex", "html", "png", "svg")}


def test_run_rerun_extend_and_tables_from_either_source(bench: Bench, tmp_path: Path):
    status, output = bench.run()
    assert status == 0, output
    for words in [
        "3 trials, 0 done, 3 to run",
        "3/3 ",
        "mac_product",
        "trainer: fake 0",
        "store: mlflow",
        "-m harness ui",
    ]:
        assert words in output
    table = json.loads((bench.sweep / "pareto.json").read_text())
    assert [(row["method"], row["lambda"]) for row in table["rows"]] == [
        ("sbs", 1.0), ("sbs", 0.0), ("full_precision", None)
    ]  # fmt: skip
    before = read(bench.sweep)
    runs = bench.store()
    child = runs[LABELS["one"]]
    assert {run.info.status for name, run in runs.items() if name != "client"} == {"FINISHED"}
    assert child.data.params["lambda"] == "1.0"
    assert child.data.params["search.lr"] == "0.02"
    assert round(child.data.metrics["final/gbops"], 6) == table["rows"][0]["gbops"]
    history = runs["client"].get_metric_history(child.info.run_id, "search/loss")
    assert [(m.step, m.value) for m in history] == [(10, 1.0), (20, 0.5), (30, pytest.approx(1 / 3))]
    assert "lambda" not in runs[LABELS["full"]].data.params
    artifacts = {entry.path for entry in runs["client"].list_artifacts(child.info.run_id)}
    assert {"policy.json", "result.json", "layers.csv", "layers.json", "layers.png"} <= artifacts
    assert runs["parent"].data.metrics["frontier_size"] == 3
    assert "pareto.json" in {entry.path for entry in runs["client"].list_artifacts(runs["parent"].info.run_id)}

    # Again: nothing is trained, the table is the same, no run is doubled, Ray is not even started.
    status, output = bench.run()
    assert status == 0, output
    assert "3 trials, 3 done, 0 to run" in output
    assert "Ray start" not in output
    assert [bench.lives(name) for name in ("full", "zero", "one")] == [1, 1, 1]
    assert read(bench.sweep) == before
    assert len(bench.store()) == 2 + 3

    # A lost store is filled again from the folders.
    (bench.runs / "mlflow.db").unlink()
    status, output = bench.run()
    assert status == 0, output
    assert len(bench.store()) == 2 + 3
    assert bench.status("one") == "FINISHED"

    # One more point: only that one runs.
    bench.lambdas = (0.0, 1.0, 2.0)
    status, output = bench.run()
    assert status == 0, output
    assert "4 trials, 3 done, 1 to run" in output
    assert [bench.lives(name) for name in ("full", "zero", "one", "two")] == [1, 1, 1, 1]
    assert len(bench.store()) == 2 + 4

    # The store alone and the folders alone give the bytes that the sweep gave.
    for source in (["--experiment", "tiny", "--runs", str(bench.runs)], ["--folder", str(bench.sweep)]):
        out = tmp_path / source[0].strip("-")
        subprocess.run([sys.executable, "-m", "sweeps", "pareto", *source, "--out", str(out)], check=True, timeout=60)
        assert read(out) == read(bench.sweep)


def test_failures_are_retried_reported_and_do_not_sink_the_sweep(bench: Bench):
    bench.runs.mkdir()
    (bench.runs / f"fail-{LABELS['zero']}").touch()
    (bench.runs / f"crash-{LABELS['one']}").touch()
    bench.lambdas = (0.0, 1.0, 2.0)
    status, output = bench.run()
    assert status == 1, output
    assert f"failed: {LABELS['zero']}: {LABELS['zero']} was told to fail" in output
    assert f"failed: {LABELS['one']}: RuntimeError: {LABELS['one']} was told to crash" in output
    assert "Traceback" not in output
    # A person's mistake is not worth a retry, a crash is worth the one that the space allows.
    assert [bench.lives(name) for name in ("full", "zero", "one", "two")] == [1, 1, 2, 1]
    assert [bench.status(name) for name in ("full", "zero", "one", "two")] == [
        "FINISHED",
        "FAILED",
        "FAILED",
        "FINISHED",
    ]
    assert len(json.loads((bench.sweep / "pareto.json").read_text())["rows"]) == 2
    for switch in bench.runs.glob("*-resnet20-*"):
        switch.unlink()
    status, output = bench.run()
    assert status == 0, output
    assert "4 trials, 2 done, 2 to run" in output
    assert [bench.status(name) for name in ("zero", "one")] == ["FINISHED", "FINISHED"]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_asked_to_leave_it_checkpoints_and_goes_on_later(bench: Bench, number: signal.Signals, expected: int):
    bench.runs.mkdir()
    (bench.runs / "hold").touch()
    process = bench.start()
    wait_for(lambda: any((bench.sweep / "trials").glob("*full_precision*/lives")), 120, "the first trial")
    process.send_signal(number)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == expected, output
    assert "left as asked" in output
    assert "Traceback" not in output
    assert (bench.trial("full") / "checkpointed").exists()
    assert not (bench.sweep / "trials" / "zero").exists()
    assert bench.status("full") == "KILLED"
    (bench.runs / "hold").unlink()
    status, output = bench.run()
    assert status == 0, output
    assert bench.status("full") == "FINISHED"
    assert bench.lives("full") == 2


def test_a_killed_driver_takes_its_processes_along_and_the_next_one_goes_on(bench: Bench):
    bench.runs.mkdir()
    (bench.runs / "hold").touch()
    process = bench.start()
    wait_for(lambda: any((bench.sweep / "trials").glob("*full_precision*/lives")), 120, "the first trial")
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not processes_of(bench.scratch, b"ray::ImplicitFunc"), 120, "the end of its workers")
    bench.patience_s = 60.0  # Ray's own agents look for their raylet every half minute
    (left,) = bench.scratch.glob("sbs-*")
    (bench.runs / "hold").unlink()
    status, output = bench.run()
    assert status == 0, output
    assert not left.exists(), "the next driver clears what the killed one left"
    assert bench.lives("full") == 2
    assert len(bench.store()) == 2 + 3


def test_optuna_learns_goes_on_and_stops_at_its_number(bench: Bench):
    bench.axis = "{ log_uniform = [0.01, 10.0] }"
    bench.more = '[search]\nalgorithm = "optuna"\nsamples = 2\n'
    status, output = bench.run()
    assert status == 0, output
    assert "3 trials, 0 done, 3 to run" in output
    first = {path.name for path in (bench.sweep / "trials").iterdir()}
    assert len(first) == 3
    bench.more = bench.more.replace("2", "3")
    status, output = bench.run()
    assert status == 0, output
    assert "4 trials, 3 done, 1 to run" in output
    second = {path.name for path in (bench.sweep / "trials").iterdir()}
    assert first < second
    assert len(second) == 4
    values = {row["lambda"] for row in json.loads((bench.sweep / "pareto.json").read_text())["rows"]} - {None}
    assert len(values) == 3
    assert all(0.01 <= value <= 10.0 for value in values)
    assert len(bench.store()) == 2 + 4


def test_asha_stops_what_lags_for_good(bench: Bench):
    bench.lambdas = (0.0, 2.0)  # the second comes after the better one and lags from the first epoch on
    bench.more = '[scheduler]\nname = "asha"\nreduction = 2\n'
    status, output = bench.run()
    assert status == 0, output
    assert f"{LABELS['two']}: pruned: after epoch 1" in output
    assert bench.status("two") == "KILLED"
    assert [row["lambda"] for row in json.loads((bench.sweep / "pareto.json").read_text())["rows"]] == [0.0, None]
    status, output = bench.run()
    assert status == 0, output
    assert "3 trials, 3 done, 0 to run" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits_resnet20", "--set", "run.workers=64"], ["can never start", "64 x (1 CPU)", "Lower run.workers to"]),
        (["digits_resnet20", "--set", "search.lamda=1"], ["`search.lamda`", "did you mean 'lambda'"]),
        (["digits_resnet20", "--set", "search.epochs=two"], ["`search.epochs`", "'two'"]),
        (["digits_resnet20", "--set", "data.source=imagefolder:/absent"], ["absent-data"]),
        (["absent.toml"], ["space not found: absent.toml"]),
    ],
)
def test_mistakes_end_at_once_with_one_message(tmp_path: Path, arguments: list[str], words: list[str]):
    runs = tmp_path / "new" / "runs"
    command = [sys.executable, "-m", "sweeps", "run", *arguments, "--out", str(runs), "--set"]
    command.append(f"data.dir={tmp_path / 'absent-data'}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "new").exists(), "a refused sweep left folders behind"


@pytest.mark.ffcv
@pytest.mark.timeout(400)
def test_a_real_sweep_uses_ffcv_ray_train_and_mlflow(bench: Bench):
    """Nothing replaced: two DDP workers a trial; fails if a loader, trainer or store was by-passed."""
    bench.lambdas = (1.0,)
    short = [f"--set={stage}.epochs=1" for stage in ("pretrain", "search", "finetune")]
    process = bench.start(module=("sweeps", "run", *short, "--set=pretrain.warmup_epochs=0"))
    output, _ = process.communicate(timeout=360)
    assert process.returncode == 0, output
    for words in ["loader: ffcv 1.", "trainer: ray.train 2.", "2 workers, gloo", "store: mlflow 3."]:
        assert words in output
    result = json.loads((bench.trial("one") / "result.json").read_text())
    assert result["stack"]["world_size"] == 2
    rows = json.loads((bench.sweep / "pareto.json").read_text())["rows"]
    full = next(row for row in rows if row["method"] == "full_precision")
    sbs = next(row for row in rows if row["method"] == "sbs")
    assert full["bop_reduction"] == 1.0
    assert full["gbops"] == pytest.approx(41.7986, rel=0.01)  # ResNet-20 at 32/32 and 32x32 pixels, 10 classes
    assert sbs["bop_reduction"] > 10
    assert sbs["trial"] in bench.store()[LABELS["one"]].data.tags["harness.key"]
    # The workers were real processes of a Train worker group, not the trial's own.
    provenance = json.loads((bench.trial("one") / "provenance.json").read_text())
    assert "ray.train" in json.dumps(provenance)
    assert (bench.trial("one") / "search.png").is_file()
