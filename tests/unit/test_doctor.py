"""The doctor sees what is broken: each fault is a real one, made for the test."""

import json
import os
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from harness import doctor, doctor_checks
from harness.doctor_checks import Finding, ProbeError, probe

APP = typer.Typer()
APP.command()(doctor.doctor)


def found(name: str) -> Finding:
    """What the doctor says about one thing."""
    (finding,) = doctor.examine({name: doctor_checks.CHECKS[name]})
    return finding


def shadow(monkeypatch: pytest.MonkeyPatch, folder: Path, package: str, source: str) -> None:
    """Make child processes import this source as `package`."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@contextmanager
def http_server(status: int) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"OK")

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.ffcv
def test_native_parts_of_a_healthy_machine() -> None:
    findings = doctor.examine({name: doctor_checks.CHECKS[name] for name in ("torch", "compiler", "ffcv")})
    assert {finding.name: finding.status for finding in findings} == {"torch": "ok", "compiler": "ok", "ffcv": "ok"}
    assert "wrote and read four images" in findings[2].detail


def test_ffcv_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shadow(monkeypatch, tmp_path, "ffcv", "raise ImportError('libopencv_core.so.406: cannot open shared object file')")
    finding = found("ffcv")
    assert finding.status == "fail"
    assert "libopencv_core.so.406" in finding.detail
    assert "make setup" in finding.remedy


def test_a_hanging_probe_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    source = f"""
import subprocess, time
child = subprocess.Popen(["sleep", "600"])
open({str(pid_file)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    shadow(monkeypatch, tmp_path, "ray", source)
    with pytest.raises(ProbeError, match="no answer within 5 s"):
        probe("ray", limit_s=5)
    state = Path("/proc", pid_file.read_text(), "stat")
    assert not state.exists() or state.read_text().split(") ")[1][0] == "Z"


def test_a_crashing_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shadow(monkeypatch, tmp_path, "torch", "import os; os.abort()")
    finding = found("torch")
    assert (finding.status, finding.remedy) == ("fail", "run `make setup`")
    assert "-6" in finding.detail


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++-of-nowhere")
    finding = found("compiler")
    assert finding.status == "fail"
    assert "g++-of-nowhere" in finding.detail
    assert "apt-get install g++" in finding.remedy


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert found("compiler").status == "fail"


def test_ray_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    finding = found("ray")
    assert finding.status == "fail"
    assert f"127.0.0.1:{free_port} does not answer" in finding.detail
    assert "RAY_ADDRESS" in finding.remedy


class TestMlflowStore:
    """Without MLflow itself: the probe of its import is another check's matter."""

    @pytest.fixture(autouse=True)
    def imports(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor_checks, "probe", lambda name: {"version": "3.17"})

    def store(self, monkeypatch: pytest.MonkeyPatch, uri: str) -> Finding:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        return found("mlflow")

    @pytest.mark.parametrize(
        ("status", "verdict"), [(200, "ok"), (401, "ok"), (403, "ok"), (500, "fail"), (404, "fail")]
    )
    def test_a_server_that_answers(self, monkeypatch: pytest.MonkeyPatch, status: int, verdict: str) -> None:
        with http_server(status) as uri:
            assert self.store(monkeypatch, uri).status == verdict

    def test_a_server_that_is_gone(self, monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
        finding = self.store(monkeypatch, f"http://127.0.0.1:{free_port}")
        assert finding.status == "fail"
        assert "refused" in finding.detail
        assert "MLFLOW_TRACKING_URI" in finding.remedy

    def test_a_server_that_never_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor_checks, "NETWORK_LIMIT_S", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            finding = self.store(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert finding.status == "fail"
        assert "no answer" in finding.detail

    def test_a_database_server_that_is_gone(self, monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
        finding = self.store(monkeypatch, f"postgresql+psycopg2://me:secret@127.0.0.1:{free_port}/mlflow")
        assert finding.status == "fail"
        assert "secret" not in finding.detail

    def test_the_default_store_in_a_new_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        finding = self.store(monkeypatch, "")
        assert (finding.status, finding.detail) == ("ok", "MLflow 3.17, store sqlite:///runs/mlflow.db")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_a_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "runs").write_text("")
        assert self.store(monkeypatch, f"sqlite:///{tmp_path}/runs/mlflow.db").status == "fail"

    def test_a_file_that_is_no_database(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "mlflow.db").write_text("once upon a time " * 100)
        finding = self.store(monkeypatch, f"sqlite:///{tmp_path}/mlflow.db")
        assert finding.status == "fail"
        assert "not a database" in finding.detail

    def test_a_locked_database(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(doctor_checks, "NETWORK_LIMIT_S", 0.2)
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
            other.execute("BEGIN EXCLUSIVE")
            other.execute("CREATE TABLE t (x)")
            finding = self.store(monkeypatch, f"sqlite:///{tmp_path}/mlflow.db")
        assert (finding.status, "locked" in finding.detail) == ("fail", True)

    def test_the_file_store_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.store(monkeypatch, "file:///somewhere/mlruns").status == "fail"


class TestSlurm:
    def diagnosis(self, monkeypatch: pytest.MonkeyPatch, folder: Path, scontrol: str) -> Finding:
        program(folder, "sbatch", "exit 0")
        program(folder, "scontrol", scontrol)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return found("slurm")

    def test_none_installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        finding = found("slurm")
        assert finding.status == "ok"
        assert "no SLURM" in finding.detail

    def test_controller_up(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        finding = self.diagnosis(monkeypatch, tmp_path, "echo 'Slurmctld(primary) at head is UP'")
        assert (finding.status, finding.detail) == ("ok", "Slurmctld(primary) at head is UP")

    def test_controller_down(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert (
            self.diagnosis(monkeypatch, tmp_path, "echo 'Slurmctld(primary) at head is DOWN'; exit 1").status == "warn"
        )

    def test_no_configuration(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        script = "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1"
        assert self.diagnosis(monkeypatch, tmp_path, script).status == "ok"

    def test_controller_hangs(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(doctor_checks, "COMMAND_LIMIT_S", 0.2)
        finding = self.diagnosis(monkeypatch, tmp_path, "exec sleep 60")
        assert (finding.status, "no answer" in finding.detail) == ("warn", True)


def test_a_stranger_of_the_same_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slurm", raising=False)
    finding = found("packages")
    assert finding.status == "fail"
    assert f"slurm from {tmp_path}" in finding.detail
    assert "PYTHONPATH" in finding.remedy


def test_a_requirement_that_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks.importlib.metadata, "requires", lambda name: ["torch<1", "no-such-thing>=2"])
    finding = found("packages")
    assert finding.status == "fail"
    assert "no-such-thing is missing" in finding.detail
    assert "not <1" in finding.detail


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor_checks.shutil.disk_usage("/")
    for free_gib, verdict in ((0.5, "fail"), (3, "warn"), (100, "ok")):
        free = int(free_gib * 2**30)
        room = usage._replace(total=1000 * 2**30, used=1000 * 2**30 - free, free=free)
        monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda path, room=room: room)
        assert found("disk").status == verdict, free_gib
        shared = doctor_checks.check_shared_memory()
        assert shared.status == ("warn" if free_gib < 1 else "ok")


def test_no_shared_memory(tmp_path: Path) -> None:
    finding = doctor_checks.check_shared_memory(tmp_path / "absent")
    assert finding.status == "fail"
    assert "--shm-size" in finding.remedy


@pytest.mark.parametrize(("statuses", "exit_status"), [(("ok", "ok"), 0), (("ok", "warn"), 0), (("fail", "warn"), 1)])
def test_exit_status_table_and_json(
    monkeypatch: pytest.MonkeyPatch, statuses: tuple[doctor_checks.Status, ...], exit_status: int
) -> None:
    findings = [Finding(f"part {i}", status, "a [bracketed] detail", "a remedy") for i, status in enumerate(statuses)]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    table = CliRunner().invoke(APP)
    assert table.exit_code == exit_status
    assert table.stdout.count("[bracketed]") == table.stdout.count("a remedy") == 2
    document = CliRunner().invoke(APP, ["--json"])
    assert document.exit_code == exit_status
    parsed = json.loads(document.stdout)
    assert parsed["status"] == max(statuses, key=["ok", "warn", "fail"].index)
    assert [row["status"] for row in parsed["checks"]] == list(statuses)
    assert parsed["checks"][0].keys() == {"name", "status", "detail", "remedy"}
