"""The child process that makes models: one bad model, signal or limit must cost no other one."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.run_dir import RunDir, write_json
from harness.tracking import model

LIMIT_S = 30.0
# the real child, but for how a model is made: the run directory says what becomes of it
CHILD = """
import os, resource, signal, sys, time
from pathlib import Path
from harness.tracking import model

resource.setrlimit(resource.RLIMIT_CPU, (200, 200))

def make(run):
    unfinished = run.path / f".model.{os.getpid()}"
    unfinished.mkdir()
    (unfinished / "MLmodel").touch()
    what = (run.path / "what").read_text()
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "raise":
        raise ValueError("no such layer")
    if what == "leave":
        (run.path / "what").write_text("good")
        unfinished.joinpath("MLmodel").unlink()
        unfinished.rmdir()
        os._exit(0)
    if what == "exit":
        sys.exit(0)
    while what == "burn":
        pass
    print("a warning of no weight", file=sys.stderr, flush=True)
    time.sleep({"slow": 0.6, "hang": 60.0}.get(what, 0.0))
    unfinished.replace(run.path / "model")

model.make, model.CPU_LIMIT_S = make, 1
model.main()
"""


@pytest.fixture(autouse=True)
def _child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_COMMAND", (sys.executable, "-c", CHILD))


def _runs(folder: Path, *what: str) -> list[RunDir]:
    runs = []
    for i, each in enumerate(what):
        run = RunDir(folder / str(i))
        run.path.mkdir()
        write_json(run.policy_path, {"layers": [{}]})
        for path in (run.result_path, run.weights_path):
            path.touch()
        (run.path / "what").write_text(each)
        runs.append(run)
    return runs


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def _leftovers(runs: list[RunDir]) -> list[Path]:
    return [path for run in runs for path in run.path.glob(".model.*")]


def test_those_that_fail_are_told_apart_and_the_others_made(tmp_path: Path):
    failed = {
        "crash": "the process that makes it was ended by SIGSEGV",
        "raise": "ValueError: no such layer",
        "exit": "SystemExit: 0",
        "burn": "it took more than 600 s of CPU",
    }
    runs = _runs(tmp_path, "good", "leave", *itertools.chain.from_iterable((each, "good") for each in failed))
    model.Maker().finish(runs)
    assert [model.state(run) for run in runs] == ["ready", "ready", *["failed", "ready"] * 4]
    assert [model.failure(run) for run in runs[2::2]] == list(failed.values())
    assert _leftovers(runs) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_that_is_asked_to_leave_has_failed_nothing(tmp_path: Path, number: signal.Signals):
    runs = _runs(tmp_path, "hang", "good")
    maker = model.Maker()
    maker.work(runs)
    _until(lambda: bool(_leftovers(runs)))
    (pid,) = [int(path.suffix[1:]) for path in _leftovers(runs)]
    assert os.getpgid(pid) != os.getpgrp(), "Ctrl-C would reach it"
    os.kill(pid, number)
    (runs[0].path / "what").write_text("good")
    maker.finish(runs)
    assert [model.state(run) for run in runs] == ["ready", "ready"]
    assert _leftovers(runs) == []


def test_the_limit_is_that_of_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "LIMIT_S", 2.0)
    runs = _runs(tmp_path, "slow", "slow", "slow", "slow", "hang", "slow")
    model.Maker().finish(runs)
    assert [model.state(run) for run in runs] == ["ready"] * 4 + ["failed", "ready"]
    assert model.failure(runs[4]) == "it took longer than 2 s"
    assert _leftovers(runs) == []


def test_a_closed_maker_leaves_no_process_and_starts_none(tmp_path: Path):
    runs = _runs(tmp_path, "hang", "good")
    maker = model.Maker()
    maker.work(runs)
    _until(lambda: bool(_leftovers(runs)))
    (pid,) = [int(path.suffix[1:]) for path in _leftovers(runs)]
    maker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    maker.work(runs)
    assert maker._child is None
    assert [model.state(run) for run in runs] == ["due", "due"]
    assert _leftovers(runs) == []


def test_a_wait_that_is_broken_off_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = _runs(tmp_path, "hang")

    def interrupted(_: float) -> None:
        if _leftovers(runs):
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.Maker().finish(runs)
    assert _leftovers(runs) == []
    assert model.state(runs[0]) == "due"
