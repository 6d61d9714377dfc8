"""What a scheduler is told: every epoch of the trial once, over stages and restarts, and what it does with that."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sbs
from harness import stages
from harness.errors import Preempted
from harness.run_dir import RunDir
from tests.integration import tiny

pytestmark = [pytest.mark.ffcv, pytest.mark.integration]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    sbs.use_compiled(False)
    yield
    sbs.use_compiled(True)


def test_every_epoch_is_reported_once_though_the_run_is_interrupted(tmp_path: Path):
    spec, run = tiny.spec(tiny.write_data(tmp_path), tmp_path / "run"), RunDir(tmp_path / "run")
    told: list[dict[str, Any]] = []

    def report(figures: dict[str, Any]) -> None:
        told.append(figures)
        if len(told) == 3:
            run.request_stop()

    with pytest.raises(Preempted, match="during search"):
        stages.run(spec, report=report)
    run.clear_stop()
    stages.run(spec, report=report)
    assert [(each["stage"], each["epoch"]) for each in told] == [
        (stage, epoch + 1)
        for stage, count in (("pretrain", 2), ("search", 4), ("finetune", 2))
        for epoch in range(count)
    ]
    assert [each["epochs_done"] for each in told] == [1, 2, 3, 4, 5, 6, 7, 8]
    recorded = {(r["stage"], r["epoch"]): r["metrics"] for r in run.metrics() if r["kind"] == "metrics"}
    for each in told:
        assert each["top1"] == recorded[each["stage"], each["epoch"]][f"{each['stage']}/top1"]


SPACE = """
name = "real"
recipe = "{recipe}"
[set]
"run.workers" = 1
"run.cpus_per_worker" = {cpus}
"pretrain.epochs" = 8
"pretrain.warmup_epochs" = 0
"search.epochs" = 4
"finetune.epochs" = 1
[axes]
"search.lambda" = [0.0, 50.0]
[scheduler]
name = "asha"
reduction = 2
"""


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_asha_stops_a_real_trial_that_lags(tmp_path: Path):
    recipe = tiny.recipe_file(tiny.write_data(tmp_path))
    space = tmp_path / "space.toml"
    cpus = len(os.sched_getaffinity(0))  # one trial at a time: the lagging one comes second
    space.write_text(SPACE.format(recipe=recipe, cpus=cpus))
    command = [sys.executable, "-m", "sweeps", "run", str(space), "--out", str(tmp_path / "runs")]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # seconds of training are not worth a compilation
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    # rungs are epochs 1, 2 and 4; no gate moves before the third
    assert "resnet20-sbs-lambda50-seed0: pruned: after epoch 4\n" in done.stdout, done.stdout
    rows = json.loads((tmp_path / "runs" / "real" / "pareto.json").read_text())["rows"]
    assert [row["lambda"] for row in rows] == [0.0, None]
