import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from harness.provenance import facts, record_start
from harness.run_dir import RunDir


def test_code_versions_and_job_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    told = facts()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert told["commit"] == (commit or None)
    assert told["versions"]["torch"] == version("torch")
    assert told["job"] == {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2"}


def test_every_start_is_kept(tmp_path: Path):
    run = RunDir(tmp_path).create()
    record_start(run, launcher="process", world=1)
    record_start(run, launcher="ray.train 2.60.0", world=2)
    starts = json.loads(run.provenance_path.read_text())["starts"]
    assert [(start["launcher"], start["world_size"]) for start in starts] == [("process", 1), ("ray.train 2.60.0", 2)]
    assert starts[0]["time"] <= starts[1]["time"]
