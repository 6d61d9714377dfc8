"""Shared by all tests: what a machine lacks skips a test, unless REQUIRE (ffcv,slurm,postgres,chromium) names it."""

import importlib.util
import os
import shutil
import socket
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

# Before any test module imports these libraries. Children inherit it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MPLBACKEND", "Agg")
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_ADDRESS"):
    os.environ.pop(name, None)  # tests never write to the user's own store or cluster


def _program(*names: str) -> Callable[[], bool]:
    folders = [os.environ.get("PATH", ""), "/usr/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    return lambda: all(shutil.which(name, path=":".join(folders)) for name in names)


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


SERVICES: dict[str, Callable[[], bool]] = {
    "ffcv": lambda: importlib.util.find_spec("ffcv") is not None,
    "slurm": _program("slurmctld", "slurmd", "sbatch", "munged"),
    "postgres": _program("initdb", "postgres"),
    "chromium": _program("chromium"),
    "gpu": _gpu,
}
REQUIRED = frozenset(filter(None, os.environ.get("REQUIRE", "").replace(" ", "").split(",")))


def pytest_configure() -> None:
    if unknown := REQUIRED - SERVICES.keys():
        raise pytest.UsageError(f"REQUIRE names {', '.join(sorted(unknown))}; known: {', '.join(SERVICES)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, present in SERVICES.items():
        if item.get_closest_marker(name) and not present():
            pytest.skip(f"{name} is not on this machine" + ("" if name == "gpu" else " (make setup, make services)"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    wanted = [name for name in REQUIRED if item.get_closest_marker(name)]
    if wanted and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"REQUIRE={','.join(wanted)}, yet skipped: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    # A whole module skipped (importorskip) has no items whose markers could tell.
    report = yield
    # The reason alone: the path beside it may well contain such a name.
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    wanted = [name for name in REQUIRED if name in reason]
    if wanted and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"REQUIRE={','.join(wanted)}, yet skipped: {report.longrepr}"
    return report


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
