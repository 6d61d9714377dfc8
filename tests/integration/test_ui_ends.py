"""`python -m harness ui` with the real MLflow server: nothing of it outlives the command."""

import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.integration.mlflow_stores import empty_database
from tests.integration.waiting import command_line, descendants, kill, running, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


def test_sigterm_ends_the_server_with_its_workers(tmp_path: Path, free_port: int):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "mlflow.db").write_bytes(empty_database())
    command = [sys.executable, "-m", "harness", "ui", str(runs), "--port", str(free_port)]
    started: list[int] = []
    try:
        with running(command, tmp_path / "log") as process:
            wait_for(lambda: answers(free_port, process), 120, "the UI")
            started = descendants(process.pid)
            assert len(started) > 1, "the server has processes of its own"
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0
            wait_for(lambda: not alive(started), 5, "the end of what the UI started")
    finally:
        kill(*alive(started))
    assert re.search(r"MLflow UI: http://127\.0\.0\.1:\d+", (tmp_path / "log").read_text())


def alive(pids: list[int]) -> list[int]:
    """Those that run; one that is over has no command line, though nobody may have taken note of its end."""
    return [pid for pid in pids if command_line(pid)]


def answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "harness ui ended"
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
