"""On what a run was made: code, versions, machine, job; one entry for every start of it."""

import functools
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.run_dir import RunDir, read_json, write_json

_PACKAGES = ("sbs-harness", "torch", "ray", "mlflow", "ffcv", "numpy")
_JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "RAY_JOB_ID")


def record_start(run: RunDir, *, launcher: str, world: int) -> None:
    """Add this start to provenance.json: {"starts": [{time, commit, dirty, versions, host, job, ...}]}."""
    starts = (read_json(run.provenance_path) or {"starts": []})["starts"]
    entry = {"time": time.time(), "launcher": launcher, "world_size": world, **facts()}
    write_json(run.provenance_path, {"starts": [*starts, entry]})


def facts() -> dict[str, Any]:
    """What is known of code and machine."""
    commit, dirty = _git_state()
    return {
        "commit": commit,
        "dirty": dirty,
        "command": [] if "RAY_JOB_ID" in os.environ else sys.argv,  # a Ray worker's own says nothing
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "job": {name: os.environ[name] for name in _JOB_VARIABLES if name in os.environ},
    }


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _git_state() -> tuple[str | None, bool | None]:
    """Commit of the code and whether files differ from it; None where there is no git or no repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit.strip(), None if status is None else bool(status)
