"""On what a run was made: code, versions, machine, job; one entry for every start of it."""

import functools
import hashlib
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.run_dir import RunDir, read_json, write_json, write_text
from harness.settings import RAY_SUBMISSION_VARIABLE
from harness.version import DISTRIBUTION, own_version

DIFF_LIMIT_BYTES = 1_000_000
"""More than this of uncommitted changes is cut off: nobody reads it, and every trial would carry it along."""

_PACKAGES = (
    "torch", "ray", "mlflow", "ffcv", "numpy", "numba", "scipy", "opencv-python-headless", "pillow",
    "pydantic", "optuna", "scikit-learn", "submitit",
)  # fmt: skip
_JOB_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME",
    "SLURM_JOB_NODELIST", "RAY_JOB_ID", RAY_SUBMISSION_VARIABLE,
)  # fmt: skip
# Files that may be under version control and still are nobody else's business.
_UNSHARED = (".env*", "*.pem", "*.key", "*secret*", "*credential*", "*token*", ".netrc", ".npmrc", ".pypirc")


def record_start(run: RunDir, *, launcher: str, world: int) -> None:
    """Add this start to provenance.json: {"starts": [{time, commit, dirty, versions, host, job, ...}]}.

    What tracked files differ by from the commit goes to a file beside it, changes-<digest>.diff, named in "changes".
    """
    starts = (read_json(run.provenance_path) or {"starts": []})["starts"]
    entry = {"time": time.time(), "launcher": launcher, "world_size": world, **facts()}
    changes = uncommitted()
    if changes:
        entry["changes"] = f"changes-{hashlib.sha256(changes.encode()).hexdigest()[:8]}.diff"
        write_text(run.path / entry["changes"], changes)
    write_json(run.provenance_path, {"starts": [*starts, entry]})


def facts() -> dict[str, Any]:
    """What is known of code and machine."""
    commit, dirty = _git_state()
    return {
        "commit": commit,
        "dirty": dirty,
        "command": [] if "RAY_JOB_ID" in os.environ else sys.argv,  # a Ray worker's own says nothing
        "host": platform.node(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "job": {name: os.environ[name] for name in _JOB_VARIABLES if name in os.environ} | _ray_ids(),
    }


def _gpus() -> list[str]:
    """Names of the GPUs that this process sees; torch is asked only where it is at work already."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _ray_ids() -> dict[str, str]:
    """Which job of which node of a Ray cluster this process works for, if it does."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    context = ray.get_runtime_context()
    return {"RAY_JOB_ID": context.get_job_id(), "RAY_NODE_ID": context.get_node_id()}


@functools.cache
def uncommitted(folder: Path = Path(__file__).parent) -> str:
    """`git diff HEAD` of the repository that holds `folder`: "" without changes or without a repository.

    Tracked files alone, without those whose names speak of secrets; cut after `DIFF_LIMIT_BYTES`.
    """
    left_out = [f":(top,exclude,icase,glob)**/{pattern}" for pattern in _UNSHARED]
    plain = ["--no-color", "--no-ext-diff", "--no-textconv"]
    text = _git(folder, "diff", "HEAD", *plain, "--", ":/", *left_out) or ""
    if len(text.encode()) <= DIFF_LIMIT_BYTES:
        return text
    kept = text.encode()[:DIFF_LIMIT_BYTES].decode(errors="ignore")
    return f"{kept[: kept.rfind(chr(10)) + 1]}... cut after {DIFF_LIMIT_BYTES:,} of {len(text.encode()):,} bytes\n"


@functools.cache
def _versions() -> dict[str, str]:
    found = {DISTRIBUTION: own_version()}
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
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit.strip(), None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
